"""Exact scores of some components, an estimate of all, and what the difference says about those not verified."""

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import ComponentMask, ComponentScores

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, repr=False)
class Verified:
    """Exact scores of candidates; `.top(...)` selects by them."""

    scores: ComponentScores
    """The candidates' exact scores."""
    estimate: ComponentScores
    """Every component's estimate."""
    sampled: ComponentScores | None
    """Exact scores of a random sample of the components that were not candidates; None without one."""
    by: Callable[[Tensor], Tensor] = torch.abs
    """What ranks scores."""

    def top(
        self,
        *,
        k: int | None = None,
        fraction: float | None = None,
        threshold: float | None = None,
        parameters: int | None = None,
    ) -> ComponentMask:
        """The candidates that score highest exactly, by one of the rules of `ComponentScores.top`.

        `k` and `fraction` count candidates. Take fewer than there are, so that the screen's order does not decide.
        """
        return self.scores.top(k=k, fraction=fraction, threshold=threshold, parameters=parameters, by=self.by)

    def missed(self, threshold: float | None = None, *, confidence: float = 0.95) -> "Missed":
        """How many dropped components would rank higher than `threshold` (default: than the lowest candidate).

        Give the rank of the last one that you select: `threshold=abs(scores of the mask).min()`.
        """
        if threshold is None:
            threshold = float(self.by(self.scores.tensor).min())
        dropped = len(self.estimate) - len(self.scores)
        ranks = self.by(self.sampled.tensor) if self.sampled is not None else torch.zeros(0, dtype=torch.float64)
        found = int((ranks > threshold).sum())
        largest = float(ranks.max()) if len(ranks) else float("nan")
        at_most = _at_most(found, len(ranks), dropped, confidence)
        return Missed(threshold, dropped, len(ranks), found, largest, at_most, confidence)

    @property
    def error(self) -> "DataFrame":
        """Estimate against exact score, for the candidates and for the sample of the others: a row each.

        Bias is the mean of estimate - exact, `rms` the root of the mean square of it, `correlation` Pearson's, `rank
        correlation` Spearman's of what `by` ranks, `same sign` a share. NaN where one component or equal values
        have no correlation. Candidates were chosen by their estimate, so theirs tends to be too large.
        """
        import pandas as pd

        groups = {"candidates": self.scores} | ({"sample": self.sampled} if self.sampled is not None else {})
        rows = {name: self._error(scores) for name, scores in groups.items()}
        return pd.DataFrame(list(rows.values()), index=pd.Index(list(rows), name="of"))

    def to_frame(self) -> "DataFrame":
        """One row per component verified: exact score, estimate, their difference, candidate or sample."""
        import pandas as pd

        groups = [("candidate", self.scores)] + ([("sample", self.sampled)] if self.sampled is not None else [])
        rows = [(str(c), scores[c], self.estimate[c], kind) for kind, scores in groups for c in scores]
        frame = pd.DataFrame(rows, columns=["component", "exact", "estimate", "verified as"]).set_index("component")
        frame.insert(2, "error", frame["estimate"] - frame["exact"])
        return frame.sort_values("exact", key=abs, ascending=False, kind="stable")

    def __repr__(self) -> str:
        error = self.error.loc["candidates"]
        best = sorted(self.scores.items(), key=lambda pair: -abs(pair[1]))[:5]
        shown = ", ".join(f"{component}: {value:+.3g}" for component, value in best)
        settings = self.scores.settings
        return (
            f"Verified({len(self.scores)} of {len(self.estimate)} components, {settings['estimate']} then "
            f"{settings['verify']}; {shown}; rms error of the estimate {error['rms']:.3g}, rank correlation "
            f"{error['rank correlation']:.2f}; {self.missed()})"
        )

    def _error(self, scores: ComponentScores) -> dict[str, float | int]:
        exact = scores.tensor.double()
        estimate = torch.tensor([self.estimate[component] for component in scores], dtype=torch.float64)
        difference = estimate - exact
        return {
            "components": len(scores),
            "bias": float(difference.mean()),
            "rms": float(difference.pow(2).mean().sqrt()),
            "correlation": _correlation(estimate, exact),
            "rank correlation": _correlation(_ranks(self.by(estimate)), _ranks(self.by(exact))),
            "same sign": float((estimate.sign() == exact.sign()).double().mean()),
        }


@dataclass(frozen=True)
class Missed:
    """What the screen may have dropped, judged by a random sample of what it dropped."""

    threshold: float
    """Dropped components that rank higher than this count as missed."""
    dropped: int
    """How many components were dropped."""
    sampled: int
    """How many of them were verified."""
    found: int
    """How many of those rank higher than the threshold."""
    largest: float
    """The highest rank among them; NaN without a sample."""
    at_most: int
    """How many of all dropped ones do, at most, with this confidence (hypergeometric, one-sided)."""
    confidence: float

    def __str__(self) -> str:
        if self.sampled == self.dropped:
            return f"all {self.dropped} dropped components were verified: {self.found} exceed {self.threshold:.3g}"
        return (
            f"of {self.dropped} dropped components {self.sampled} were verified: {self.found} exceed "
            f"{self.threshold:.3g} (largest {self.largest:.3g}), so that at most {self.at_most} of all do "
            f"({self.confidence:.0%} confidence)"
        )


def _at_most(found: int, sampled: int, dropped: int, confidence: float) -> int:
    """The largest number of marked ones among `dropped` of which so few in the sample would not be too surprising."""

    def chance(marked: int) -> float:
        ways = sum(comb(marked, hits) * comb(dropped - marked, sampled - hits) for hits in range(found + 1))
        return ways / comb(dropped, sampled)

    return max(marked for marked in range(found, dropped - sampled + found + 1) if chance(marked) > 1 - confidence)


def _ranks(values: Float[Tensor, "component"]) -> Float[Tensor, "component"]:
    """Ranks, ties sharing their mean."""
    smaller = (values[:, None] > values[None, :]).double().sum(1)
    equal = (values[:, None] == values[None, :]).double().sum(1)
    return smaller + (equal - 1) / 2.0


def _correlation(a: Float[Tensor, "component"], b: Float[Tensor, "component"]) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = a.norm() * b.norm()
    return float((a * b).sum() / size) if float(size) > 0 else float("nan")
