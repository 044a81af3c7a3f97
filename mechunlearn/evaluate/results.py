"""`Result`, which every test returns: a number with its examples, chance level and meaning; and results over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.curve import Curve
from mechunlearn.intervals import bootstrap, bounded, ends, resampled, uniform_weights

LIMITS = {"share": (0.0, 1.0), "difference of shares": (-1.0, 1.0)}
"""Unit -> between what its numbers lie."""


@dataclass(frozen=True, eq=False)
class Result:
    """The result of a test: a number that is the mean of one value per example."""

    per_example: Float[Tensor, "example"]
    """One value per example."""
    sense: str
    """What was measured, such as "argmax over the candidates"."""
    chance: float | None = None
    """What guessing would give, in the same unit; for a loss, a uniform guess."""
    unit: str = ""
    """A key of `LIMITS`, such as "share", which the report plots as bars, or another unit such as "nats per token"."""
    names: tuple[str, ...] = ()
    """The fact that each example is about."""
    curve: Curve | None = None
    """What an attack reaches with each budget (steps, examples, bits), or a probe at each layer."""
    control: "Result | None" = None
    """The same test where there is nothing to find, such as a probe for random labels."""

    @classmethod
    def strongest(
        cls,
        curve: Curve,
        sense: str,
        *,
        unit: str = "share",
        names: tuple[str, ...] = (),
        control: "Result | None" = None,
    ) -> "Result":
        """The point of a curve with the highest mean (the first of equal ones): the worst case of an attack."""
        best = int(curve.mean.argmax())
        return cls(curve.per_prompt[:, best], sense, curve.chance, unit, names, curve, control)

    @property
    def value(self) -> float:
        """The mean over examples."""
        return float(self.per_example.mean())

    @property
    def limits(self) -> tuple[float, float] | None:
        """Between what the values lie: limits of the unit, 0 and 1 for yes/no values; None where there are none."""
        values = self.per_example
        limits = LIMITS.get(self.unit, (0.0, 1.0) if bool(((values == 0) | (values == 1)).all()) else None)
        inside = limits is not None and bool(((values >= limits[0] - 1e-4) & (values <= limits[1] + 1e-4)).all())
        return limits if inside else None

    def interval(self, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """The interval of the mean over examples.

        For shares and yes/no values one that covers near 0 and 1 too, and has a width there
        (`mechunlearn.intervals.bounded`); a percentile bootstrap for others.
        """
        low, high = _interval(self.per_example, self.limits, confidence, draws, seed)
        return float(low), float(high)

    def difference(
        self, other: "Result", *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> tuple[float, float, float]:
        """This result minus the other on the same examples: the mean and its interval, paired."""
        if len(self.per_example) != len(other.per_example) or self.names != other.names:
            raise ValueError("expected results on the same examples, got different ones: use the same task for both.")
        values = self.per_example.double() - other.per_example.double()
        low, high = _interval(values, between(self, other), confidence, draws, seed)
        return float(values.mean()), float(low), float(high)

    def __format__(self, spec: str) -> str:
        """The value in this format (`f"{result:.3f}"`); without one, all that `repr` says."""
        return format(self.value, spec) if spec else repr(self)

    def __repr__(self) -> str:
        low, high = self.interval()
        chance = "" if self.chance is None else f", chance {self.chance:.3f}"
        n = len(self.per_example)
        unit = f" {self.unit}" if self.unit not in ("", "share") else ""
        return f"Result({self.value:.3f}{unit} [{low:.3f}, {high:.3f}] over {n} examples; {self.sense}{chance})"


def _interval(
    values: Float[Tensor, "example"], limits: tuple[float, float] | None, confidence: float, draws: int, seed: int
) -> tuple[Tensor, Tensor]:
    if limits is None:
        return bootstrap(values, confidence=confidence, draws=draws, seed=seed)
    return bounded(values, limits, confidence=confidence, draws=draws, seed=seed)


def between(one: Result, other: Result) -> tuple[float, float] | None:
    """Between what their difference lies."""
    if one.limits is None or other.limits is None:
        return None
    return one.limits[0] - other.limits[1], one.limits[1] - other.limits[0]


def pooled(results: Sequence[Result]) -> Result:
    """One result from several seeds: the mean of each example over seeds, or all examples if seeds have different ones.

    Curves and controls are pooled in the same way; a curve is left out where seeds differ in its points. The interval
    of a pooled result is over examples alone: `interval_over_seeds` has that over seeds too.
    """
    first = results[0]
    if len(results) == 1:
        return first
    same = all((r.names, len(r.per_example)) == (first.names, len(first.per_example)) for r in results)
    controls = [r.control for r in results if r.control is not None]
    curves, curve = [r.curve for r in results if r.curve is not None], None
    if len(curves) == len(results) and len({c.points for c in curves}) == 1:
        averaged = same and len({c.per_prompt.shape for c in curves}) == 1
        curve = replace(curves[0], per_prompt=_merged([c.per_prompt for c in curves], averaged))
    return Result(
        _merged([r.per_example for r in results], same),
        first.sense,
        first.chance,
        first.unit,
        first.names if same else tuple(name for r in results for name in r.names),
        curve,
        None if len(controls) < len(results) else pooled(controls),
    )


def _merged(values: Sequence[Tensor], same: bool) -> Tensor:
    numbers = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]
    return torch.stack(numbers).mean(0) if same else torch.cat(numbers)


def interval_over_seeds(
    results: Sequence[Result], seeds: Sequence[int], *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The interval of the mean over seeds, with facts and seeds drawn anew. One result has its own interval.

    Each draw takes a fact with all of its examples and a seed with all of its results (Owen 2007,
    https://arxiv.org/abs/0712.1111; such intervals are a little too wide rather than too narrow). Facts are told apart
    by name, or by place where there are no names; of shares and yes/no values, one fact more counts that was not seen.
    Two or three seeds say little about how much seeds differ, and no interval can mend that.
    """
    if len(results) == 1:
        return results[0].interval(confidence=confidence, draws=draws, seed=seed)
    values, facts = [r.per_example[:, None] for r in results], [facts_of(r) for r in results]
    limits = results[0].limits if len({r.limits for r in results}) == 1 else LIMITS.get(results[0].unit)
    low, high = ends_over_seeds(values, facts, seeds, limits, confidence=confidence, draws=draws, seed=seed)
    return float(low[0]), float(high[0])


