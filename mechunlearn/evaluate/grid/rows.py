"""The rows and cells of a comparison, and their computation here, one after the other."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import groupby
from numbers import Integral
from operator import index
from typing import Any, TypeAlias

import torch

from mechunlearn.evaluate.asking import Test
from mechunlearn.evaluate.grid.cells import Cell, takes, tested
from mechunlearn.evaluate.grid.file import Identity
from mechunlearn.identity import digest, name_in_full
from mechunlearn.metrics import described
from mechunlearn.model import Model, check_model, fingerprint
from mechunlearn.model.guard import Snapshot
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, taken_back

Load: TypeAlias = Callable[[], Model]
Keep: TypeAlias = "Callable[[Place, Cell], None]"
"""What is done with a finished cell."""


@dataclass(frozen=True, eq=False)
class Row:
    """What is tested: the original model, an edit of it (or one for each seed), or another model."""

    name: str
    edits: tuple[Edit | None, ...] = (None,)
    digests: tuple[str, ...] = ("",)
    control: Model | Load | None = None
    fingerprint: str = ""
    """Of the control."""

    @property
    def n_weights(self) -> int:
        return max(0 if edit is None else edit.n_parameters for edit in self.edits)

    @property
    def is_loaded(self) -> bool:
        """Whether it is a control that is here as a model, and not as a function that loads one."""
        return isinstance(self.control, torch.nn.Module)

    def about(self) -> dict[str, Any]:
        """For the provenance of a report."""
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
    """One cell that is to be computed."""

    row: Row
    which: int
    """Of the row's edits."""
    test: Test
    cell: Cell
    """Without a result."""
    identity: Identity

    @property
    def edit(self) -> Edit | None:
        return self.row.edits[self.which]


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows, tests and seeds on one model and task, all of them checked."""

    model: Model
    task: Task
    rows: tuple[Row, ...]
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
        """ValueError if anything does not fit."""
        check_model(model)
        _check_names(edits, controls)
        _check_metrics(metrics)
        _check_seeds(seeds)
        edited = [_edited(model, name, edit, seeds) for name, edit in edits.items()]
        others = [_control(model, name, control) for name, control in controls.items()]
        rows = (Row("original"), *edited, *others)
        return cls(model, task, rows, dict(metrics), tuple(map(index, seeds)), fingerprint(model), digest(task))

    def places(self) -> list[Place]:
        """In the order in which they are computed: what has the same weights is together."""
        versions = _versions()
        codes = {name: f"{described(test)} {digest(test)}" for name, test in self.metrics.items()}
        return [
            self._place(row, which, name, seed, codes[name], versions)
            for row in self.rows
            for which in range(len(row.edits))
            for name, test in self.metrics.items()
            for seed in self._seeds(row, which, test)
        ]

    def provenance(self) -> dict[str, Any]:
        """JSON values: what was tested, how, and with which versions."""
        return {
            "model": self.fingerprint,
            "task": {"name": self.task.name, "digest": self.task_digest},
            "seeds": list(self.seeds),
            "metrics": {name: _in_full(test) for name, test in self.metrics.items()},
            "rows": {row.name: row.about() for row in self.rows},
            "versions": _versions(),
        }

    def _seeds(self, row: Row, which: int, test: Test) -> tuple[int, ...]:
        if len(row.edits) > 1:
            return (self.seeds[which],)
        return self.seeds if takes(test, "seed") else self.seeds[:1]

    def _place(self, row: Row, which: int, name: str, seed: int, code: str, versions: Mapping[str, str]) -> Place:
        test = self.metrics[name]
        identity = {
            "model": self.fingerprint,
            "row": row.name,
            "edit": row.digests[which],
            "control": row.fingerprint,
            "task": self.task_digest,
            "test": name,
            "code": code,
            "seed": seed if takes(test, "seed") else None,
            "versions": versions,
        }
        return Place(row, which, test, Cell(row.name, name, seed, None), identity)


def run_here(grid: Grid, places: Sequence[Place], begin: Callable[[Place], None], keep: Keep) -> None:
    """Each edit is applied once for all of its cells."""
    original = partial(taken_back, grid.model, grid.fingerprint)
    for _, group in groupby(places, key=lambda place: (place.row.name, place.which)):
        some = list(group)
        edit, model = some[0].edit, grid.model if some[0].row.control is None else here(some[0].row.control)
        with nullcontext() if edit is None else edit.applied(model):
            kept = Snapshot.of(model)
            for place in some:
                begin(place)
                keep(place, tested(model, grid.task, place.test, place.cell, original, kept))


def here(control: Model | Load) -> Model:
    """The model itself, loaded if it is a function that loads it."""
    return control if isinstance(control, torch.nn.Module) else control()


def _edited(model: Model, name: str, edit: Edit | Sequence[Edit], seeds: Sequence[int]) -> Row:
    several = (edit,) if isinstance(edit, Edit) else tuple(edit)
    if not isinstance(edit, Edit) and len(several) != len(seeds):
        raise ValueError(
            f"expected one edit for each of the {len(seeds)} seeds, got {len(several)} for {name!r}: pass "
            f"seeds=range({len(several)}), or a single edit that is tested with every seed."
        )
    for each in several:
        if not isinstance(each, Edit):
            raise ValueError(
                f"expected edits (or a sequence of them, one per seed), got {type(each).__name__} for {name!r}."
            )
        each.check(model)
    return Row(name, several, tuple(digest((each.fingerprint, each.values)) for each in several))


def _control(model: Model, name: str, control: Model | Load) -> Row:
    other = here(control)
    check_model(other)
    if other is model:
        raise ValueError(f"expected another model as the control {name!r}, got the compared one: it is the first row.")
    if other.cfg.d_vocab != model.cfg.d_vocab:
        raise ValueError(
            f"expected a control with the vocabulary of the model ({model.cfg.d_vocab} tokens), got {name!r} with "
            f"{other.cfg.d_vocab}: take one with the same tokenizer."
        )
    return Row(name, control=control, fingerprint=fingerprint(other))


def _check_names(edits: Mapping[str, Any], controls: Mapping[str, Any]) -> None:
    if "original" in {*edits, *controls}:
        raise ValueError('expected names other than "original", which is the first row: rename that edit or control.')
    shared = sorted(set(edits) & set(controls))
    if shared:
        raise ValueError(f"expected other names for controls than for edits, got {shared} for both: rename one.")


def _check_metrics(metrics: Mapping[str, Test]) -> None:
    wrong = [name for name, test in metrics.items() if not callable(test)]
    if wrong or not metrics:
        found = f"{type(metrics[wrong[0]]).__name__} for {wrong[0]!r}" if wrong else "none"
        raise ValueError(f"expected tests (model, task) -> Result as metrics, got {found}: pass functions by column.")


def _check_seeds(seeds: Sequence[int]) -> None:
    if len({*seeds}) != len(seeds) or not len(seeds) or not all(isinstance(seed, Integral) for seed in seeds):
        raise ValueError(
            f"expected different whole numbers as seeds, at least one, got {tuple(seeds)}: pass seeds=(0,)."
        )


def _in_full(test: Test) -> str:
    return f"{name_in_full(test).rpartition('.')[0]}.{described(test)}"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("mechunlearn", "torch", "transformer_lens", "transformers")}
