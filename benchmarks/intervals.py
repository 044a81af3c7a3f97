"""How often 95 % intervals of a mean cover it: by number of examples, kind of values and interval.

python benchmarks/intervals.py
"""

from collections.abc import Callable

import torch
from scipy.stats import beta
from torch import Tensor

from mechunlearn.intervals import bootstrap, bounded

DRAWN = 4000
"""Sets of values: the standard error of a share of 0.95 is 0.0034."""


def yes_no(share: float) -> Callable[[torch.Generator, int], Tensor]:
    return lambda random, n: (torch.rand(n, DRAWN, generator=random) < share).double()


def skewed(a: float, b: float) -> Callable[[torch.Generator, int], Tensor]:
    """Beta-distributed."""
    return lambda random, n: torch.from_numpy(beta.ppf(torch.rand(n, DRAWN, generator=random).numpy(), a, b)).double()


def near_one_but_for_some(random: torch.Generator, n: int) -> Tensor:
    """One in twenty is 0, the others are 0.999."""
    return torch.where(torch.rand(n, DRAWN, generator=random) < 0.05, 0.0, 0.999).double()


KINDS = {
    "yes/no, 0.5": (yes_no(0.5), 0.5),
    "yes/no, 0.95": (yes_no(0.95), 0.95),
    "uniform": (lambda random, n: torch.rand(n, DRAWN, generator=random).double(), 0.5),
    "Beta(0.5, 0.5)": (skewed(0.5, 0.5), 0.5),
    "Beta(4, 0.2)": (skewed(4, 0.2), 4 / 4.2),
    "0.999, one in twenty 0": (near_one_but_for_some, 0.95 * 0.999),
}
INTERVALS = {"bounded": bounded, "bootstrap": bootstrap}


def coverage(kind: str, n: int, interval: Callable[..., tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The share of sets whose interval has the true mean in it, and the mean width."""
    draw, mean = KINDS[kind]
    low, high = interval(draw(torch.Generator().manual_seed(n), n))
    return float(((low <= mean) & (mean <= high)).double().mean()), float((high - low).mean())


def main() -> None:
    print("| values | n | " + " | ".join(f"{name}: covers | width" for name in INTERVALS) + " |")
    print("| --- | --- | " + " | ".join("--- | ---" for _ in INTERVALS) + " |")
    for kind in KINDS:
        for n in (8, 16, 33, 64):
            numbers = [coverage(kind, n, interval) for interval in INTERVALS.values()]
            print(f"| {kind} | {n} | " + " | ".join(f"{share:.3f} | {width:.3f}" for share, width in numbers) + " |")


if __name__ == "__main__":
    main()
