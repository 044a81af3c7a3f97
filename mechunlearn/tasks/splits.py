"""Splits: a task in parts, a validation split, and which facts a builder trains on and tests."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Format, Task

Fact = TypeVar("Fact")


def partitioned(task: Task, k: int, *, rehearse: bool = False) -> list[Task]:
    """`k` tasks that divide the facts to forget among them, in their order; sizes differ by one fact at most.

    All parts retain the same facts, none of which is to be forgotten by another part, and have all formats, so each is
    evaluated on all facts. Prompts of one name are one fact; without names, each prompt is.
    `rehearse`: each part also forgets the facts of the parts before it.

    Guo et al. 2025 (https://arxiv.org/abs/2410.12949) edit 64 facts as 4 x 16, without rehearsal. ValueError for an
    injection that does not go with the prompts to forget row by row.
    """
    facts = _facts(task.forget)
    if not 1 <= k <= len(facts):
        raise ValueError(f"k must lie in 1..{len(facts)} (the number of facts to forget), got {k}.")
    names, parts = list(facts), []
    for part in range(k):
        start, end = len(names) * part // k, len(names) * (part + 1) // k
        chosen = _forgetting_only(task, names[0 if rehearse else start : end])
        parts.append(replace(chosen, name=f"{task.name}, part {part + 1} of {k}"))
    return parts


@dataclass(frozen=True, eq=False)
class Validation:
    """A task to choose settings on, and the task whose numbers are reported; `validation_split` makes both from one.

    ValueError if a fact is tested in both (on either side), or if the trials train on what they retain and test.
    """

    trials: Task
    """Edited and scored while settings are chosen: its formats hold the validation facts, and nothing else."""
    final: Task
    """Edited with the chosen settings and reported: its formats hold no validation fact."""

    def __post_init__(self) -> None:
        for side in ("forget", "retain"):
            validated = _tested(self.trials, side)
            shared = sorted(validated & _tested(self.final, side))
            if shared:
                raise ValueError(
                    f"expected validation facts that no reported number uses, got {len(shared)} to {side} that both "
                    f"tasks test, such as {shared[0]!r}: make both with validation_split."
                )
        trained = sorted(_tested(self.trials, "retain") & set(_names(self.trials.retain, "retain")))
        if trained:
            raise ValueError(
                f"expected retained validation facts that the trials do not train on, got {len(trained)} that they do, "
                f"such as {trained[0]!r}: take them out of trials.retain."
            )


def validation_split(task: Task, *, share: float = 0.2, seed: int = 0) -> Validation:
    """A task to choose settings on, with `share` of the train split of both sides and of the text set aside for it.

    The validation facts are asked in the trained prompt, the one format that a task has for its train split.

    - Retained facts: the trials never train on them. Training on them would hide the damage that they measure.
    - Facts to forget, where the task tests facts other than those it trains on (a whole sport): the trials do not train
      on them either, since the claim is that forgetting carries over to facts like those trained on.
    - Facts to forget that the task trains *and* tests on (single athletes): the trials train on all facts, since the
      claim is about the very facts that were trained on, and forgetting other facts would be damage. They are scored on
      the validation facts, and the reported formats leave these out: with 16 facts, 3 choose and 13 are reported.

    `final` trains on the whole train split. Other knowledge is left to `final`. Prompts of one name are one fact. A
    format in which no fact is left, such as one that asks few of `known_facts`, is named in
    `final.splits["formats_left_out"]`. ValueError where that is the trained prompt.
    """
    rng = random.Random(f"validation {seed}")
    forget, retain = _facts(task.forget, "forget"), _facts(task.retain, "retain")
    # The order of the draws (forget, retain, text) is part of what a seed means.
    chosen = {"forget": _random_share(forget, share, rng), "retain": _random_share(retain, share, rng)}
    n_rows = 0 if task.text is None else len(task.text)
    text_rows = set(_random_share(range(n_rows), share, rng)) if n_rows else set[int]()
    tested_on_itself = bool(set(forget) & _tested(task, "forget"))
    # Facts that are trained on and tested themselves are all trained on; of a whole kind, the chosen ones are held out.
    trained = [*forget] if tested_on_itself else [fact for fact in forget if fact not in chosen["forget"]]
    retained = [fact for fact in retain if fact not in chosen["retain"]]
    validation = Format(
        _prompts_about(task.forget, chosen["forget"], forget), _prompts_about(task.retain, chosen["retain"], retain)
    )
    is_trained = torch.tensor([row not in text_rows for row in range(n_rows)])
    trials = replace(
        _forgetting_only(task, trained),
        name=f"{task.name}, trials",
        retain=_prompts_about(task.retain, retained, retain),
        formats={next(iter(task.formats)): validation},
        text=None if task.text is None else task.text[is_trained],
        text_test=None if task.text is None else task.text[~is_trained],
        knowledge=None,
        splits=Sides(trained, chosen["forget"], retained, chosen["retain"]).names(str),
    )
    formats = _still_asked(task, chosen)
    left_out = tuple(name for name in task.formats if name not in formats)
    asked_first = next(iter(task.formats))
    if asked_first in left_out:
        raise ValueError(
            f"expected facts in {asked_first!r} besides those that settings are chosen on, got none with share={share} "
            f"of {len(forget)} to forget and {len(retain)} to retain: take a smaller share or more facts."
        )
    first = formats[asked_first]
    splits = Sides([*forget], [*_facts(first.forget)], [*retain], [*_facts(first.retain)]).names(str)
    validated = {f"{side}_validation": tuple(facts) for side, facts in chosen.items()}
    validated |= {"formats_left_out": left_out} if left_out else {}
    return Validation(trials, replace(task, formats=formats, splits=splits | validated))


@dataclass(frozen=True)
class Sides(Generic[Fact]):
    """The four parts of a task's facts."""

    forget_train: list[Fact]
    forget_test: list[Fact]
    """The same facts, unless facts to forget are split: whether forgetting carries over to others is then tested."""
    retain_train: list[Fact]
    retain_test: list[Fact]

    @classmethod
    def of(
        cls,
        forget: Sequence[Fact],
        retain: Sequence[Fact],
        *,
        train: float,
        train_forget: float | None,
        rng: random.Random,
        shuffle: bool = True,
    ) -> "Sides[Fact]":
        """The parts: `train` of the retained facts are trained on, `train_forget` of those to forget (None: all)."""
        for side, facts in (("forget", forget), ("retain", retain)):
            if not facts:
                raise ValueError(f"expected facts to {side}, got none: choose fewer or other facts to forget.")
        trained, tested = list(forget), list(forget)
        if train_forget is not None:
            trained, tested = _split(forget, train_forget, rng, "forget", shuffle=shuffle)
        return cls(trained, tested, *_split(retain, train, rng, "retain", shuffle=shuffle))

    def names(self, name: Callable[[Fact], str]) -> dict[str, tuple[str, ...]]:
        """The names of the facts in each part, for `Task.splits`."""
        return {part: tuple(map(name, facts)) for part, facts in vars(self).items()}


def _facts(prompts: Prompts, side: str | None = None) -> dict[str, list[int]]:
    """The rows of each fact by its name; without names each row is a fact, or an error if `side` is named."""
    names = prompts.names if prompts.names or side is None else _names(prompts, side)
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names or map(str, range(len(prompts)))):
        rows.setdefault(name, []).append(row)
    return rows


