"""A learned weight mask: a number in [0, 1] for each weight, and the edits that can be made of it."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.files import Saved
from mechunlearn.model import Model
from mechunlearn.training.movers import collect_gradient
from mechunlearn.weights import Edit, Entries, Values, select


@dataclass(frozen=True, eq=False, repr=False)
class LearnedMask(Saved):
    """Numbers in [0, 1] for localized weights: 1 keeps a weight, 0 removes it."""

    mask: ComponentMask
    """The localization."""
    numbers: Mapping[str, Tensor]
    """Matrix label -> [unit, width, d_model], or [unit, 1, 1] where there is one number for each unit."""
    original: Values
    """The weights that they multiply."""
    fingerprint: str
    """That of the model that they were learned on."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, int | float], ...] = ()
    """One row per step: each loss term, the penalty, gradient norm, learning rate."""

    def __post_init__(self) -> None:
        """ValueError for numbers that do not belong to the original weights, or outside [0, 1]."""
        for label, value in self.numbers.items():
            weight = self.original.get(label)
            if weight is None or value.shape not in (weight.shape, (len(weight), 1, 1)):
                raise ValueError(
                    f"expected one number for each weight or unit, got shape {tuple(value.shape)} for {label}, whose "
                    f"weights have shape {None if weight is None else tuple(weight.shape)}."
                )
            low, high = (float(bound) for bound in value.aminmax())
            if not (low >= 0.0 and high <= 1.0):
                raise ValueError(
                    f"expected numbers in [0, 1], got {low:.4g} to {high:.4g} in {label}: clamp them after each step; "
                    f"where they are NaN, lower the learning rate."
                )

    @property
    def n_moved(self) -> int:
        """How many numbers are below 1: the largest `k`."""
        return int(sum((value < 1).sum() for value in self.numbers.values()))

    def edit(self) -> Edit:
        """The weights times their numbers, as they were learned."""
        return self._edit(dict(self.numbers), {"kind": "as learned"})

    def discretize(self, *, k: int | None = None, threshold: float | None = None) -> Edit:
        """An edit that sets weights to zero and leaves the others as they were.

        - `k`: those of the k smallest numbers; ties go to the one that comes first in the model.
        - `threshold`: those whose number is below it.

        With one number for each unit, k counts units: a head goes with its whole W_O slice, a neuron with its row of
        W_out. Numbers that never moved are never taken: ValueError for a k above `n_moved`, and for a rule that takes
        none.
        """
        if (k is None) == (threshold is None):
            raise ValueError(f"expected exactly one of k and threshold, got k={k}, threshold={threshold}.")
        labels = list(self.numbers)
        flat = torch.cat([self.numbers[label].flatten() for label in labels])
        removed = torch.zeros_like(flat, dtype=torch.bool)
        if k is not None:
            if not 1 <= k <= self.n_moved:
                raise ValueError(
                    f"k must lie in 1..{self.n_moved} (the numbers that moved, of {len(flat)}), got {k}: train "
                    f"for more steps or with a higher learning rate, or choose a smaller k."
                )
            removed[flat.argsort(stable=True)[:k]] = True
        elif threshold is not None:
            removed = (flat < threshold) & (flat < 1)
            if not bool(removed.any()):
                raise ValueError(
                    f"expected a threshold above the smallest number, {float(flat.min()):.4g}, got {threshold}."
                )
        return self._without(removed, {"kind": "discretized", "k": k, "threshold": threshold})

    def zeroed_at_random(self, *, k: int, seed: int = 0) -> Edit:
        """The control of `discretize(k=k)`: k of the same weights (or units) set to zero, whichever their numbers."""
        count = sum(value.numel() for value in self.numbers.values())
        if not 1 <= k <= count:
            raise ValueError(f"k must lie in 1..{count} (all numbers of the mask), got {k}.")
        removed = torch.zeros(count, dtype=torch.bool)
        removed[torch.randperm(count, generator=torch.Generator().manual_seed(operator.index(seed)))[:k]] = True
        return self._without(removed, {"kind": "at random", "k": k, "seed": seed})

    def edit_sizes(self, sizes: Sequence[int]) -> dict[int, Edit]:
        """`discretize(k=...)` for several k: a sweep over how many weights are removed."""
        return {k: self.discretize(k=k) for k in sizes}

    def __repr__(self) -> str:
        count = sum(value.numel() for value in self.numbers.values())
        return f"LearnedMask({count:,} numbers on {self.mask!r}; {self.n_moved:,} below 1)"

    def _without(self, removed: Tensor, how: Mapping[str, Any]) -> Edit:
        """The weights, with 0 wherever `removed`, which has a flag for each number, is True."""
        parts = removed.split([value.numel() for value in self.numbers.values()])
        kept = {}
        for (label, value), part in zip(self.numbers.items(), parts, strict=True):
            kept[label] = ~part.to(value.device).view_as(value)
        return self._edit(kept, {**how, "removed": int(removed.sum())})

    def _edit(self, factors: Mapping[str, Tensor], how: Mapping[str, Any]) -> Edit:
        values = {}
        for label, weight in self.original.items():
            factor = factors.get(label)
            values[label] = weight.clone() if factor is None else (factor * weight).to(weight.dtype)
        return Edit(self.mask, values, self.fingerprint, {**self.provenance, "mask": dict(how)}, self.history)


@dataclass(frozen=True, eq=False)
class Numbers:
    """The numbers of some entries, in at least float32."""

    entries: Entries
    original: Tensor
    tensor: Tensor
    """[unit, width, d_model], or [unit, 1, 1] by unit."""

    @classmethod
    def of(cls, entries: Entries, original: Tensor, by_unit: bool) -> "Numbers":
        """Ones; the parameter requires a gradient from here on."""
        entries.slot.parameter.requires_grad_(True)
        dtype = torch.promote_types(original.dtype, torch.float32)
        shape = (len(original), 1, 1) if by_unit else original.shape
        return cls(entries, original, torch.ones(shape, dtype=dtype, device=original.device))

    @torch.no_grad()
    def collect(self) -> None:
        """d loss / d m = d loss / d (m * weight) * weight, added to `tensor.grad`; the parameter's own is cleared."""
        collect_gradient(self, lambda gradient: gradient.mul_(self.original).sum_to_size(self.tensor.shape))

    @torch.no_grad()
    def clamp(self) -> None:
        """Put the numbers back into [0, 1] and show the model their product with the weights."""
        self.tensor.clamp_(0.0, 1.0)
        self.entries.write(self.tensor * self.original)

    def publish(self) -> None:
        self.clamp()
        self.tensor.grad = None


def numbered(model: Model, mask: ComponentMask, by_unit: bool) -> list[Entries]:
    """The entries that get numbers: all of the mask, or, by unit, those of W_O and W_out."""
    entries = [e for e in select(model, mask) if not by_unit or e.slot.matrix in ("W_O", "W_out")]
    if not entries:
        raise ValueError(
            f"expected a mask with a W_O or a W_out for numbers by unit, got {mask!r}: use heads, MLPs or neurons."
        )
    return entries
