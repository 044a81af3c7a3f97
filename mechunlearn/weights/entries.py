"""The entries of a model's parameters that a mask selects."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.model import Model, Slot, check_editable, shape, slots

Values = dict[str, Float[Tensor, "unit width d_model"]]
"""Matrix label (`L5.W_Q`) -> the values of its selected units, in the layout of `Slot.view`."""


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of one parameter that a mask selects, which are whole units of its view."""

    slot: Slot
    units: Bool[Tensor, "unit"]
    """True at the selected units."""

    @property
    def label(self) -> str:
        return f"L{self.slot.layer}.{self.slot.matrix}"

    @property
    def is_whole(self) -> bool:
        return bool(self.units.all())

    def read(self, tensor: Tensor) -> Float[Tensor, "unit width d_model"]:
        """A contiguous copy of the selected units of a tensor shaped like the parameter."""
        return self.slot.view(tensor)[self._index(tensor)].contiguous()

    @torch.no_grad()
    def write(self, values: Float[Tensor, "unit width d_model"]) -> None:
        """Put values (cast to the parameter's dtype) into the selected units; nothing else changes."""
        parameter = self.slot.parameter.detach()
        self.slot.view(parameter)[self._index(parameter)] = values.to(parameter)

    def outside(self) -> "Entries":
        """The other units of the same parameter."""
        return Entries(self.slot, ~self.units)

    def _index(self, tensor: Tensor) -> Tensor:
        return self.units.to(tensor.device).nonzero()[:, 0]


def select(model: Model, mask: ComponentMask) -> list[Entries]:
    """The entries of `model` that `mask` covers, by layer and matrix; ValueError if it is empty or does not fit."""
    check_editable(model)
    if mask.shape != shape(model):
        raise ValueError(
            f"expected a mask made for this model ({shape(model)}), got one made for another ({mask.shape}): "
            f"localize on the model that you edit."
        )
    if len(mask) == 0:
        raise ValueError("expected a mask that selects something, got an empty one: check what it was made from.")
    units_of, available = mask.shape.entries(mask), slots(model)
    return [Entries(available[key], units) for key, units in sorted(units_of.items(), key=lambda item: item[0])]


def read(entries: list[Entries]) -> Values:
    """Copies of the selected values, by the label of their matrix."""
    return {e.label: e.read(e.slot.parameter.detach()) for e in entries}


def write(entries: list[Entries], values: Mapping[str, Tensor]) -> None:
    """Put the values into the entries, in place; the inverse of `read`."""
    for e in entries:
        e.write(values[e.label])


@contextmanager
def exclusively(model: Model) -> Iterator[None]:
    """Inside, no other training of the model may begin: two would undo each other's weights. ValueError if one has."""
    if model in _in_training:
        raise ValueError(
            "expected a model that is not being trained, got one inside gradient_mask or finetune: leave that first, "
            "and apply its edit before the next one."
        )
    _in_training.add(model)
    try:
        yield
    finally:
        _in_training.discard(model)


_in_training: WeakSet[torch.nn.Module] = WeakSet()
"""The models that are being trained now."""
