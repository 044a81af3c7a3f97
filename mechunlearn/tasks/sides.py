"""Facts to forget and to retain, to train on and to test."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Fact = TypeVar("Fact")


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
        """`train` of the retained facts are to train on, and `train_forget` of those to forget (`None`: not split).

        Drawn at random, or the first ones. ValueError if a part would be empty.
        """
        for side, facts in (("forget", forget), ("retain", retain)):
            if not facts:
                raise ValueError(f"expected facts to {side}, got none: choose fewer or other facts to forget.")
        trained, tested = list(forget), list(forget)
        if train_forget is not None:
            trained, tested = _split(forget, train_forget, rng, "forget", shuffle=shuffle)
        return cls(trained, tested, *_split(retain, train, rng, "retain", shuffle=shuffle))

    def names(self, name: Callable[[Fact], str]) -> dict[str, tuple[str, ...]]:
        """For `Task.splits`."""
        return {part: tuple(map(name, facts)) for part, facts in vars(self).items()}


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
