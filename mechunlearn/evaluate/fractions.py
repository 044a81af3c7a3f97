"""Fractions of the knowledge that an edit took away: what an attack recovers or teaches, and what a test finds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.evaluate.results import Result
from mechunlearn.intervals import ends, resampled

Results: TypeAlias = Result | Mapping[int, Result]
"""A result, or one for each seed."""


@dataclass(frozen=True)
class Fraction:
    """A fraction with its interval; NaN where it is undefined."""

    value: float
    low: float
    high: float
    reason: str = ""
    """Why it is undefined."""

    def __format__(self, spec: str) -> str:
        """The value in this format (`f"{fraction:.3f}"`); without one, value and interval."""
        return format(self.value, spec) if spec else str(self)

    def __str__(self) -> str:
        return "undefined" if isnan(self.value) else f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Recovery:
    """What an attack brought back, in units of the original model's advantage over one that never knew."""

    recovered: Fraction
    """(attacked - unlearned) / (original - never knew)."""
    taught: Fraction
    """(attacked never-knew - never knew) / (original - never knew): what the same attack teaches a model anew."""
    net: Fraction
    """recovered - taught."""


def recovery(
    attacked: Results,
    unlearned: Results,
    original: Results,
    *,
    never_knew: Results | None = None,
    attacked_never_knew: Results | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Recovery:
    """The share of lost knowledge that an attack recovers, the share that it teaches anew, and their difference.

        recovered = (attacked - unlearned) / (original - never knew)
        taught    = (attacked never-knew - never knew) / (original - never knew)
        net       = recovered - taught

    At 0 the attack changes nothing; at 1 it adds as much as the original has over a model that never knew. Fractions
    are not clipped: below 0 the attack made things worse, and above 1 it added more than that, as after an edit that
    pushed the answer below what an ignorant model says. A net of 0 says that the attack is no better on the edited
    model than on one with nothing to recover. It does not say that the edited model knows nothing: `unlearned` says
    what it knew before the attack, and `left_fraction` compares the two models after it.

    Means are over the facts and seeds of `attacked`. The interval is a percentile bootstrap that draws facts and seeds
    anew, the same ones in all five results; one seed says nothing about others. Without `never_knew`, the chance level
    of `original` is used; without `attacked_never_knew`, `taught` and `net` are undefined. A fraction is undefined
    unless the interval of its denominator lies above 0.

    `recovered` is the standard report of relearning studies (Deeb & Roger 2024, https://arxiv.org/abs/2410.08827).
    """
    options = (attacked, confidence, draws, seed)
    ignorant = _never_knew(never_knew, original)
    known, gain = ((1, original), (-1, ignorant)), ((1, attacked), (-1, unlearned))
    recovered = _fraction(gain, known, *options)
    if attacked_never_knew is None or never_knew is None:
        missing = undefined("no model that never knew")
        return Recovery(recovered, missing, missing)
    taught = ((1, attacked_never_knew), (-1, ignorant))
    net = (*gain, *((-sign, results) for sign, results in taught))
    return Recovery(recovered, _fraction(taught, known, *options), _fraction(net, known, *options))


def left_fraction(
    found: Results,
    original: Results,
    *,
    never_knew: Results | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Fraction:
    """The share of the knowledge that a test or attack finds in an edited model: 0, as in one that never knew; 1, all.

        left = (found - never knew) / (original - never knew)

    All three are results of the same test or attack; the interval is as in `recovery`. The fraction is undefined where
    the test cannot tell the original from a model that never knew, as after an attack that teaches.
    """
    ignorant = _never_knew(never_knew, original)
    known = ((1, original), (-1, ignorant))
    return _fraction(((1, found), (-1, ignorant)), known, found, confidence, draws, seed)


Terms: TypeAlias = Sequence[tuple[int, Results]]
"""The terms of a sum: results with their signs."""


def _fraction(above: Terms, below: Terms, tested: Results, confidence: float, draws: int, seed: int) -> Fraction:
    """The fraction of two sums, as means over the facts and seeds of `tested`."""
    facts = _TestedFacts.of(tested)
    # Row 0 is the estimate, in which each fact and seed counts once; the rows below it are the draws. All terms share
    # the draws: differences are paired.
    weights = torch.cat([facts.tested[None].double(), facts.weights(draws, seed)])
    numerator, denominator = (facts.mean(terms, weights) for terms in (above, below))
    low, high = ends(denominator[1:], confidence)
    if isnan(denominator[0]):
        return undefined("no model that never knew, and no chance level")
    # A denominator that may be 0 or below would make draws of any size and either sign.
    if not low > 0:
        difference = f"{float(denominator[0]):.3f} [{float(low):.3f}, {float(high):.3f}]"
        return undefined(f"original minus never knew is not clearly above 0: {difference}")
    fractions = numerator / denominator
    low, high = ends(fractions[1:], confidence)
    return Fraction(float(fractions[0]), float(low), float(high))


@dataclass(frozen=True, eq=False)
class _TestedFacts:
    """Which facts were tested with which seed."""

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    tested: Bool[Tensor, "seed fact"]

    @classmethod
    def of(cls, results: Results) -> "_TestedFacts":
        by_seed = {seed: _by_fact(result) for seed, result in _by_seed(results).items()}
        names = tuple(dict.fromkeys(name for values in by_seed.values() for name in values))
        tested = torch.tensor([[name in values for name in names] for values in by_seed.values()])
        return cls(names, tuple(by_seed), tested)

    def weights(self, draws: int, seed: int) -> Float[Tensor, "draw seed fact"]:
        """How often each fact and seed is drawn, both with replacement."""
        facts = resampled(len(self.names), draws, seed)
        seeds = resampled(len(self.seeds), draws, seed + 1)
        return seeds[:, :, None] * facts[:, None] * self.tested

    def values(self, results: Results) -> Float[Tensor, "seed fact"]:
        """One value per seed and fact, 0 where it was not tested; the mean over seeds of what ran with other seeds."""
        by_seed = {seed: _by_fact(result) for seed, result in _by_seed(results).items()}
        rows = []
        for seed, tested in zip(self.seeds, self.tested.tolist(), strict=True):
            sources = [by_seed[seed]] if set(self.seeds) <= set(by_seed) else list(by_seed.values())
            chosen = zip(self.names, tested, strict=True)
            rows.append([_mean_of_fact(sources, name) if is_tested else 0.0 for name, is_tested in chosen])
        return torch.tensor(rows, dtype=torch.float64)

    def mean(self, terms: Terms, weights: Float[Tensor, "draw seed fact"]) -> Float[Tensor, "draw"]:
        values = torch.stack([sign * self.values(results) for sign, results in terms]).sum(0)
        return (weights * values).sum((1, 2)) / weights.sum((1, 2))


def _by_seed(results: Results) -> Mapping[int, Result]:
    return {0: results} if isinstance(results, Result) else results


def _by_fact(result: Result) -> dict[str, float]:
    """The mean of each fact. Prompts of one name are one fact; without names, each prompt is."""
    values_of: dict[str, list[float]] = {}
    values = result.per_example.tolist()
    for name, value in zip(result.names or map(str, range(len(values))), values, strict=True):
        values_of.setdefault(name, []).append(value)
    return {name: sum(of_fact) / len(of_fact) for name, of_fact in values_of.items()}


def _mean_of_fact(sources: Sequence[Mapping[str, float]], name: str) -> float:
    of_fact = [values[name] for values in sources if name in values]
    if not of_fact:
        raise ValueError(f"expected results on the same facts, got one without {name!r}: use the same task for all.")
    return sum(of_fact) / len(of_fact)


def _never_knew(never_knew: Results | None, original: Results) -> Results:
    """The results of a model that never knew, or in its place results at the chance level (NaN if there is none)."""
    if never_knew is not None:
        return never_knew
    at_chance = {}
    for seed, result in _by_seed(original).items():
        chance = torch.full_like(result.per_example.double(), nan if result.chance is None else result.chance)
        at_chance[seed] = replace(result, per_example=chance)
    return at_chance


def undefined(reason: str) -> Fraction:
    return Fraction(nan, nan, nan, reason)
