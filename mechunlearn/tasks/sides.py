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
        cls, forget: Sequence[Fact], retain: Sequence[Fact], *, train: float, split_forget: bool, seed: int
    ) -> "Sides[Fact]":
        """Retained facts are split at random, `train` of them to train on; ValueError if a part would be empty."""
        for side, facts in (("forget", forget), ("retain", retain)):
            if not facts:
                raise ValueError(f"expected facts to {side}, got none: choose fewer or other facts to forget.")
        rng = random.Random(seed)
        trained, tested = _split(forget, train, rng, "forget") if split_forget else (list(forget), list(forget))
        return cls(trained, tested, *_split(retain, train, rng, "retain"))

    def names(self, name: Callable[[Fact], str]) -> dict[str, tuple[str, ...]]:
        """For `Task.splits`."""
        return {part: tuple(map(name, facts)) for part, facts in vars(self).items()}


def _split(facts: Sequence[Fact], share: float, rng: random.Random, side: str) -> tuple[list[Fact], list[Fact]]:
    shuffled = rng.sample(list(facts), len(facts))
    count = round(share * len(facts))
    if not 0 < count < len(facts):
        raise ValueError(
            f"expected train to leave facts to {side} on both sides of the split, got {share} of {len(facts)}: change "
            f"it, or give more facts."
        )
    return shuffled[:count], shuffled[count:]
