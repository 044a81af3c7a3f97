"""What every test returns: a number with its examples, its chance level and what it means."""

from dataclasses import dataclass
from statistics import NormalDist

from jaxtyping import Float
from torch import Tensor

from mechunlearn.curve import Curve
from mechunlearn.intervals import bootstrap


@dataclass(frozen=True, eq=False)
class Result:
    """A number, the mean of one value per example."""

    per_example: Float[Tensor, "example"]
    """One value per example."""
    sense: str
    """What was measured, such as "argmax over the candidates"."""
    chance: float | None = None
    """What guessing (for a loss: a uniform guess) would give, in the same unit."""
    unit: str = ""
    """"share" for what lies in [0, 1] (the report plots these), or what else it is in: "nats per token"."""
    names: tuple[str, ...] = ()
    """What each example is about."""
    curve: Curve | None = None
    """Of an attack: what it reaches with each budget (steps, examples, bits); of a probe: by layer."""
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

    def interval(self, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """Interval of the mean over examples (facts).

        Wilson's for yes/no values, which stays honest at 0 % and 100 %; a percentile bootstrap for others.
        """
        n = len(self.per_example)
        if bool(((self.per_example == 0) | (self.per_example == 1)).all()):
            return wilson(self.value, n, confidence)
        low, high = bootstrap(self.per_example, confidence=confidence, draws=draws, seed=seed)
        return float(low), float(high)

    def difference(
        self, other: "Result", *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> tuple[float, float, float]:
        """This minus the other on the same examples: the mean and its interval, by paired bootstrap.

        ValueError if the examples are not the same ones.
        """
        if len(self.per_example) != len(other.per_example) or self.names != other.names:
            raise ValueError("expected results on the same examples, got different ones: use the same task for both.")
        values = self.per_example.double() - other.per_example.double()
        low, high = bootstrap(values, confidence=confidence, draws=draws, seed=seed)
        return float(values.mean()), float(low), float(high)

    def __repr__(self) -> str:
        low, high = self.interval()
        chance = "" if self.chance is None else f", chance {self.chance:.3f}"
        n = len(self.per_example)
        unit = f" {self.unit}" if self.unit not in ("", "share") else ""
        return f"Result({self.value:.3f}{unit} [{low:.3f}, {high:.3f}] over {n} examples; {self.sense}{chance})"


def wilson(share: float, n: int, confidence: float) -> tuple[float, float]:
    """Wilson 1927: the shares for which the observed one is not surprising."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * ((share * (1 - share) + z * z / (4 * n)) / n) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)
