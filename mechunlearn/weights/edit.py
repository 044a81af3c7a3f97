"""A change of weights as a value, and how large it is."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from mechunlearn.components import ComponentMask
from mechunlearn.files import Saved
from mechunlearn.identity import name_of
from mechunlearn.model import Model, n_parameters, save_huggingface
from mechunlearn.weights.applying import check_made_for, check_none_applied, layered
from mechunlearn.weights.entries import Entries, Values, read, select, write

if TYPE_CHECKING:
    from pandas import DataFrame


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False, repr=False)
class Edit(Saved):
    """A change of weights as a value: the new values of exactly the entries that its mask covers.

    Values are in the layout of `Slot.view`, so an edit made on a `TransformerBridge` applies to a
    `HookedTransformer` with the same weights, and the other way round.
    """

    mask: ComponentMask
    values: Values
    fingerprint: str
    """That of the attention and MLP weights that the edit was made for (`mu.model.fingerprint`)."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Editor, settings, seed and versions with which it was made."""
    history: tuple[Mapping[str, int | float], ...] = ()
    """One row per training step: each loss term, gradient norm, learning rate."""

    def __post_init__(self) -> None:
        shape = self.mask.shape
        expected = {
            f"L{layer}.{matrix}": (int(units.sum()), shape.unit_parameters(matrix) // shape.d_model, shape.d_model)
            for (layer, matrix), units in shape.entries(self.mask).items()
        }
        own = {label: tuple(value.shape) for label, value in self.values.items()}
        if own != expected:
            wrong = sorted(label for label in {*own, *expected} if own.get(label) != expected.get(label))[:3]
            raise ValueError(
                f"expected values for exactly the entries of the mask, got "
                f"{ {label: own.get(label) for label in wrong} } where the mask has "
                f"{ {label: expected.get(label) for label in wrong} }: take them with gradient_mask(...).edit()."
            )
        strange = {str(value.dtype) for value in self.values.values() if value.dtype not in _DTYPES}
        if strange:
            raise ValueError(
                f"expected values in float16, bfloat16, float32 or float64, got {', '.join(sorted(strange))}: convert "
                f"them to the model's dtype."
            )
        bad = [label for label, value in self.values.items() if not bool(torch.isfinite(value).all())]
        if bad:
            raise ValueError(f"expected finite values, got NaN or infinity in {', '.join(bad[:5])}: train it again.")

    @property
    def n_parameters(self) -> int:
        """Number of entries that it sets."""
        return sum(value.numel() for value in self.values.values())

    def size(self, model: Model) -> "EditSize":
        """How many weights it really changes, which share of the model they are, and how far they move."""
        changed, squares = 0, 0.0
        for e in self._entries(model):
            before = e.read(e.slot.parameter.detach())
            after = self.values[e.label].to(before)
            changed += int((after != before).sum())
            squares += float(torch.linalg.vector_norm(after.double() - before.double()) ** 2)
        return EditSize(changed, changed / n_parameters(model), squares**0.5)

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """Inside, the model has the edited weights; after, the old ones, bit for bit.

        Edits nest: in `with a.applied(model), b.applied(model):`, `b` is made on the model with `a`, or for the same
        weights as `a` but sets none that `a` sets. They may be left in any order. ValueError for any other weights.
        """
        entries = self._entries(model)
        with layered(model, entries, self.values):
            yield model

    def apply(self, model: Model) -> None:
        """Change the model for good (the one call of the library that does); ValueError inside `applied`."""
        entries = self._entries(model)
        check_none_applied(model)
        before = read(entries)
        try:
            write(entries, self.values)
        except BaseException:
            write(entries, before)
            raise

    def check(self, model: Model) -> None:
        """ValueError unless the model has the weights that the edit was made for."""
        self._entries(model)

    def to_huggingface(self, model: Model, path: str | Path) -> None:
        """Write the edited model as a checkpoint that `AutoModelForCausalLM.from_pretrained(path)` loads.

        A folder with configuration, safetensors in the model's dtype and, if the model has one, the tokenizer; it
        appears at `path` when it is complete. The model is left as it was.
        ValueError for a `HookedTransformer` (an edit made on one also fits a `TransformerBridge`), for a multimodal
        model that `AutoModelForCausalLM` does not know (Mistral 3), for weights that the edit was not made for, and for
        a path that is taken.
        """
        with self.applied(model):
            save_huggingface(model, path)

    def to_frame(self) -> "DataFrame":
        """The history as a table: a row per training step, with its terms; empty if nothing was trained."""
        from pandas import DataFrame

        rows = DataFrame([dict(row) for row in self.history])
        return rows.set_index("step") if "step" in rows else rows

    def __repr__(self) -> str:
        return f"Edit({self.provenance.get('editor', 'by hand')}; {self.n_parameters:,} weights of {self.mask!r})"

    def _entries(self, model: Model) -> list[Entries]:
        entries = select(model, self.mask)
        check_made_for(model, entries, self.fingerprint, self.values)
        return entries


Editor: TypeAlias = Callable[..., Edit]
"""`(model, task, mask, **options) -> Edit`: every function of this signature is an editor."""


def checked_edit(edit: object, editor: Editor) -> Edit:
    """The result of an editor; ValueError if it is not an `Edit`."""
    if not isinstance(edit, Edit):
        raise ValueError(
            f"expected an editor (model, task, mask) -> Edit, got {name_of(editor)}, which returns "
            f"{type(edit).__name__}: wrap it in a function that returns an Edit (a LearnedMask has .edit() and "
            f".discretize(k=...))."
        )
    return edit


@dataclass(frozen=True)
class EditSize:
    """How large an edit is."""

    changed: int
    """Weights whose value differs from the original's; those that were covered and did not move do not count."""
    fraction: float
    """The share of the model's parameters, embeddings, biases and norms included."""
    norm: float
    """L2 norm of the change."""

    def __str__(self) -> str:
        return f"{self.changed:,} weights changed ({self.fraction:.2%} of the model), L2 norm {self.norm:.4g}"
