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
    n = len(values)
    flat = values.double().reshape(n, -1)
    drawn = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(draws, n).double())
    means = (counts @ flat.nan_to_num(0.0)) / (counts @ (~flat.isnan()).double())
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(means, tails, dim=0)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])
