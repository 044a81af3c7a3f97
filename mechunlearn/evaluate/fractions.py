"""How much of what an edit took away is there: after an attack, beyond what the attack teaches; or under a test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """A fraction with its interval."""

    value: float
    low: float
    high: float
    reason: str = ""
    """Why there is no number (NaN)."""

    def __format__(self, spec: str) -> str:
        """The value in this format (`f"{fraction:.3f}"`); without one, value and interval."""
        return format(self.value, spec) if spec else str(self)

    def __str__(self) -> str:
        return "undefined" if isnan(self.value) else f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Recovery:
    """What an attack brought back, as fractions of original minus never knew."""

    recovered: Fraction
    """(attacked - unlearned) / (original - never knew)."""
    taught: Fraction
    """(attacked never-knew - never knew) / (original - never knew): what the same attack teaches."""
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
    """What an attack recovers of what an edit took away, what it teaches, and the difference of the two.

        recovered = (attacked - unlearned) / (original - never knew)
        taught    = (attacked never-knew - never knew) / (original - never knew)
        net       = recovered - taught

    0: the attack changes nothing; 1: it adds as much as the model once had over one that never knew. Fractions are not
    clipped. Below 0 the attack made things worse. Above 1 it adds more than that, as when the edit pushed the answer
    below what a model says that never knew it; such an edit also makes `recovered` positive for an attack that only
    stops the model from avoiding the answer. A net of 0 says that this attack is no better on the edited model than on
    one with nothing to recover, not that the edited model knows nothing: `unlearned` says what it knew before the
    attack, and `left_fraction` compares the two models after it.

    Means are over the facts that the attack was tested on, and its seeds; the interval is a percentile bootstrap over
    both (the same facts and seeds resampled in all five results). One seed says nothing about other seeds.
    Without `never_knew`, the chance level of `original` stands in; without `attacked_never_knew`, `taught` and `net`
    are undefined. A fraction is NaN, with the reason, unless the interval of its denominator lies above 0.

    After the standard report of relearning studies (such as Deeb & Roger 2024, https://arxiv.org/abs/2410.08827), where
    the last two terms are missing. ValueError if the other results lack facts that the attack was tested on.
    """
    options = (attacked, confidence, draws, seed)
    never = _never(never_knew, original)
    known, gain = ((1, original), (-1, never)), ((1, attacked), (-1, unlearned))
    recovered = _fraction(gain, known, *options)
    if attacked_never_knew is None or never_knew is None:
        missing = _undefined("no model that never knew")
        return Recovery(recovered, missing, missing)
    lesson = ((1, attacked_never_knew), (-1, never))
    net = (*gain, *((-sign, each) for sign, each in lesson))
    return Recovery(recovered, _fraction(lesson, known, *options), _fraction(net, known, *options))


def left_fraction(
    found: Results,
    original: Results,
    *,
    never_knew: Results | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Fraction:
    """How much a test or attack finds in an edited model, from 0 (as in one that never knew) to 1 (as in the original).

        left = (found - never knew) / (original - never knew)

    all three by the same test, or after the same attack; for the rest see `recovery`. It is undefined where the test
    cannot tell the original from a model that never knew, as after an attack that teaches.
    """
    never = _never(never_knew, original)
    known = ((1, original), (-1, never))
    return _fraction(((1, found), (-1, never)), known, found, confidence, draws, seed)


Terms: TypeAlias = Sequence[tuple[int, Results]]
"""Results with their signs."""


def _fraction(above: Terms, below: Terms, tested: Results, confidence: float, draws: int, seed: int) -> Fraction:
    """Of two sums, over the facts and seeds of `tested`."""
    facts = _Facts.of(tested)
    weights = facts.weights(draws, seed)
    numerator, denominator = (
        torch.cat([_sum(facts, terms, every) for every in (facts.once, weights)]) for terms in (above, below)
    )
    low, high = ends(denominator[1:], confidence)
    if isnan(denominator[0]):
        return _undefined("no model that never knew, and no chance level")
    if not low > 0:
        difference = f"{float(denominator[0]):.3f} [{float(low):.3f}, {float(high):.3f}]"
        return _undefined(f"original minus never knew is not clearly above 0: {difference}")
    drawn = numerator / denominator
    low, high = ends(drawn[1:], confidence)
    return Fraction(float(drawn[0]), float(low), float(high))


@dataclass(frozen=True, eq=False)
class _Facts:
    """Which facts were tested with which seed."""

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    tested: Bool[Tensor, "seed fact"]

    @classmethod
    def of(cls, results: Results) -> "_Facts":
        found = {seed: _by_fact(result) for seed, result in _by_seed(results).items()}
        names = tuple(dict.fromkeys(name for values in found.values() for name in values))
        tested = torch.tensor([[name in values for name in names] for values in found.values()])
        return cls(names, tuple(found), tested)

    @property
    def once(self) -> Float[Tensor, "1 seed fact"]:
        """Each fact and seed with the same weight."""
        return self.tested[None].double()

    def weights(self, draws: int, seed: int) -> Float[Tensor, "draw seed fact"]:
        """How often each was drawn: facts with replacement, and seeds with replacement."""
        facts = resampled(len(self.names), draws, seed)
        seeds = resampled(len(self.seeds), draws, seed + 1)
        return seeds[:, :, None] * facts[:, None] * self.tested

    def values(self, results: Results) -> Float[Tensor, "seed fact"]:
        """One value per seed and fact, 0 where it was not tested; the mean over seeds of what ran with other seeds."""
        found = {seed: _by_fact(result) for seed, result in _by_seed(results).items()}
        rows = []
        for seed, tested in zip(self.seeds, self.tested.tolist(), strict=True):
            sources = [found[seed]] if set(self.seeds) <= set(found) else list(found.values())
            chosen = zip(self.names, tested, strict=True)
            rows.append([_mean(sources, name) if is_tested else 0.0 for name, is_tested in chosen])
        return torch.tensor(rows, dtype=torch.float64)


def _sum(facts: _Facts, terms: Terms, weights: Float[Tensor, "draw seed fact"]) -> Float[Tensor, "draw"]:
    values = torch.stack([sign * facts.values(results) for sign, results in terms]).sum(0)
    return (weights * values).sum((1, 2)) / weights.sum((1, 2))


def _by_seed(results: Results) -> Mapping[int, Result]:
    return {0: results} if isinstance(results, Result) else results


def _by_fact(result: Result) -> dict[str, float]:
    """Prompts of one name are one fact; without names, each prompt is."""
    found: dict[str, list[float]] = {}
    values = result.per_example.tolist()
    for name, value in zip(result.names or map(str, range(len(values))), values, strict=True):
        found.setdefault(name, []).append(value)
    return {name: sum(each) / len(each) for name, each in found.items()}


def _mean(sources: Sequence[Mapping[str, float]], name: str) -> float:
    found = [values[name] for values in sources if name in values]
    if not found:
        raise ValueError(f"expected results on the same facts, got one without {name!r}: use the same task for all.")
    return sum(found) / len(found)


def _never(never_knew: Results | None, original: Results) -> Results:
    """Chance, where there is no model that never knew."""
    if never_knew is not None:
        return never_knew
    found = _by_seed(original)
    chance = {seed: nan if each.chance is None else each.chance for seed, each in found.items()}
    return {
        seed: Result(torch.full_like(each.per_example.double(), chance[seed]), each.sense, names=each.names)
        for seed, each in found.items()
    }


def _undefined(reason: str) -> Fraction:
    return Fraction(nan, nan, nan, reason)
