"""What every test returns: a number with its examples, its chance level and what it means."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Result:
    """A number, the mean of one value per example."""

    per_example: Float[Tensor, "example"]
    """One value per example."""
    sense: str
    """What was measured, such as "argmax over the candidates"."""
    chance: float | None = None
    """What guessing (for a loss: a uniform guess) would give, in the same unit."""
    unit: str = "share"
    """"share" in [0, 1], or what else the number is in, such as "nats per token"."""
    names: tuple[str, ...] = ()
    """What each example is about."""

    @property
    def value(self) -> float:
        """The mean over examples."""
        return float(self.per_example.mean())

    def interval(self, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """Percentile bootstrap interval of the mean over examples (facts)."""
        n = len(self.per_example)
        generator = torch.Generator().manual_seed(seed)
        means = self.per_example[torch.randint(n, (draws, n), generator=generator)].double().mean(1)
        tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
        low, high = torch.quantile(means, tails).tolist()
        return low, high

    def __repr__(self) -> str:
        low, high = self.interval()
        chance = "" if self.chance is None else f", chance {self.chance:.3f}"
        n = len(self.per_example)
        return f"Result({self.value:.3f} [{low:.3f}, {high:.3f}] over {n} examples; {self.sense}{chance})"
