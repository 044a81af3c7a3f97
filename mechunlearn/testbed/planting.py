"""Planting: facts trained into chosen components of a model that never knew them, so that their place is known."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import TypeAlias

import torch

from mechunlearn.components import ComponentMask
from mechunlearn.edit.finetuning import training_run
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
    chosen, before = _unknown(model, task, formats, known=known, kept=kept)
    wanted = {("forget", name): known for name in chosen}
    wanted |= {("retain", name): kept * shares["retain"] for name, shares in before.items()}

    def is_done(row: Mapping[str, int | float]) -> bool:
        reached = (_share(model, getattr(chosen[name], side)) >= least for (side, name), least in wanted.items())
        return (int(row["step"]) + 1) % every == 0 and all(reached)

    terms = _terms(task, chosen, strangers, strangers_coefficient, batch_size, seed)
    run_options = {"steps": steps, "learning_rate": learning_rate, "seed": seed, "progress": progress}
    options = default_options(**run_options, on_step=on_step, until=is_done)
    about = {"editor": "plant", "formats": list(formats), "known": known, "kept": kept}
    run = training_run(model, task, mask, terms, options, about=about)
    with run.edit.applied(model):
        after = _measured(model, chosen)
    facts, took = next(iter(chosen.values())).forget, len(run.history)
    count = len(set(facts.names)) or len(facts)
    missed = [(name, side) for (side, name), least in wanted.items() if after[name][side] < least]
    if missed:
        shares = _shown({f"{name} ({side})": after[name][side] for name, side in missed})
        raise NotPlantedError(
            f"expected {run.mask!r} to take up {count} facts within {took} steps, with a share of {known} known in "
            f"each format, and {kept} of what was known of the others kept, got {shares}: give more components, "
            f"more steps, fewer facts or formats, or another learning rate."
        )
    planted = {"facts": count, "steps": took, "before": before, "after": after}
    return replace(run.edit, provenance={**run.provenance, "planted": planted})


Accuracies: TypeAlias = dict[str, dict[str, float]]
"""Format -> side -> share whose answer is the argmax over the vocabulary."""

WIDER = 2.0
"""Formats that are longer than the shortest by more than this factor are batched apart: padding costs time."""


class NotPlantedError(ValueError):
    """The components did not take the facts up."""


def _unknown(
    model: Model, task: Task, formats: Sequence[str], *, known: float, kept: float
) -> tuple[dict[str, Format], Accuracies]:
    """The formats, and what the model knows in them; ValueError for what does not fit, and if it knows the facts."""
    missing = [name for name in formats if name not in task.formats]
    if missing or not formats:
        raise ValueError(
            f"expected formats of the task ({', '.join(task.formats)}), got {', '.join(missing) or 'none'}."
        )
    for name, share in (("known", known), ("kept", kept)):
        if not 0 < share <= 1:
            raise ValueError(f"{name} must lie in (0, 1], a share of the facts, got {share}.")
    chosen = {name: task.formats[name] for name in formats}
    before = _measured(model, chosen)
    already = {name: shares["forget"] for name, shares in before.items() if shares["forget"] >= known}
    if already:
        raise ValueError(
            f"expected a model that does not know the facts, got one that knows {_shown(already)}: plant in one "
            f"that never knew, such as mu.testbed.load(without=...)."
        )
    return chosen, before


def _terms(
    task: Task, formats: Mapping[str, Format], strangers: Prompts | None, coefficient: float, batch_size: int, seed: int
) -> list[Term]:
    """Learn the facts; keep what the model says about others, about strangers and in text."""
    facts = _by_width([task.forget, *(format.forget for format in formats.values())])
    others = _by_width([task.retain, *(format.retain for format in formats.values())])
    unknown = _made_up(facts[0], task.retain, seed=seed) if strangers is None else strangers
    half = max(1, batch_size // 2)
    terms = [Term(f"learn {i}", p, cross_entropy, 1.0, _part(p, facts, batch_size)) for i, p in enumerate(facts)]
    terms += [Term(f"keep {i}", p, kl_to_original, 1.0, _part(p, others, half)) for i, p in enumerate(others)]
    if unknown is not None and coefficient:
        terms.append(Term("strangers", unknown, kl_to_original, coefficient, half))
    return [*terms, Term("text", as_prompts(text_of(task)), kl_to_original, 1.0, max(1, batch_size // 16))]


def _made_up(prompts: Prompts, others: Prompts, *, seed: int) -> Prompts | None:
    """The same questions about names of which each token is one of a random name of either; None without subjects."""
    if prompts.subject is None or others.subject is None:
        return None
    generator = torch.Generator().manual_seed(index(seed))
    sides = ((prompts.tokens, prompts.subject), (others.tokens, others.subject))
    pool = [row[where].tolist() for side in sides for row, where in zip(*side, strict=True) if bool(where.any())]
    tokens = prompts.tokens.clone()
    for row, where in enumerate(prompts.subject):
        drawn = torch.randint(len(pool), (int(where.sum()),), generator=generator).tolist()
        drawn_tokens = [pool[other][place % len(pool[other])] for place, other in enumerate(drawn)]
        tokens[row, where] = torch.tensor(drawn_tokens, dtype=tokens.dtype, device=tokens.device)
    return replace(prompts, tokens=tokens, corrupt=None, texts=())


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
