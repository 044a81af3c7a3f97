"""Curves of a quantity over layers, steps or another axis, with one value per prompt at each point."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from mechunlearn.intervals import bootstrap, bounded

if TYPE_CHECKING:
    from pandas import DataFrame


LAYERS = "residual stream that enters layer"


@dataclass(frozen=True, eq=False, repr=False)
class Curve:
    """One value per prompt at each point; the curve is their mean."""

    points: tuple[str, ...]
    """The points' names: of layers, "3" is the residual stream that enters layer 3, the last number the final one."""
    per_prompt: Float[Tensor, "prompt point"]
    """Each prompt's own value."""
    unit: str
    """The quantity, such as "accuracy"."""
    chance: float | None = None
    """The value that guessing would give."""
    axis: str = LAYERS
    """The axis that the points lie on, such as "steps"."""
    limits: tuple[float, float] | None = None
    """Between what the values lie, such as 0 and 1 for shares; None where there are no limits."""

    @property
    def mean(self) -> Float[Tensor, "point"]:
        """Means over prompts."""
        return self.per_prompt.mean(0)

    def interval(self, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> "DataFrame":
        """Intervals over prompts: columns value, low, high. Between limits they cover near these too (`bounded` of
        `mechunlearn.intervals`); without, a percentile bootstrap, which has no width where all values are equal.
        """
        import pandas as pd

        options = {"confidence": confidence, "draws": draws, "seed": seed}
        values, limits = self.per_prompt, self.limits
        low, high = bootstrap(values, **options) if limits is None else bounded(values, limits, **options)
        columns = {"value": self.mean.tolist(), "low": low.tolist(), "high": high.tolist()}
        return pd.DataFrame(columns, index=pd.Index(self.points, name="point"))

    def __repr__(self) -> str:
        shown = ", ".join(f"{point}: {value:.3g}" for point, value in zip(self.points, self.mean.tolist(), strict=True))
        chance = "" if self.chance is None else f"; chance {self.chance:.3g}"
        return f"Curve({self.unit}, {len(self.per_prompt)} prompts; {shown}{chance})"
