"""What is trained and measured when facts are planted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mechunlearn.components import ComponentMask
from mechunlearn.evaluate.accuracy import measure
from mechunlearn.evaluate.attacked import made_up
from mechunlearn.losses import cross_entropy, kl_to_original
from mechunlearn.metrics import is_top_of_vocabulary
from mechunlearn.model import Model
from mechunlearn.tasks.joined import joined
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Format, Task
from mechunlearn.tasks.text import as_prompts
from mechunlearn.training import Term

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
    """Of the model that facts are planted in."""

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
        already = {name: found["forget"] for name, found in planting.before.items() if found["forget"] >= known}
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

    def measured(self, model: Model) -> Accuracies:
        """Of the model as it is."""
        return _measured(model, self.formats)

    def is_done(self, model: Model) -> bool:
        """Whether each format has its facts and has kept the others; stops looking at the first that has not."""
        return all(
            _share(model, getattr(found, side)) >= self._least(name, side)
            for side in ("forget", "retain")
            for name, found in self.formats.items()
        )

    def check(self, after: Accuracies, mask: ComponentMask, *, steps: int) -> None:
        """ValueError unless it is done."""
        short = {
            f"{name} ({side})": share
            for name, found in after.items()
            for side, share in found.items()
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


def terms_of(
    planting: Planting, task: Task, strangers: Prompts | None, *, coefficient: float, batch_size: int, seed: int
) -> list[Term]:
    """Learn the facts; keep what the model says about others, about strangers and in text."""
    facts = _by_width([task.forget, *(found.forget for found in planting.formats.values())])
    others = _by_width([task.retain, *(found.retain for found in planting.formats.values())])
    unknown = made_up(facts[0], task.retain, seed=seed) if strangers is None else strangers
    half = max(1, batch_size // 2)
    terms = [Term(f"learn {i}", p, cross_entropy, 1.0, _part(p, facts, batch_size)) for i, p in enumerate(facts)]
    terms += [Term(f"keep {i}", p, kl_to_original, 1.0, _part(p, others, half)) for i, p in enumerate(others)]
    if unknown is not None and coefficient:
        terms.append(Term("strangers", unknown, kl_to_original, coefficient, half))
    return [*terms, Term("text", as_prompts(task.text), kl_to_original, 1.0, max(1, batch_size // 16))]


def _by_width(sets: Sequence[Prompts]) -> list[Prompts]:
    """Joined, where their lengths are alike; the shortest first."""
    groups: list[list[Prompts]] = []
    for prompts in sorted(sets, key=lambda prompts: prompts.tokens.shape[1]):
        if not groups or prompts.tokens.shape[1] > WIDER * groups[-1][0].tokens.shape[1]:
            groups.append([])
        groups[-1].append(prompts)
    return [joined(*group) for group in groups]


def _part(some: Prompts, every: Sequence[Prompts], batch_size: int) -> int:
    """Of a batch: as large as its share of all prompts."""
    return max(1, round(batch_size * len(some) / sum(map(len, every))))


def _measured(model: Model, formats: Mapping[str, Format]) -> Accuracies:
    return {
        name: {"forget": _share(model, found.forget), "retain": _share(model, found.retain)}
        for name, found in formats.items()
    }


def _share(model: Model, prompts: Prompts) -> float:
    return measure(model, prompts, [is_top_of_vocabulary])[0].value


def _shown(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
