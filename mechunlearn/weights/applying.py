"""Edits that are applied to a model for a while: they nest, and leave in any order.

The applied edits of a model are a stack of layers. Each layer remembers what its entries were when it came, that is,
what they would be without it. Where layers share an entry, the topmost one is what the model has, and each remembers
the value of the one below it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mechunlearn.model import Model, fingerprint
from mechunlearn.weights.entries import Entries, Values, read, write


@dataclass(frozen=True, eq=False)
class _Layer:
    """One applied edit: the entries that it covers, and the values that they would have without it."""

    entries: list[Entries]
    before: Values

    def units(self, like: Entries) -> Tensor:
        """True at the units of the parameter of `like` that this layer covers."""
        same = [e.units for e in self.entries if e.label == like.label]
        return same[0] if same else torch.zeros_like(like.units)


_applied: WeakKeyDictionary[torch.nn.Module, list[_Layer]] = WeakKeyDictionary()
"""The edits applied to each model now, in the order in which they came."""


@contextmanager
def layered(model: Model, entries: list[Entries], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the entries have these values; after, those that they would have without them, bit for bit."""
    layer = _Layer(entries, read(entries))
    layers = _applied.setdefault(model, [])
    layers.append(layer)
    try:
        write(entries, values)
        yield
    finally:
        _take_out(layers, layer)


@contextmanager
def taken_back(model: Model, to: str) -> Iterator[Model]:
    """Inside, the edits applied since the model had the fingerprint `to` are taken back; after, it has them again.

    It is exact to the bit, it nests, and an edit may be left inside. ValueError if taking edits back does not lead to
    that fingerprint, as in a model that is being trained. Cost: a fingerprint for each edit, and one more.
    """
    with _lifted(model, to) as since:
        if since is None:
            raise ValueError(
                f"expected a model that has the weights with the fingerprint {to} when the edits applied to it are "
                f"taken back, got {fingerprint(model)}: undo what else has changed its weights first."
            )
        yield model


@contextmanager
def _lifted(model: Model, to: str) -> Iterator[list[_Layer] | None]:
    """As `taken_back`; gives the edits that are taken back, or None if all were and that did not lead to `to`."""
    lifted: list[tuple[_Layer, Values]] = []
    try:
        reached = fingerprint(model)
        # From the top down, since a layer remembers what was there before it, with all layers below it in place.
        for layer in reversed(_applied.get(model, [])):
            if reached == to:
                break
            lifted.append((layer, read(layer.entries)))
            write(layer.entries, layer.before)
            reached = fingerprint(model)
        yield [layer for layer, _ in lifted] if reached == to else None
    finally:
        for layer, values in reversed(lifted):
            # An edit that was left meanwhile stays out.
            if layer in _applied.get(model, []):
                write(layer.entries, values)


def check_made_for(model: Model, entries: Sequence[Entries], expected: str, values: Mapping[str, Tensor]) -> None:
    """ValueError unless the weights have the fingerprint `expected`, but for later edits of other entries."""
    with _lifted(model, expected) as since:
        pass
    if since is None:
        raise ValueError(
            f"expected the weights that the edit was made for (fingerprint {expected}), got others "
            f"({fingerprint(model)}): load the original model, or apply earlier edits of a sequence first."
            f"{_other_dtype(entries, values)}"
        )
    shared = [e.label for e in entries if any(bool((e.units & layer.units(e)).any()) for layer in since)]
    if shared:
        raise ValueError(
            f"expected the weights that the edit was made for, got a model in which another edit, applied now, sets "
            f"the same entries of {', '.join(shared[:5])}: leave that one first, or make this one on the edited model."
        )


def check_none_applied(model: Model) -> None:
    """ValueError inside `Edit.applied`, which on leaving would take back a part of a change that is for good."""
    if _applied.get(model):
        raise ValueError(
            "expected a model without an edit applied for a while, got one inside Edit.applied(...): leave that "
            "first, or use applied(...) here too."
        )


def _take_out(layers: list[_Layer], layer: _Layer) -> None:
    """Remove a layer from anywhere in the stack; the model keeps the values of the layers above it."""
    later = layers[layers.index(layer) + 1 :]
    layers.remove(layer)
    for e in layer.entries:
        # Units that no layer above has set: there the model still has this layer's values.
        values, open_units = layer.before[e.label], e.units.clone()
        for above in later:
            own = above.units(e)
            shared = open_units & own
            if bool(shared.any()):
                # The next layer above remembers this layer's values as those below it: now they are those below both.
                # Rows of `before` are the selected units alone, so the masks are narrowed to each layer's own units.
                above.before[e.label][shared[own]] = values[shared[e.units]]
            open_units &= ~own
        Entries(e.slot, open_units).write(values if torch.equal(open_units, e.units) else values[open_units[e.units]])


def _other_dtype(entries: Sequence[Entries], values: Mapping[str, Tensor]) -> str:
    """A hint for the error, where the model was loaded in another dtype."""
    own, of_edit = {e.slot.parameter.dtype for e in entries}, {value.dtype for value in values.values()}
    if not own.isdisjoint(of_edit):
        return ""
    edited, present = (", ".join(sorted(str(t).removeprefix("torch.") for t in dtypes)) for dtypes in (of_edit, own))
    return f" The edit is in {edited} and the model in {present}: apply it in the former, then convert."
