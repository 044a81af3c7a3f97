"""Intervals over facts and seeds together."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.evaluate.result import Result, wilson
from mechunlearn.intervals import ends, resampled


def interval_over_seeds(
    results: Sequence[Result], seeds: Sequence[int], *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean over seeds of each seed's mean, both facts and seeds being drawn anew.

    One result has its own interval (`Result.interval`). For several, each draw takes as many facts and as many seeds
    with replacement, a fact with all of its examples and a seed with all of its results (Owen 2007,
    https://arxiv.org/abs/0712.1111, whose draws are a little too wide rather than too narrow); results of one seed are
    kept together, and facts are told apart by name, or by place where there are no names. Yes/no values, which could
    all be equal, never get less than Wilson's interval over the facts. Two or three seeds say little about how much
    seeds differ, and no interval can mend that.
    """
    if len(results) == 1:
        return results[0].interval(confidence=confidence, draws=draws, seed=seed)
    means = resampled_means(
        [r.per_example[:, None] for r in results], [facts_of(r) for r in results], seeds, draws=draws, seed=seed
    )
    low, high = (float(end[0]) for end in ends(means, confidence))
    if not all(bool(((r.per_example == 0) | (r.per_example == 1)).all()) for r in results):
        return low, high
    facts = {fact for r in results for fact in facts_of(r)}
    least = wilson(sum(r.value for r in results) / len(results), len(facts), confidence)
    return min(low, least[0]), max(high, least[1])


def resampled_means(
    values: Sequence[Float[Tensor, "_ number"]],
    facts: Sequence[Sequence[str]],
    seeds: Sequence[int],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Float[Tensor, "draw number"]:
    """The mean over groups of their means over examples, for each draw of facts and seeds.

    One group of values for each result, with the facts that its examples are about and its seed. A group that no drawn
    fact is in is left out of that draw, and so are numbers that are NaN in it.
    """
    place = {name: i for i, name in enumerate(dict.fromkeys(name for names in facts for name in names))}
    order = {number: i for i, number in enumerate(dict.fromkeys(seeds))}
    of_facts = resampled(len(place), draws, seed)
    of_seeds = resampled(len(order), draws, seed + 1)
    total = torch.zeros(draws, values[0].shape[1], dtype=torch.float64)
    weight = torch.zeros_like(total)
    for group, names, number in zip(values, facts, seeds, strict=True):
        drawn = of_facts[:, [place[name] for name in names]]
        means = (drawn @ group.double()) / drawn.sum(1, keepdim=True)
        times = of_seeds[:, order[number], None] * (~means.isnan())
        total += times * means.nan_to_num(0.0)
        weight += times
    return total / weight


def facts_of(result: Result) -> tuple[str, ...]:
    """The name of each example, or its place."""
    return result.names or tuple(map(str, range(len(result.per_example))))
