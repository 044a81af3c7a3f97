"""What an optimizer moves for some localized weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mechunlearn.weights import Entries


@runtime_checkable
class Moving(Protocol):
    """What the optimizer moves for some entries."""

    @property
    def entries(self) -> Entries: ...

    @property
    def tensor(self) -> Tensor: ...

    def collect(self) -> None:
        """Add what one micro-batch left in the parameter's gradient to `tensor.grad`, and clear it."""

    def publish(self) -> None:
        """Show the model what the optimizer made of `tensor`, and clear its gradient."""


@runtime_checkable
class Fleeting(Moving, Protocol):
    """One whose tensor has no memory but from `fetch` to `publish`."""

    def fetch(self) -> None:
        """Fill `tensor` with what the model shows."""


@dataclass(frozen=True, eq=False)
class Master:
    """The weights themselves: the parameter, or a float32 copy of the entries."""

    entries: Entries
    tensor: Tensor

    @classmethod
    def of(cls, entries: Entries) -> "Master":
        parameter = entries.slot.parameter.requires_grad_(True)
        if entries.is_whole and torch.finfo(parameter.dtype).bits >= 32:
            return cls(entries, parameter)
        values = entries.read(parameter.detach())
        return cls(entries, values.to(torch.promote_types(values.dtype, torch.float32)))

    @property
    def is_copy(self) -> bool:
        return self.tensor is not self.entries.slot.parameter

    def collect(self) -> None:
        """Add the parameter's gradient (of one micro-batch) to the master's, in its precision."""
        parameter = self.entries.slot.parameter
        if not self.is_copy or parameter.grad is None:
            return
        gradient = self.entries.read(parameter.grad).to(self.tensor.dtype)
        self.tensor.grad = gradient if self.tensor.grad is None else self.tensor.grad.add_(gradient)
        parameter.grad = None

    def publish(self) -> None:
        """Show the model the new values, and forget the gradient."""
        if self.is_copy:
            self.entries.write(self.tensor)
        self.tensor.grad = None


@contextmanager
def collecting(moving: Sequence[Moving]) -> Iterator[None]:
    """Inside, every `collect` runs as soon as its parameter has a gradient: never are all parameters' there at once."""
    handles = []
    try:
        for mover in moving:
            parameter = mover.entries.slot.parameter
            handles.append(parameter.register_post_accumulate_grad_hook(lambda _, mover=mover: mover.collect()))
        yield
    finally:
        for handle in handles:
            handle.remove()