def _names(prompts: Prompts, side: str) -> tuple[str, ...]:
    if not prompts.names:
        raise ValueError(
            f"expected prompts with names, to tell which are about one fact, got none for {side}: pass subjects=... to "
            f"tasks.build, or replace(prompts, names=...)."
        )
    return prompts.names


def _tested(task: Task, side: str) -> set[str]:
    return {name for format in task.formats.values() for name in _names(getattr(format, side), f"{side}, tested")}


def _prompts_about(prompts: Prompts, facts: Sequence[str], rows: dict[str, list[int]]) -> Prompts:
    return prompts[sorted(row for fact in facts for row in rows[fact])]


def _still_asked(task: Task, chosen: Mapping[str, Sequence[str]]) -> dict[str, Format]:
    """The formats without the chosen facts of each side, where some are left on both."""
    formats = {}
    for name, format in task.formats.items():
        forgotten, kept = (_without(getattr(format, side), facts) for side, facts in chosen.items())
        injected = None if format.injected is None else _without(format.injected, chosen["forget"])
        if forgotten is not None and kept is not None:
            formats[name] = replace(format, forget=forgotten, retain=kept, injected=injected)
    return formats


def _without(prompts: Prompts, facts: Sequence[str]) -> Prompts | None:
    """None if none are left."""
    rows = [row for row, name in enumerate(prompts.names) if name not in facts]
    return prompts if len(rows) == len(prompts) else prompts[rows] if rows else None


def _forgetting_only(task: Task, facts: Sequence[str]) -> Task:
    """The task with only these facts to forget in its train split."""
    if task.injection is not None and len(task.injection) != len(task.forget):
        raise ValueError(
            f"expected an injection with one row for each of the {len(task.forget)} prompts to forget, got "
            f"{len(task.injection)}: give each prompt its injected answer, or split before replacing the injection."
        )
    rows = _facts(task.forget)
    injection = None if task.injection is None else _prompts_about(task.injection, facts, rows)
    splits = {**task.splits, "forget_train": tuple(facts)} if task.forget.names else task.splits
    return replace(task, forget=_prompts_about(task.forget, facts, rows), injection=injection, splits=splits)


def _random_share(facts: "Iterable[Fact]", share: float, rng: random.Random) -> "list[Fact]":
    """A random share of the facts, at least one, in their order."""
    every = list(facts)
    count = max(1, round(share * len(every)))
    if not 0 < share < 1 or count >= len(every):
        raise ValueError(
            f"expected a share that leaves something on both sides of the split, got {share} of {len(every)}."
        )
    places = sorted(rng.sample(range(len(every)), count))
    return [every[place] for place in places]


def _split(
    facts: Sequence[Fact], share: float, rng: random.Random, side: str, *, shuffle: bool
) -> tuple[list[Fact], list[Fact]]:
    order = rng.sample(list(facts), len(facts)) if shuffle else list(facts)
    count = round(share * len(facts))
    if not 0 < count < len(facts):
        raise ValueError(
            f"expected train to leave facts to {side} on both sides of the split, got {share} of {len(facts)}: change "
            f"it, or give more facts."
        )
    return order[:count], order[count:]
