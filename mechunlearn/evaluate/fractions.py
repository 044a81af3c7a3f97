"""Fractions of the knowledge that an edit took away: what an attack recovers or teaches, and what a test finds."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isnan, nan
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.evaluate.results import Result
from mechunlearn.intervals import ends, resampled, uniform_weights

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
    """What an attack brought back, in units of what the original model has over one without the knowledge."""

    recovered: Fraction
    """(attacked - unlearned) / (original - floor)."""
    taught: Fraction
    """(attacked never-knew - never knew) / (original - floor): what the same attack teaches a model anew."""
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

        recovered = (attacked - unlearned) / (original - floor)
        taught    = (attacked never-knew - never knew) / (original - floor)
        net       = recovered - taught

    The floor is that of `left_fraction`. At 0 the attack changes nothing; at 1 it adds as much as the original has over
    a model without the knowledge. Fractions are not clipped: below 0 the attack made things worse, and above 1 it added
    more than that, as after an edit that pushed the answer below the floor. A net of 0 says that the attack is no
    better on the edited model than on one with nothing to recover. It does not say that the edited model knows nothing:
    `unlearned` says what it knew before the attack, and `left_fraction` compares the two models after it.

    Means are over the facts and seeds of `attacked`; intervals are as in `left_fraction`. Without
    `attacked_never_knew`, `taught` and `net` are undefined.

    `recovered` is the standard report of relearning studies (Deeb & Roger 2024, https://arxiv.org/abs/2410.08827).
    """
    fraction = partial(_fraction, original, floor_of(original, never_knew), attacked, confidence, draws, seed)
    gain = ((1, attacked), (-1, unlearned))
    if attacked_never_knew is None or never_knew is None:
        missing = undefined("no model that never knew")
        return Recovery(fraction(gain), missing, missing)
    taught = ((1, attacked_never_knew), (-1, never_knew))
    net = (*gain, *((-sign, results) for sign, results in taught))
    return Recovery(fraction(gain), fraction(taught), fraction(net))


