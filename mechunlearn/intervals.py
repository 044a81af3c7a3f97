"""Intervals of means over examples, by bootstrap."""

import torch
from jaxtyping import Float
from torch import Tensor


def bootstrap(
    values: Float[Tensor, "example *number"], *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[Float[Tensor, "*number"], Float[Tensor, "*number"]]:
    """Low and high end of the interval of the mean over examples, for each number by itself.

    Percentile bootstrap (Efron 1979); whole examples are resampled. NaN where an example has no value: the mean is
    over those that have one. An example alone, or examples that are all equal, give an interval of no width.
    """
    flat = values.double().reshape(len(values), -1)
    weights = resampled(len(values), draws, seed)
    found = [ends(_means(some, weights), confidence) for some in flat.split(_AT_ONCE, dim=1)]
    low, high = (torch.cat(end).reshape(values.shape[1:]) for end in zip(*found, strict=True))
    return low, high


def resampled(n: int, draws: int, seed: int) -> Float[Tensor, "draw example"]:
    """How often each example is in each draw of n with replacement: weights, for statistics other than a mean."""
    drawn = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    once = torch.ones(draws, n, dtype=torch.float64)
    return torch.zeros_like(once).scatter_add_(1, drawn, once)


def ends(
    values: Float[Tensor, "draw *number"], confidence: float
) -> tuple[Float[Tensor, "*number"], Float[Tensor, "*number"]]:
    """The percentiles between which that share of the draws lies; draws that are NaN are left out."""
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(values, tails, dim=0)
    return low, high


_AT_ONCE = 1000
"""Numbers whose draws are held in memory together, 16 MB of 2,000 draws."""


def _means(values: Float[Tensor, "example number"], weights: Float[Tensor, "draw example"]) -> Tensor:
    return (weights @ values.nan_to_num(0.0)) / (weights @ (~values.isnan()).double())
