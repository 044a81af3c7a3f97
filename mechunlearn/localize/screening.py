"""Screen, then verify: an estimate for everything, exact patching for the best, and how far to trust the screen."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import comb
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.arguments import check_functions
from mechunlearn.components import Component, ComponentMask, ComponentScores
from mechunlearn.identity import name_of
from mechunlearn.localize.attribution import attribution_patching
from mechunlearn.localize.combining import ranks
from mechunlearn.localize.options import ComponentOptions
from mechunlearn.localize.patching import activation_patching
from mechunlearn.model import Model
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts

if TYPE_CHECKING:
    from pandas import DataFrame


Method: TypeAlias = Callable[..., ComponentScores]
"""(model, prompts, *, metric, direction, components, batch_size) -> scores, as `attribution_patching` is."""


@with_options()
def screen_then_verify(
    model: Model,
    prompts: Prompts,
    *,
    k: int | None = None,
    fraction: float | None = None,
    estimate: Method = attribution_patching,
    verify: Method = activation_patching,
    sample: int = 10,
    seed: int = 0,
    by: Callable[[Tensor], Tensor] = torch.abs,
    **options: Unpack[ComponentOptions],
) -> "Verified":
    r"""Exact scores of the components that an estimate puts first, and what the estimate got wrong.

    1. `estimate` scores every component.
    2. The candidates are the `k`, or the `fraction`, that it ranks highest `by` size.
    3. `verify` scores the candidates, and `sample` of the dropped components, drawn at random.

    Scores have the units and signs of the two methods. An estimate without a sign (`atp_star` with GradDrop) can screen
    as well; of its error only `rank correlation` and `missed` then mean something.

    Cost: that of `estimate`, and of `verify` for the candidates and the sample. ValueError unless exactly one of k and
    fraction is given and in range, and for a negative sample. A sample larger than what is left takes all of it.

    The idea of screening and of sampling what was dropped: Kramár et al. 2024, https://arxiv.org/abs/2403.00745.
    """
    if sample < 0:
        raise ValueError(f"expected a sample of at least 0 components, got {sample}.")
    check_functions(metric=options["metric"], estimate=estimate, verify=verify, by=by)
    estimated = estimate(model, prompts, **options)
    candidates = estimated.top(k=k, fraction=fraction, by=by)
    dropped = [component for component in estimated.components if component not in candidates]
    sampled = Random(f"screen_then_verify {seed}").sample(dropped, min(sample, len(dropped)))
    exact = verify(model, prompts, **options | {"components": [*candidates, *sorted(sampled)]})
    settings = {"estimate": estimated.method, "verify": exact.method, "direction": options["direction"]}
    settings |= {"by": name_of(by), "k": len(candidates), "of": len(estimated), "sample": len(sampled), "seed": seed}
    scores = _only(exact, candidates, settings)
    return Verified(scores, estimated, _only(exact, sampled, settings) if sampled else None, by)


def _only(scores: ComponentScores, components: Iterable[Component], settings: dict[str, Any]) -> ComponentScores:
    chosen = sorted(components)
    places = [scores.components.index(component) for component in chosen]
    rows, name = None if scores.per_prompt is None else scores.per_prompt[:, places], name_of(screen_then_verify)
    return ComponentScores(tuple(chosen), scores.tensor[places], scores.shape, name, scores.metric, settings, rows)


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
    """The function that turns scores into ranks."""

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

        Pass the rank of the last component that you select: `threshold=abs(scores of the mask).min()`.
        """
        if threshold is None:
            threshold = float(self.by(self.scores.tensor).min())
        dropped = len(self.estimate) - len(self.scores)
        sizes = self.by(self.sampled.tensor) if self.sampled is not None else torch.zeros(0, dtype=torch.float64)
        exceeding = int((sizes > threshold).sum())
        largest = float(sizes.max()) if len(sizes) else float("nan")
        at_most = _at_most(exceeding, len(sizes), dropped, confidence)
        return Missed(threshold, dropped, len(sizes), exceeding, largest, at_most, confidence)

    @property
    def error(self) -> "DataFrame":
        """Estimate against exact score, for the candidates and for the sample of the others: a row each.

        Bias is the mean of estimate - exact, `rms` the root of its mean square, `correlation` Pearson's, `rank
        correlation` Spearman's of the ranks `by`, `same sign` a share. A correlation of one component, or of equal
        values, is NaN. Candidates were chosen by their estimate, so their estimates tend to be too large.
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
            "rank correlation": _correlation(ranks(self.by(estimate)).double(), ranks(self.by(exact)).double()),
            "same sign": float((estimate.sign() == exact.sign()).double().mean()),
        }


@dataclass(frozen=True)
class Missed:
    """How much the screen may have missed, judged by a random sample of the dropped components."""

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
    """The probability with which `at_most` holds."""

    def __str__(self) -> str:
        if self.sampled == self.dropped:
            return f"all {self.dropped} dropped components were verified: {self.found} exceed {self.threshold:.3g}"
        return (
            f"of {self.dropped} dropped components {self.sampled} were verified: {self.found} exceed "
            f"{self.threshold:.3g} (largest {self.largest:.3g}), so that at most {self.at_most} of all do "
            f"({self.confidence:.0%} confidence)"
        )


def _at_most(found: int, sampled: int, dropped: int, confidence: float) -> int:
    """The largest number of missed components of which a sample finds so few with probability > 1 - confidence."""

    def chance(missed: int) -> float:
        ways = sum(comb(missed, hits) * comb(dropped - missed, sampled - hits) for hits in range(found + 1))
        return ways / comb(dropped, sampled)

    return max(missed for missed in range(found, dropped - sampled + found + 1) if chance(missed) > 1 - confidence)


def _correlation(a: Float[Tensor, "component"], b: Float[Tensor, "component"]) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = a.norm() * b.norm()
    return float((a * b).sum() / size) if float(size) > 0 else float("nan")
