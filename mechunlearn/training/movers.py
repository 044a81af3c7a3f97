"""The tensors that an optimizer moves to change localized weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mechunlearn.weights import Entries


@runtime_checkable
class Moving(Protocol):
    """A tensor that the optimizer moves, and the entries that follow it."""

    @property
    def entries(self) -> Entries: ...

    @property
    def tensor(self) -> Tensor: ...

    def collect(self) -> None:
        """Add the parameter's gradient, of one micro-batch, to `tensor.grad`, and clear it."""

    def publish(self) -> None:
        """Write the weights that follow from `tensor` into the model, and clear the tensor's gradient."""


@runtime_checkable
class Fleeting(Moving, Protocol):
    """A mover whose tensor has memory only from `fetch` to `publish`."""

    def fetch(self) -> None:
        """Give `tensor` memory, and the model's present weights."""


@dataclass(frozen=True, eq=False)
class Master:
    """The weights themselves: the parameter, or a copy of the entries, in float32 at least.

    A parameter that is not contiguous, such as a part of GPT-2's fused QKV, is copied too: fused optimizers take the
    memory after its first number for its own, and 8-bit ones give it another memory.
    """

    entries: Entries
    tensor: Tensor

    @classmethod
    def of(cls, entries: Entries) -> "Master":
        parameter = entries.slot.parameter.requires_grad_(True)
        if entries.is_whole and torch.finfo(parameter.dtype).bits >= 32 and parameter.is_contiguous():
            return cls(entries, parameter)
        values = entries.read(parameter.detach())
        return cls(entries, values.to(torch.promote_types(values.dtype, torch.float32)))

    @property
    def is_copy(self) -> bool:
        return self.tensor is not self.entries.slot.parameter

    def collect(self) -> None:
        if self.is_copy:
            collect_gradient(self)

    def publish(self) -> None:
        if self.is_copy:
            self.entries.write(self.tensor)
        self.tensor.grad = None


def collect_gradient(mover: Moving, of_tensor: Callable[[Tensor], Tensor] | None = None) -> None:
    """Add the gradient of the mover's entries, in the precision of its tensor, to `tensor.grad`, and clear it.

    `of_tensor` makes the gradient of the tensor from that of the entries, where they are not the same.
    """
    parameter = mover.entries.slot.parameter
    if parameter.grad is None:
        return
    gradient = mover.entries.read(parameter.grad).to(mover.tensor.dtype)
    add_gradient(mover.tensor, gradient if of_tensor is None else of_tensor(gradient))
    parameter.grad = None


def add_gradient(tensor: Tensor, gradient: Tensor) -> None:
    """Accumulate in place; the first gradient becomes the tensor's own, without a copy."""
    tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)


@contextmanager
def collecting(moving: Sequence[Moving]) -> Iterator[None]:
    """Inside, `collect` runs as soon as its parameter has a gradient, so that never all parameters have theirs."""
    with ExitStack() as stack:
        for mover in moving:
            parameter = mover.entries.slot.parameter
            handle = parameter.register_post_accumulate_grad_hook(lambda _, mover=mover: mover.collect())
            stack.callback(handle.remove)
        yield
