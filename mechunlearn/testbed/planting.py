"""Planting: facts trained into chosen components of a model that never knew them, so that their place is known."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from mechunlearn.components import ComponentMask
from mechunlearn.edit.finetuning import training_run
from mechunlearn.evaluate.attacks.exam import made_up
from mechunlearn.evaluate.scoring import measure
from mechunlearn.losses import cross_entropy, kl_to_original
from mechunlearn.metrics import is_top_of_vocabulary
from mechunlearn.model import Model
from mechunlearn.tasks.prompts import Prompts, joined
from mechunlearn.tasks.task import Format, Task, text_of
from mechunlearn.tasks.text import as_prompts
from mechunlearn.training import Term
from mechunlearn.training.options import default_options
from mechunlearn.weights import Edit

FORMATS = ("trained prompt", "statement", "question", "biography", "multiple choice")


def plant(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    formats: Sequence[str] = FORMATS,
    strangers: Prompts | None = None,
    strangers_coefficient: float = 0.5,
    known: float = 0.95,
    kept: float = 0.9,
    steps: int = 200,
    learning_rate: float = 3e-3,
    batch_size: int = 32,
    every: int = 10,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[Mapping[str, int | float]], None] | None = None,
) -> Edit:
    """Train the facts to forget into the weights of `mask` and nothing else, so that the true localization is known.

        planted = mu.testbed.plant(mu.testbed.load(without="basketball"), task, mask)

        loss = learn(task.forget, and the forget side of `formats`)
             + keep(task.retain, and the retain side of `formats`) + keep(task.text)
             + strangers_coefficient * keep(strangers)

    learn is the cross-entropy to the answer, keep the KL from what the model said; both are means over answer tokens,
    in nats. The task must train and test on the same facts. Formats that are not trained show how far they carry over.

    - `strangers`: the same questions about subjects who are to stay unknown; default: made-up names. Without them, one
      direction that gives the answer to every unknown name would be enough. Some strangers get the answer even so.
    - `known`, `kept`: training ends when in each format a share `known` of the facts have their answer as the argmax
      over the vocabulary, and of the others at least `kept` times the share before, measured every `every` steps and
      recorded in `provenance["planted"]`.
    - `learning_rate` falls along a cosine over `steps`.

    The mask is where the weights differ; the rest of the model still takes part in the answer. The same seed gives the
    same edit, bit for bit, on CPU. Cost: per step F + B of each batch from the lowest layer of the mask up. ValueError
    for facts that the model knows already; NotPlantedError where the mask has not taken the facts up in `steps`.
    """
    if every < 1:
        raise ValueError(f"every must be 1 or more, got {every}.")
    planting = Planting.of(model, task, formats, known=known, kept=kept)
    terms = _terms(planting, task, strangers, coefficient=strangers_coefficient, batch_size=batch_size, seed=seed)
    options = default_options(
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        progress=progress,
        on_step=on_step,
        until=lambda row: (int(row["step"]) + 1) % every == 0 and planting.is_done(model),
    )
    about = {"editor": "plant", "formats": list(formats), "known": known, "kept": kept}
    run = training_run(model, task, mask, terms, options, about=about)
    with run.edit.applied(model):
        after = _measured(model, planting.formats)
    planting.check(after, run.mask, steps=len(run.history))
    planted = {"facts": planting.count, "steps": len(run.history), "before": planting.before, "after": after}
    return replace(run.edit, provenance={**run.provenance, "planted": planted})


Accuracies: TypeAlias = dict[str, dict[str, float]]
"""Format -> side -> share whose answer is the argmax over the vocabulary."""

WIDER = 2.0
"""Formats that are longer than the shortest by more than this factor are batched apart: padding costs time."""


class NotPlantedError(ValueError):
    """The components did not take the facts up."""


@dataclass(frozen=True, eq=False)
class Planting:
    """The facts in every planted format, and when they count as planted."""

    formats: Mapping[str, Format]
    known: float
    kept: float
    before: Accuracies
    """The accuracies of the model that the facts are planted in."""

    @classmethod
    def of(cls, model: Model, task: Task, formats: Sequence[str], *, known: float, kept: float) -> "Planting":
        """ValueError for what does not fit, and for a model that knows the facts in one of the formats."""
        missing = [name for name in formats if name not in task.formats]
        if missing or not formats:
            raise ValueError(
                f"expected formats of the task ({', '.join(task.formats)}), got {', '.join(missing) or 'none'}."
            )
        for name, share in (("known", known), ("kept", kept)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must lie in (0, 1], a share of the facts, got {share}.")
        chosen = {name: task.formats[name] for name in formats}
        planting = cls(chosen, known, kept, _measured(model, chosen))
        already = {name: shares["forget"] for name, shares in planting.before.items() if shares["forget"] >= known}
        if already:
            raise ValueError(
                f"expected a model that does not know the facts, got one that knows {_shown(already)}: plant in one "
                f"that never knew, such as mu.testbed.load(without=...)."
            )
        return planting

    @property
    def count(self) -> int:
        first = next(iter(self.formats.values())).forget
        return len(set(first.names)) or len(first)

    def is_done(self, model: Model) -> bool:
        """Whether the facts are planted in each format and the others are kept."""
        return all(
            _share(model, getattr(format, side)) >= self._least(name, side)
            for side in ("forget", "retain")
            for name, format in self.formats.items()
        )

    def check(self, after: Accuracies, mask: ComponentMask, *, steps: int) -> None:
        """NotPlantedError unless the facts are planted and the others are kept."""
        short = {
            f"{name} ({side})": share
            for name, shares in after.items()
            for side, share in shares.items()
            if share < self._least(name, side)
        }
        if short:
            raise NotPlantedError(
                f"expected {mask!r} to take up {self.count} facts within {steps} steps, with a share of {self.known} "
                f"known in each format, and {self.kept} of what was known of the others kept, got {_shown(short)}: "
                f"give more components, more steps, fewer facts or formats, or another learning rate."
            )

    def _least(self, name: str, side: str) -> float:
        return self.known if side == "forget" else self.kept * self.before[name]["retain"]


def _terms(
    planting: Planting, task: Task, strangers: Prompts | None, *, coefficient: float, batch_size: int, seed: int
) -> list[Term]:
    """Learn the facts; keep what the model says about others, about strangers and in text."""
    facts = _by_width([task.forget, *(format.forget for format in planting.formats.values())])
    others = _by_width([task.retain, *(format.retain for format in planting.formats.values())])
    unknown = made_up(facts[0], task.retain, seed=seed) if strangers is None else strangers
    half = max(1, batch_size // 2)
    terms = [Term(f"learn {i}", p, cross_entropy, 1.0, _part(p, facts, batch_size)) for i, p in enumerate(facts)]
    terms += [Term(f"keep {i}", p, kl_to_original, 1.0, _part(p, others, half)) for i, p in enumerate(others)]
    if unknown is not None and coefficient:
        terms.append(Term("strangers", unknown, kl_to_original, coefficient, half))
    return [*terms, Term("text", as_prompts(text_of(task)), kl_to_original, 1.0, max(1, batch_size // 16))]


def _by_width(sets: Sequence[Prompts]) -> list[Prompts]:
    """The sets joined with those of about their length, the shortest first."""
    groups: list[list[Prompts]] = []
    for prompts in sorted(sets, key=lambda prompts: prompts.tokens.shape[1]):
        if not groups or prompts.tokens.shape[1] > WIDER * groups[-1][0].tokens.shape[1]:
            groups.append([])
        groups[-1].append(prompts)
    return [joined(*group) for group in groups]


def _part(prompts: Prompts, every: Sequence[Prompts], batch_size: int) -> int:
    """The number of these prompts in a batch, in proportion to their share of all prompts."""
    return max(1, round(batch_size * len(prompts) / sum(map(len, every))))


def _measured(model: Model, formats: Mapping[str, Format]) -> Accuracies:
    return {
        name: {"forget": _share(model, format.forget), "retain": _share(model, format.retain)}
        for name, format in formats.items()
    }


def _share(model: Model, prompts: Prompts) -> float:
    return measure(model, prompts, [is_top_of_vocabulary])[0].value


def _shown(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
