"""The grid of a comparison: its rows, its cells with their identities, and how they are computed in this process."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import groupby, product
from operator import index
from typing import Any, TypeAlias

import numpy as np
import torch

from mechunlearn.evaluate.asking import Test
from mechunlearn.evaluate.grid.cells import Cell, computed, takes
from mechunlearn.identity import described, digest, identified, name_in_full
from mechunlearn.model import Model, check_model, fingerprint
from mechunlearn.model.guard import Snapshot
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, taken_back

Load: TypeAlias = Callable[[], Model]
"""A function that loads a model."""

Keep: TypeAlias = "Callable[[Place, Cell], None]"
"""A function that takes each finished cell."""


@dataclass(frozen=True, eq=False)
class GridRow:
    """A row of a comparison: the original model, an edit of it (or one for each seed), or a control model."""

    name: str
    edits: tuple[Edit | None, ...] = (None,)
    digests: tuple[str, ...] = ("",)
    control: Model | Load | None = None
    fingerprint: str = ""
    """The fingerprint of the control."""

    @property
    def n_weights(self) -> int:
        return max(0 if edit is None else edit.n_parameters for edit in self.edits)

    def about(self) -> dict[str, Any]:
        """The row's part of a report's provenance."""
        if self.edits == (None,):
            return {"control": self.fingerprint} if self.control is not None else {}
        edits = [edit for edit in self.edits if edit is not None]
        return {
            "edits": list(self.digests),
            "components": [[str(component) for component in edit.mask] for edit in edits],
            "provenance": [dict(edit.provenance) for edit in edits],
        }


@dataclass(frozen=True, eq=False)
class Place:
    """A cell that is still to be computed."""

    row: GridRow
    edit: Edit | None
    """That of the row, or its edit for the cell's seed."""
    test: Test
    cell: Cell
    """The cell without its result."""
    identity: Mapping[str, Any]
    """What must be equal for a cell to be the same one. JSON values."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The rows, tests and seeds of a comparison on one model and task, all of them checked."""

    model: Model
    task: Task
    rows: tuple[GridRow, ...]
    metrics: Mapping[str, Test]
    seeds: tuple[int, ...]
    fingerprint: str
    task_digest: str

    @classmethod
    def of(
        cls,
        model: Model,
        task: Task,
        edits: Mapping[str, Edit | Sequence[Edit]],
        metrics: Mapping[str, Test],
        seeds: Sequence[int],
        controls: Mapping[str, Model | Load],
    ) -> "Grid":
        """The grid of what `compare` takes; ValueError if anything does not fit."""
        check_model(model)
        _check(edits, metrics, seeds, controls)
        edited = [_row_of_edits(model, name, edit, seeds) for name, edit in edits.items()]
        task.check_length(model)
        others = [_row_of_control(model, name, control) for name, control in controls.items()]
        rows = (GridRow("original"), *edited, *others)
        return cls(model, task, rows, dict(metrics), tuple(map(index, seeds)), fingerprint(model), digest(task))

    def places(self, *, for_file: bool) -> list[Place]:
        """All cells in the order of their computation: those with the same weights are together.

        ValueError, if they are for a file, for a test of which nothing says which one it is.
        """
        codes = {name: identified(test) if for_file else "" for name, test in self.metrics.items()}
        shared, places = {"model": self.fingerprint, "task": self.task_digest, "versions": _versions()}, []
        for row in self.rows:
            for (which, edit), (name, test) in product(enumerate(row.edits), self.metrics.items()):
                of_row = {"row": row.name, "edit": row.digests[which], "control": row.fingerprint}
                seeds = self.seeds if takes(test, "seed") else self.seeds[:1]
                for seed in seeds if len(row.edits) == 1 else [self.seeds[which]]:
                    own = {"test": name, "code": codes[name], "seed": seed if takes(test, "seed") else None}
                    places.append(Place(row, edit, test, Cell(row.name, name, seed, None), shared | of_row | own))
        return places

    def provenance(self) -> dict[str, Any]:
        """What was tested, how, and with which versions, as JSON values."""
        return {
            "model": self.fingerprint,
            "task": {
                "name": self.task.name,
                "digest": self.task_digest,
                "special_tokens": self.task.special_tokens,
            },
            "seeds": list(self.seeds),
            "metrics": {n: f"{name_in_full(f).rpartition('.')[0]}.{described(f)}" for n, f in self.metrics.items()},
            "rows": {row.name: row.about() for row in self.rows},
            "versions": _versions(),
        }


