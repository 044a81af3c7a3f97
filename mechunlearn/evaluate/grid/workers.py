"""The cells of a grid on the workers of an executor, each with a model of its own."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from mechunlearn.evaluate.asking import Test
from mechunlearn.evaluate.grid.cells import Cell, computed, error_text
from mechunlearn.evaluate.grid.rows import Grid, Keep, Load, Place
from mechunlearn.files import packed, unpacked
from mechunlearn.identity import digest, name_in_full, name_of
from mechunlearn.model import Model, fingerprint
from mechunlearn.model.guard import Snapshot
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, taken_back


class OtherModelError(ValueError):
    """A worker has loaded another model than the one that is compared."""


def run_on(
    executor: Executor, load: Load, grid: Grid, places: Sequence[Place], begin: Callable[[Place], None], keep: Keep
) -> None:
    """One item of work for each cell. One that cannot travel, or whose worker dies, is an error in its cell.

    Only another model and an interrupt end everything; what has not begun is cancelled, what is finished is kept.
    """
    # Tensors travel as bytes: sent as tensors, each would take a file handle on the way.
    parcels = {id(place.edit): packed((grid.task, place.edit)) for place in places}
    original = Loaded.by(load, grid.fingerprint)
    futures: dict[Future[Any], Place] = {}
    try:
        for place in places:
            control: Any = place.row.control
            subject = original if control is None else Loaded.by(control, place.row.fingerprint)
            future = executor.submit(_work, subject, original, parcels[id(place.edit)], place.test, place.cell)
            futures[future] = place
        for future in as_completed(futures):
            place = futures[future]
            begin(place)
            keep(place, _cell(future, place))
            del futures[future]
    finally:
        for future, place in futures.items():
            if not future.cancel() and future.done() and future.exception() is None:
                keep(place, _cell(future, place))


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that each worker loads once."""

    load: Load
    fingerprint: str
    key: str

    @classmethod
    def by(cls, load: Load, expected: str) -> "Loaded":
        return cls(load, expected, f"{name_in_full(load)} {digest(load)} {expected}")

    def model(self) -> Model:
        """Of this thread of this process. OtherModelError if its weights are not the expected ones."""
        models: dict[str, Model] = _kept.__dict__.setdefault("models", {})
        if self.key not in models:
            model = self.load()
            found = fingerprint(model)
            if found != self.fingerprint:
                raise OtherModelError(
                    f"expected {name_of(self.load)} to load, in each worker, the weights that are compared "
                    f"(fingerprint {self.fingerprint}), got others ({found}): pass the function that loaded them."
                )
            models[self.key] = model
        return models[self.key]

    def clean(self) -> Any:
        return taken_back(self.model(), self.fingerprint)


_kept = threading.local()
"""The models that this thread has loaded: two threads never edit the same one."""


def _work(subject: Loaded, original: Loaded, parcel: Any, test: Test, cell: Cell) -> Any:
    model, (task, edit) = subject.model(), unpacked(parcel, Task, Edit)
    try:
        with nullcontext() if edit is None else edit.applied(model):
            return packed(computed(model, task, test, cell, original.clean, Snapshot.of(model)))
    except BaseException:  # what a test did to it could not be put back
        _kept.models.pop(subject.key, None)
        raise


def _cell(future: "Future[Any]", place: Place) -> Cell:
    try:
        return unpacked(future.result(), Cell)
    except OtherModelError:
        raise
    except Exception as problem:
        return replace(place.cell, error=error_text(problem))
