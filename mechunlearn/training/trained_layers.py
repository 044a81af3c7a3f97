"""The part of a model that is trained, and runs that start at its lowest layer."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.model import Model, device_of
from mechunlearn.model.running import residual_after, residual_before, running_from
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.weights import Entries, Values, read, write

Readings = dict[str, Tensor]
"""[row, answer, d_model] at the places that predict the answers: `residual` (after the highest trained layer) and
`final` (what enters the final norm)."""


@dataclass(frozen=True, eq=False)
class Part:
    """The weights of a model that are trained, and their values before."""

    model: Model
    entries: Sequence[Entries]
    original: Values
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        own = self.entries[0].slot.parameter.dtype
        if self.compute_dtype not in (None, own) and (own, self.compute_dtype) != (torch.float32, torch.bfloat16):
            raise ValueError(
                f"compute_dtype must be None, the model's own ({own}), or bfloat16 for a float32 model, got "
                f"{self.compute_dtype}: load the model in the dtype that it should compute in."
            )

    @property
    def lowest(self) -> int:
        return min(e.slot.layer for e in self.entries)

    @property
    def highest(self) -> int:
        return max(e.slot.layer for e in self.entries)

    def computing(self) -> AbstractContextManager[object]:
        """Inside, matrix products are computed in `compute_dtype`."""
        if self.compute_dtype in (None, self.entries[0].slot.parameter.dtype):
            return nullcontext()
        return torch.autocast(device_of(self.model).type, self.compute_dtype)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Inside, the model is the unedited one; no gradients."""
        entries = list(self.entries)
        present = read(entries)
        _show(entries, self.original)
        try:
            with torch.no_grad():
                yield
        finally:
            _show(entries, present)


def _show(entries: list[Entries], values: Values) -> None:
    """Write values, and drop the bfloat16 copies that autocast keeps of those before."""
    write(entries, values)
    torch.clear_autocast_cache()


@dataclass(frozen=True, eq=False)
class Reader:
    """Prompts with what is computed once for each: the input of the lowest trained layer, and `before`."""

    part: Part
    prompts: Prompts
    entering: Float[Tensor, "batch pos d_model"] | None
    """The input of the lowest trained layer; None where that is the first layer."""
    before: Readings
    """The readings of the unedited model that a loss compares with."""

    @classmethod
    def of(cls, part: Part, prompts: Prompts, original: Sequence[str], rows_at_once: int) -> "Reader":
        """`original`: the names of the readings that are wanted of the unedited model."""
        blocks = torch.arange(len(prompts)).split(operator.index(rows_at_once))
        entering = None
        if part.lowest:
            batches = [prompts.rows(rows) for rows in blocks]
            parts = [residual_before(part.model, part.lowest, b.tokens, b.attention_mask) for b in batches]
            entering = torch.cat(parts)
        reader = cls(part, prompts, entering, {})
        if not original:
            return reader
        with part.as_it_was():
            before = [reader.now(rows, original) for rows in blocks]
        joined = {name: torch.cat([readings[name] for readings in before]) for name in original}
        return cls(part, prompts, entering, joined)

    def now(self, rows: Tensor, names: Sequence[str]) -> Readings:
        """Readings of the model with its present weights, with their graph."""
        part, prompts = self.part, self.prompts[rows]
        places = torch.arange(len(prompts), device=prompts.positions.device)[:, None], prompts.positions
        layer, start, last = part.lowest, self._entering(rows, prompts), len(part.model.blocks) - 1
        readings: Readings = {}
        for name, through in (("residual", part.highest), ("final", last)):
            if name in names:
                # The first run starts at the lowest trained layer, the second where the first has ended.
                if start is None or layer <= through:
                    with nullcontext() if start is None else running_from(part.model, layer, start):
                        start = residual_after(part.model, through, prompts.tokens, prompts.attention_mask)
                layer = through + 1
                readings[name] = start[places]
        return readings

    def _entering(self, rows: Tensor, prompts: Prompts) -> Tensor | None:
        """Their input of the lowest trained layer, without the columns that are padding in all of these rows."""
        if self.entering is None:
            return None
        first = int(self.prompts.positions[rows[0], 0] - prompts.positions[0, 0])
        return self.entering[rows, first : first + prompts.tokens.shape[1]]
