"""The cells of a grid on the workers of an executor, each with a model of its own."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechunlearn.evaluate.asking import Test
from mechunlearn.evaluate.grid.cells import Cell, tested, told
from mechunlearn.evaluate.grid.file import decoded, encoded
from mechunlearn.evaluate.grid.rows import Grid, Keep, Load, Place
from mechunlearn.identity import digest, name_in_full
from mechunlearn.metrics import name_of
from mechunlearn.model import Model, fingerprint
from mechunlearn.model.guard import Snapshot
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Format, Task
from mechunlearn.weights import Edit, taken_back


class OtherModelError(ValueError):
    """A worker has loaded another model than the one that is compared."""


def run_on(
    executor: Executor, load: Load, grid: Grid, places: Sequence[Place], begin: Callable[[Place], None], keep: Keep
) -> None:
    """One item of work for each cell, so that a cell that is finished is kept, whatever happens to the others.

    An item that cannot travel, or whose worker dies, is an error in its cell. Only a model that is another one, and an
    interrupt, end everything; what has not begun is cancelled, and what is finished is kept.
    """
    parcels = {id(place.edit): Parcel.of(grid.task, place.edit) for place in places}
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

    def forget(self) -> None:
        _kept.__dict__.get("models", {}).pop(self.key, None)


@dataclass(frozen=True, eq=False)
class Parcel:
    """Task and edit with their tensors as bytes: sent as tensors, each would take a file handle on the way."""

    content: Any

    @classmethod
    def of(cls, task: Task, edit: Edit | None) -> "Parcel":
        return cls(_packed((task, edit)))

    def opened(self) -> tuple[Task, Edit | None]:
        task, edit = _unpacked(self.content)
        return task, edit


@dataclass(frozen=True)
class _Numbers:
    """A tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    raw: bytes


@dataclass(frozen=True)
class _Fields:
    """A dataclass that holds tensors."""

    kind: type
    values: dict[str, Any]


_HOLD_TENSORS = (Task, Format, Prompts, Edit)


def _packed(value: Any) -> Any:
    if isinstance(value, Tensor):
        own = value.detach().cpu().contiguous()
        return _Numbers(own.dtype, tuple(own.shape), own.flatten().view(torch.uint8).numpy().tobytes())
    if isinstance(value, _HOLD_TENSORS):
        return _Fields(type(value), {field.name: _packed(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, Mapping):
        return {key: _packed(each) for key, each in value.items()}
    return tuple(map(_packed, value)) if isinstance(value, tuple) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, _Numbers):
        if not value.raw:
            return torch.zeros(value.shape, dtype=value.dtype)
        return torch.frombuffer(bytearray(value.raw), dtype=value.dtype).reshape(value.shape)
    if isinstance(value, _Fields):
        return value.kind(**{name: _unpacked(each) for name, each in value.values.items()})
    if isinstance(value, Mapping):
        return {key: _unpacked(each) for key, each in value.items()}
    return tuple(map(_unpacked, value)) if isinstance(value, tuple) else value


_kept = threading.local()
"""The models that this thread has loaded: two threads never edit the same one."""


def _work(subject: Loaded, original: Loaded, parcel: Parcel, test: Test, cell: Cell) -> dict[str, Any]:
    model, (task, edit) = subject.model(), parcel.opened()
    clean = partial(_taken_back, original)
    try:
        with nullcontext() if edit is None else edit.applied(model):
            return encoded(tested(model, task, test, cell, clean, Snapshot.of(model)))
    except BaseException:  # what a test did to it could not be put back
        subject.forget()
        raise


def _taken_back(original: Loaded) -> Any:
    return taken_back(original.model(), original.fingerprint)


def _cell(future: "Future[Any]", place: Place) -> Cell:
    try:
        return decoded(future.result())
    except OtherModelError:
        raise
    except Exception as problem:
        return replace(place.cell, error=told(problem))
