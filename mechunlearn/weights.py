"""Localized weights of a model, and an edit of them as a value."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.components import ComponentMask, ModelShape
from mechunlearn.files import read_tensors, write_tensors
from mechunlearn.model import Model, Slot, check_editable, fingerprint, shape, slots

Values = dict[str, Float[Tensor, "unit width d_model"]]
"""Matrix label (`L5.W_Q`) -> the values of its selected units, in the layout of `Slot.view`."""


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of one parameter that a mask selects: whole units of its view."""

    slot: Slot
    units: Bool[Tensor, "unit"]

    @property
    def label(self) -> str:
        return f"L{self.slot.layer}.{self.slot.matrix}"

    @property
    def is_whole(self) -> bool:
        return bool(self.units.all())

    def read(self, tensor: Tensor) -> Float[Tensor, "unit width d_model"]:
        """A copy of the selected units of a tensor shaped like the parameter."""
        return self.slot.view(tensor)[self._index(tensor)]

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
    found, available = mask.shape.entries(mask), slots(model)
    return [Entries(available[key], units) for key, units in sorted(found.items(), key=lambda item: item[0])]


def read(entries: list[Entries]) -> Values:
    """Copies of the selected values."""
    return {e.label: e.read(e.slot.parameter.detach()) for e in entries}


def write(entries: list[Entries], values: Mapping[str, Tensor]) -> None:
    for e in entries:
        e.write(values[e.label])


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """A change of weights as a value: the new values of exactly the entries that its mask covers.

    Values are in the layout of `Slot.view`, so an edit made on a `TransformerBridge` applies to a
    `HookedTransformer` with the same weights, and the other way round.
    """

    mask: ComponentMask
    values: Values
    fingerprint: str
    """Of the weights that the edit was made for (`mu.model.fingerprint`)."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: editor, settings, seed, versions."""
    history: tuple[Mapping[str, int | float], ...] = ()
    """One row per training step: each loss term, gradient norm, learning rate."""

    def __post_init__(self) -> None:
        shape = self.mask.shape
        expected = {
            f"L{layer}.{matrix}": (int(units.sum()), shape.unit_parameters(matrix) // shape.d_model, shape.d_model)
            for (layer, matrix), units in shape.entries(self.mask).items()
        }
        found = {label: tuple(value.shape) for label, value in self.values.items()}
        if found != expected:
            wrong = sorted(label for label in {*found, *expected} if found.get(label) != expected.get(label))[:3]
            raise ValueError(
                f"expected values for exactly the entries of the mask, got "
                f"{ {label: found.get(label) for label in wrong} } where the mask has "
                f"{ {label: expected.get(label) for label in wrong} }: take them with gradient_mask(...).edit()."
            )
        bad = [label for label, value in self.values.items() if not bool(torch.isfinite(value).all())]
        if bad:
            raise ValueError(f"expected finite values, got NaN or infinity in {', '.join(bad[:5])}: train it again.")

    @property
    def n_parameters(self) -> int:
        """Number of entries that it sets."""
        return sum(value.numel() for value in self.values.values())

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """Inside, the model has the edited weights; after, the old ones, bit for bit."""
        entries = self._entries(model)
        before = read(entries)
        try:
            write(entries, self.values)
            yield model
        finally:
            write(entries, before)

    def apply(self, model: Model) -> None:
        """Change the model for good (the one call of the library that does)."""
        entries = self._entries(model)
        before = read(entries)
        try:
            write(entries, self.values)
        except BaseException:
            write(entries, before)
            raise

    def check(self, model: Model) -> None:
        """ValueError unless the model has the weights that the edit was made for."""
        self._entries(model)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the values, and mask and provenance as JSON in its header."""
        content = {
            "components": [str(component) for component in self.mask],
            "shape": vars(self.mask.shape),
            "mask_provenance": dict(self.mask.provenance),
            "fingerprint": self.fingerprint,
            "provenance": dict(self.provenance),
            "history": [dict(row) for row in self.history],
        }
        write_tensors(path, "Edit", self.values, content)

    @classmethod
    def load(cls, path: str | Path) -> "Edit":
        """What `save` wrote; ValueError for a corrupted or truncated file."""
        values, content = read_tensors(path, "Edit")
        shape = ModelShape(**content["shape"])
        named = ComponentMask.of(content["components"], shape)
        mask = ComponentMask(named.components, shape, content["mask_provenance"])
        return cls(mask, values, content["fingerprint"], content["provenance"], tuple(content["history"]))

    def __repr__(self) -> str:
        return f"Edit({self.provenance.get('editor', 'by hand')}; {self.n_parameters:,} weights of {self.mask!r})"

    def _entries(self, model: Model) -> list[Entries]:
        entries = select(model, self.mask)
        found = fingerprint(model)
        if found != self.fingerprint:
            raise ValueError(
                f"expected the weights that the edit was made for (fingerprint {self.fingerprint}), got others "
                f"({found}): load the original model, or apply earlier edits of a sequence first."
            )
        return entries


@contextmanager
def exclusively(model: Model) -> Iterator[None]:
    """Inside, the model is being trained; ValueError if it already is: two trainings would undo each other."""
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
