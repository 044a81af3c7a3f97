"""Intervals of means over examples: of values within limits, such as shares, and of any others (bootstrap)."""

import operator
from statistics import NormalDist

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["bootstrap", "bootstrap_of_others", "bounded"]


def bounded(
    values: Float[Tensor, "example *number"],
    limits: tuple[float, float] = (0.0, 1.0),
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[Float[Tensor, "*number"], Float[Tensor, "*number"]]:
    r"""Low and high end of the interval of the mean of values that lie within limits, for each number by itself.

        low  = percentile of  w_1 x_1 + ... + w_n x_n + w_0 * lower limit
        high = percentile of  w_1 x_1 + ... + w_n x_n + w_0 * upper limit

    over weights drawn uniformly among those that are positive and sum to 1. The example 0 stands for all that n
    examples may not have shown: 33 values of 1 say [0.894, 1], and not [1, 1]. Of yes/no values this is the interval of
    Clopper & Pearson (1934). It covers in 0.95 of draws or more, for skewed values too (`benchmarks/intervals.py`
    measures it); for values far from the limits that differ little it is wider than need be.

    NaN where an example has no value. ValueError for a value beyond the limits.

    Gaffke 2005; Learned-Miller & Thomas 2019, https://arxiv.org/abs/1905.06208.
    """
    flat = values.double().reshape(len(values), -1)
    lower, upper = limits
    beyond = flat[(flat < lower - _ROUNDING) | (flat > upper + _ROUNDING)]
    if len(beyond):
        raise ValueError(f"expected values from {lower} to {upper}, got {float(beyond[0])}: use `bootstrap`.")
    weights = uniform_weights(len(values) + 1, draws, seed)
    pieces = []
    for numbers in flat.split(_AT_ONCE, dim=1):
        unseen = torch.tensor(limits).double()[:, None, None].expand(2, 1, numbers.shape[1])
        least, most = (_means(torch.cat([numbers, limit]), weights) for limit in unseen)
        pieces.append([ends(least, confidence)[0], ends(most, confidence)[1]])
    low, high = (torch.cat(end).reshape(values.shape[1:]) for end in zip(*pieces, strict=True))
    return low, high


def bootstrap(
    values: Float[Tensor, "example *number"], *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[Float[Tensor, "*number"], Float[Tensor, "*number"]]:
    """Low and high end of the interval of the mean over examples, for each number by itself.

    Percentile bootstrap (Efron 1979) that resamples whole examples. NaN where an example has no value: the mean is over
    those that have one. An example alone, or examples that are all equal, give an interval of no width.

    The interval is for the mean of all examples that might have been drawn; the mean of another draw varies too (see
    `bootstrap_of_others`). For few examples it is too narrow. Of n normal values, an interval of 95 % covers in 0.84 of
    draws for n = 5, 0.89 for 8, 0.92 for 16, 0.93 for 32 and 0.95 from about 100 on; of skewed values in fewer
    (exponential: 0.92 for 32).
    """
    flat = values.double().reshape(len(values), -1)
    weights = resampled(len(values), draws, seed)
    pieces = [ends(_means(numbers, weights), confidence) for numbers in flat.split(_AT_ONCE, dim=1)]
    low, high = (torch.cat(end).reshape(values.shape[1:]) for end in zip(*pieces, strict=True))
    return low, high


def bootstrap_of_others(
    values: Float[Tensor, "example *number"], others: int, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[Float[Tensor, "*number"], Float[Tensor, "*number"]]:
    r"""Low and high end of the interval of the mean over so many other examples, for each number by itself.

    With n examples drawn independently from the same source as the others, the percentiles over draws of

        mean + sqrt(n / (n - 1)) * t / z * (mean of `others` resampled examples - mean of n resampled examples)

    t and z: the quantiles of Student's t (n - 1 degrees of freedom) and of the normal distribution at
    (1 + confidence) / 2. The factor, which is right for normal values, widens the intervals of few examples (after the
    expanded percentiles of Hesterberg 2015, https://arxiv.org/abs/1411.5279). Skewed values are covered less often: for
    32 examples and 32 others in 0.93 (exponential) and 0.90 (lognormal) of draws, not 0.95.

    NaN where an example has no value: n is the number of those that have one. With fewer than two, the ends are NaN.
    ValueError for fewer than two examples or one other.
    """
    if others < 1 or len(values) < 2:
        raise ValueError(
            f"expected two examples or more and one other or more, got {len(values)} and {others}: one example does "
            f"not say how much examples differ."
        )
    flat = values.double().reshape(len(values), -1)
    indices = _random_indices(len(values), len(values) + others, draws, seed)
    own, other = (_counts(part, len(values)) for part in indices.split([len(values), others], dim=1))
    pieces = []
    for numbers in flat.split(_AT_ONCE, dim=1):
        distances = ends(_means(numbers, other) - _means(numbers, own), confidence)
        pieces.append([numbers.nanmean(0) + _widening(numbers, confidence) * distance for distance in distances])
    low, high = (torch.cat(end).reshape(values.shape[1:]) for end in zip(*pieces, strict=True))
    return low, high


def resampled(n: int, draws: int, seed: int) -> Float[Tensor, "draw example"]:
    """How often each example is in each draw of n with replacement: weights, for statistics other than a mean."""
    return _counts(_random_indices(n, n, draws, seed), n)


def uniform_weights(n: int, draws: int, seed: int) -> Float[Tensor, "draw example"]:
    """For each draw, n positive weights that sum to n, uniform among all such (Rubin's Bayesian bootstrap, 1981)."""
    _check_draws(draws)
    uniform = torch.rand(draws, n, generator=torch.Generator().manual_seed(operator.index(seed)), dtype=torch.float64)
    spread = -(1 - uniform).log()
    return n * spread / spread.sum(1, keepdim=True)


def ends(
    values: Float[Tensor, "draw *number"], confidence: float
) -> tuple[Float[Tensor, "*number"], Float[Tensor, "*number"]]:
    """The percentiles between which the share `confidence` of the draws lies; draws that are NaN are left out."""
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(values, tails, dim=0)
    return low, high


_ROUNDING = 1e-4
"""By how much a value in low precision may be beyond its limits."""
_AT_ONCE = 1000
"""Numbers whose draws are in memory together: 16 MB for 2,000 draws."""


def _random_indices(n: int, size: int, draws: int, seed: int) -> Int[Tensor, "draw size"]:
    _check_draws(draws)
    return torch.randint(n, (draws, size), generator=torch.Generator().manual_seed(operator.index(seed)))


def _check_draws(draws: int) -> None:
    if draws < 1:
        raise ValueError(f"expected at least one draw for an interval, got {draws}: use a thousand or more.")


def _counts(indices: Int[Tensor, "draw size"], n: int) -> Float[Tensor, "draw example"]:
    ones = torch.ones(indices.shape, dtype=torch.float64)
    return torch.zeros(len(indices), n, dtype=torch.float64).scatter_add_(1, indices, ones)


def _means(values: Float[Tensor, "example number"], weights: Float[Tensor, "draw example"]) -> Tensor:
    return (weights @ values.nan_to_num(0.0)) / (weights @ (~values.isnan()).double())


def _widening(values: Float[Tensor, "example number"], confidence: float) -> Float[Tensor, "number"]:
    """The factor by which resampled means of normal values vary too little; NaN for a single value."""
    from scipy.stats import t

    n, tail = (~values.isnan()).sum(0).double(), (1 + confidence) / 2
    student = torch.from_numpy(t.ppf(tail, (n - 1).numpy()))
    return (n / (n - 1)).sqrt() * student / NormalDist().inv_cdf(tail)
