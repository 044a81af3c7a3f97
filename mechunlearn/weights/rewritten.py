"""Every matrix of a model put through a function for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.model import Model, shape
from mechunlearn.weights.entries import Entries, Values, exclusively, select


@contextmanager
def rewritten(model: Model, entries: list[Entries], change: Callable[[Entries], Tensor]) -> Iterator[None]:
    """Inside, the entries have the values that `change` gives for them; after, the old ones, bit for bit.

    One matrix is changed after the other, so `change` sees its own matrix as it was. ValueError in a model that is
    being trained.
    """
    before: Values = {}
    with exclusively(model):
        try:
            for e in entries:
                before[e.label] = e.read(e.slot.parameter.detach())
                e.write(change(e))
            yield
        finally:
            for e in entries:
                if e.label in before:
                    e.write(before[e.label])


def every_entry(model: Model) -> list[Entries]:
    """All matrices of attention and MLPs; not embeddings, unembedding, norms and biases."""
    parts = [f"L{layer}{part}" for layer in range(shape(model).n_layers) for part in ("ATTN", "MLP")]
    return select(model, ComponentMask.of(parts, shape(model)))


def as_linear(entries: Entries) -> Float[Tensor, "out in"]:
    """A copy of a whole matrix as `nn.Linear` stores it, whatever the model's own layout."""
    rows = entries.read(entries.slot.parameter.detach()).flatten(0, 1)
    return rows.T.contiguous() if entries.slot.matrix in ("W_O", "W_out") else rows


def from_linear(entries: Entries, weight: Float[Tensor, "out in"]) -> Float[Tensor, "unit width d_model"]:
    """The inverse of `as_linear`: values that `Entries.write` takes."""
    rows = weight.T if entries.slot.matrix in ("W_O", "W_out") else weight
    return rows.unflatten(0, (entries.slot.units, -1))
