"""How two computations are compared."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor


def as_tensor(numbers: Tensor | Sequence) -> Tensor:
    if isinstance(numbers, Tensor):
        return numbers.detach().double()
    return torch.stack([torch.as_tensor(number).detach().double() for number in numbers])


def assert_agree(found: Tensor | Sequence, expected: Tensor | Sequence, *, tolerance: float = 1e-5) -> None:
    """The same shape, and nowhere further apart than `tolerance` times the largest expected number."""
    found, expected = as_tensor(found), as_tensor(expected)
    assert found.shape == expected.shape, f"{found.shape} is not {expected.shape}"
    size = expected.abs().max()
    assert size > 1e-4, f"there is nothing to see: no number is larger than {size}"
    deviation = float((found - expected).abs().max() / size)
    if "DEVIATIONS" in os.environ:
        name = os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[-1]
        with open(os.environ["DEVIATIONS"], "a") as file:
            file.write(f"{deviation:.1e} {name}\n")
    assert deviation < tolerance, f"{deviation:.1e} apart (relative):\n{found}\n{expected}"