def left_fraction(
    found: Results,
    original: Results,
    *,
    never_knew: Results | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Fraction:
    """The share of the knowledge that a test or attack finds in a model: 0, as in one without it; 1, all of it.

        left = (found - floor) / (original - floor)

    The floor is what a model without the knowledge does: the larger of chance and of what `never_knew`, a model that
    never knew the facts, does. One that knows nothing guesses, and so is at chance; one that never saw the answer may
    never say it, and so be below. Below 0, less is found than in such models (see `avoidance_fraction`).

    All three are results of the same test or attack. The interval draws facts and seeds anew, the same ones for all
    results (one seed says nothing about others); of results within limits, such as shares, it counts one more fact
    that was not seen, as in `mechunlearn.intervals.bounded`; and where chance is the floor, each draw has a guesser's
    luck with as many facts. The fraction is undefined where the test cannot tell the original from the floor, as after
    an attack that teaches.
    """
    floor = floor_of(original, never_knew)
    left = _fraction(original, floor, found, confidence, draws, seed, ((1, found), (-1, floor)))
    return Fraction(1.0, 1.0, 1.0) if found is original and not isnan(left.value) else left


def avoidance_fraction(
    found: Results,
    original: Results,
    *,
    never_knew: Results | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Fraction:
    """How far a model is below models without the knowledge, in units of what the original has over them.

        avoided = (lower floor - found) / (original - lower floor)

    The lower floor is the smaller of chance and of what `never_knew` does. A model that is clearly below it (the
    interval, made as for `left_fraction`, lies above 0) avoids the answer, and so still tells it apart.
    """
    floor = floor_of(original, never_knew, lower=True)
    return _fraction(original, floor, found, confidence, draws, seed, ((-1, found), (1, floor)))


@dataclass(frozen=True, eq=False)
class Floor:
    """What a model without the knowledge does under a test."""

    results: Results
    is_chance: bool

    @property
    def value(self) -> float:
        """The mean over facts and seeds; NaN without a model that never knew and without a chance level."""
        means = [result.value for result in _by_seed(self.results).values()]
        return sum(means) / len(means)


def floor_of(original: Results, never_knew: Results | None, *, lower: bool = False) -> Floor:
    """The larger of chance and of what the model that never knew does, or the smaller; what there is of the two."""
    at_chance = {}
    for seed, result in _by_seed(original).items():
        values = torch.full_like(result.per_example.double(), nan if result.chance is None else result.chance)
        at_chance[seed] = replace(result, per_example=values)
    chance = Floor(at_chance, is_chance=True)
    if never_knew is None:
        return chance
    never = Floor(never_knew, is_chance=False)
    return chance if (chance.value < never.value if lower else chance.value > never.value) else never


Terms: TypeAlias = Sequence[tuple[int, Results | Floor]]
"""The terms of a sum: results with their signs."""


def _fraction(
    original: Results, floor: Floor, tested: Results, confidence: float, draws: int, seed: int, above: Terms
) -> Fraction:
    """The sum of these terms, divided by original minus floor, as means over the facts and seeds of `tested`."""
    facts = _TestedFacts.of(tested)
    weights, unseen, luck = facts.drawn(draws, seed, chance=floor.value if floor.is_chance else None)
    # Row 0 is the estimate, in which each fact and seed counts once; the rows below it are the draws. All terms share
    # the draws: differences are paired.
    denominator = facts.mean(((1, original), (-1, floor)), weights, luck)
    if isnan(denominator[0]):
        return undefined("no model that never knew, and no chance level")
    low, high = ends(denominator[1:], confidence)
    # A denominator that may be 0 or below would make draws of any size and either sign.
    if not low > 0:
        difference = f"{float(denominator[0]):.3f} [{float(low):.3f}, {float(high):.3f}]"
        return undefined(f"original minus floor is not clearly above 0: {difference}")
    fractions = facts.mean(above, weights, luck) / denominator
    least = most = fractions
    first, *others = {result.limits for result in _by_seed(_results(above[0][1])).values()}
    if first is not None and not others:
        # One fact more, in which the tested model, of which the first term is, is at either limit.
        signed, sign = facts.mean(above[:1], weights, luck), above[0][0]
        moved = [fractions + unseen * (sign * limit - signed) / denominator for limit in first]
        least, most = moved[::sign]
    return Fraction(float(fractions[0]), float(ends(least[1:], confidence)[0]), float(ends(most[1:], confidence)[1]))


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

    def drawn(
        self, draws: int, seed: int, *, chance: float | None
    ) -> tuple[Float[Tensor, "draw seed fact"], Float[Tensor, "draw"], Float[Tensor, "draw"]]:
        """Weights of facts and seeds; the weight of a fact not seen; by how much a guesser is off. Row 0: no draw."""
        count = len(self.names)
        *of_facts, unseen = uniform_weights(count + 1, draws, seed).split([count, 1], dim=1)
        of_seeds = resampled(len(self.seeds), draws, seed + 1)
        weights = of_seeds[:, :, None] * of_facts[0][:, None] * self.tested
        luck = torch.zeros(draws, dtype=torch.float64)
        if chance is not None and 0 < chance < 1:
            guesser = torch.Generator().manual_seed(operator.index(seed) + 2)
            right = torch.rand(draws, count, generator=guesser, dtype=torch.float64) < chance
            luck = right.double().mean(1) - chance
        once, none = self.tested[None].double(), torch.zeros(1, dtype=torch.float64)
        return torch.cat([once, weights]), torch.cat([none, unseen[:, 0] / (count + 1)]), torch.cat([none, luck])

    def values(self, results: Results) -> Float[Tensor, "seed fact"]:
        """One value per seed and fact, 0 where it was not tested; the mean over seeds of what ran with other seeds."""
        by_seed = {seed: _by_fact(result) for seed, result in _by_seed(results).items()}
        rows = []
        for seed, tested in zip(self.seeds, self.tested.tolist(), strict=True):
            sources = [by_seed[seed]] if set(self.seeds) <= set(by_seed) else list(by_seed.values())
            chosen = zip(self.names, tested, strict=True)
            rows.append([_mean_of_fact(sources, name) if is_tested else 0.0 for name, is_tested in chosen])
        return torch.tensor(rows, dtype=torch.float64)

    def mean(
        self, terms: Terms, weights: Float[Tensor, "draw seed fact"], luck: Float[Tensor, "draw"]
    ) -> Float[Tensor, "draw"]:
        values = torch.stack([sign * self.values(_results(term)) for sign, term in terms]).sum(0)
        guessed = sum(sign for sign, term in terms if isinstance(term, Floor) and term.is_chance)
        return (weights * values).sum((1, 2)) / weights.sum((1, 2)) + guessed * luck


def _results(term: Results | Floor) -> Results:
    return term.results if isinstance(term, Floor) else term


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


def undefined(reason: str) -> Fraction:
    return Fraction(nan, nan, nan, reason)