def run_serially(grid: Grid, places: Sequence[Place], begin: Callable[[Place], None], keep: Keep) -> None:
    """Compute the cells one after the other in this process; each edit is applied once for all of its cells."""
    original = partial(taken_back, grid.model, grid.fingerprint)
    for _, group in groupby(places, key=lambda place: (place.row.name, id(place.edit))):
        same_weights = list(group)
        edit, control = same_weights[0].edit, same_weights[0].row.control
        model = grid.model if control is None else loaded(control)
        with nullcontext() if edit is None else edit.applied(model):
            kept = Snapshot.of(model)
            for place in same_weights:
                begin(place)
                keep(place, computed(model, grid.task, place.test, place.cell, original, kept))


def loaded(control: Model | Load) -> Model:
    """The control as a model, loaded if it is a function that loads it."""
    return control if isinstance(control, torch.nn.Module) else control()


def _row_of_edits(model: Model, name: str, edit: Edit | Sequence[Edit], seeds: Sequence[int]) -> GridRow:
    several = checked_edits(model, name, edit)
    if not isinstance(edit, Edit) and len(several) != len(seeds):
        raise ValueError(
            f"expected one edit for each of the {len(seeds)} seeds, got {len(several)} for {name!r}: pass "
            f"seeds=range({len(several)}), or a single edit that is tested with every seed."
        )
    return GridRow(name, several, tuple(digest((single.fingerprint, single.values)) for single in several))


def checked_edits(model: Model, name: str, edit: Edit | Sequence[Edit]) -> tuple[Edit, ...]:
    """The edit, or one for each seed; ValueError for what is no edit, and for an edit of other weights."""
    several = (edit,) if isinstance(edit, Edit) else tuple(edit)
    for single in several:
        if not isinstance(single, Edit):
            raise ValueError(
                f"expected edits (or a sequence of them, one per seed), got {type(single).__name__} for {name!r}: pass "
                f"what an editor gives."
            )
        single.check(model)
    return several


def _row_of_control(model: Model, name: str, control: Model | Load) -> GridRow:
    other = loaded(control)
    check_model(other)
    if other is model:
        raise ValueError(f"expected another model as the control {name!r}, got the compared one: it is the first row.")
    if other.cfg.d_vocab != model.cfg.d_vocab:
        raise ValueError(
            f"expected a control with the vocabulary of the model ({model.cfg.d_vocab} tokens), got {name!r} with "
            f"{other.cfg.d_vocab}: take one with the same tokenizer."
        )
    return GridRow(name, control=control, fingerprint=fingerprint(other))


def _check(
    edits: Mapping[str, Any], metrics: Mapping[str, Test], seeds: Sequence[int], controls: Mapping[str, Any]
) -> None:
    if "original" in {*edits, *controls}:
        raise ValueError('expected names other than "original", which is the first row: rename that edit or control.')
    shared = sorted(set(edits) & set(controls))
    if shared:
        raise ValueError(f"expected other names for controls than for edits, got {shared} for both: rename one.")
    wrong = [name for name, test in metrics.items() if not callable(test)]
    if wrong or not metrics:
        got = f"{type(metrics[wrong[0]]).__name__} for {wrong[0]!r}" if wrong else "none"
        raise ValueError(f"expected tests (model, task) -> Result as metrics, got {got}: pass functions by column.")
    if len({*seeds}) != len(seeds) or not len(seeds) or not all(isinstance(seed, int | np.integer) for seed in seeds):
        raise ValueError(
            f"expected different whole numbers as seeds, at least one, got {tuple(seeds)}: pass seeds=(0,)."
        )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("mechunlearn", "torch", "transformer_lens", "transformers")}