def ends_over_seeds(
    values: Sequence[Float[Tensor, "_ number"]],
    facts: Sequence[Sequence[str]],
    seeds: Sequence[int],
    limits: tuple[float, float] | None,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[Float[Tensor, "number"], Float[Tensor, "number"]]:
    """The interval of the mean over results of their means over examples (`values`), with facts and seeds drawn anew.

    Between limits, facts are weighed as in `mechunlearn.intervals.bounded`, with one that was not seen; without them,
    they are drawn with replacement.
    """
    place = {name: i for i, name in enumerate(dict.fromkeys(name for names in facts for name in names))}
    order = {number: i for i, number in enumerate(dict.fromkeys(seeds))}
    # Facts and seeds are drawn once for all results: a fact that two of them share comes equally often in both.
    of_facts = resampled(len(place), draws, seed) if limits is None else uniform_weights(len(place) + 1, draws, seed)
    of_seeds = resampled(len(order), draws, seed + 1)
    total = torch.zeros(draws, values[0].shape[1], dtype=torch.float64)
    weight = torch.zeros_like(total)
    for group, names, number in zip(values, facts, seeds, strict=True):
        drawn = of_facts[:, [place[name] for name in names]]
        means = (drawn @ group.double()) / drawn.sum(1, keepdim=True)
        # NaN: no fact of this result was drawn, or the number was not measured. It is left out of that draw.
        times = of_seeds[:, order[number], None] * (~means.isnan())
        total += times * means.nan_to_num(0.0)
        weight += times
    means = total / weight
    if limits is None:
        return ends(means, confidence)
    unseen = of_facts[:, -1:] / of_facts.shape[1]
    least, most = (means + unseen * (limit - means) for limit in limits)
    return ends(least, confidence)[0], ends(most, confidence)[1]


def facts_of(result: Result) -> tuple[str, ...]:
    """The fact of each example: its name, or its place where there are no names."""
    return result.names or tuple(map(str, range(len(result.per_example))))
