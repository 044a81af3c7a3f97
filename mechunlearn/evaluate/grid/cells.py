"""Cells: the result of one test of one row with one seed, how it is computed, and the file of finished cells."""

import inspect
import operator
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from mechunlearn import files
from mechunlearn.evaluate.asking import Original, Test
from mechunlearn.evaluate.results import Result
from mechunlearn.identity import key_of
from mechunlearn.model import Model, device_of
from mechunlearn.model.guard import Snapshot
from mechunlearn.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Cell:
    """The result of a test, or the error that it raised."""

    row: str
    """"original", the name of an edit, or the name of a control model."""
    test: str
    """The name of the test."""
    seed: int
    result: Result | None
    error: str = ""
    """The type and message of the exception that the test raised; empty if it gave a result."""
    seconds: float = 0.0


def computed(model: Model, task: Task, test: Test, cell: Cell, original: Original, kept: Snapshot) -> Cell:
    """The cell with its result or its error; the model has the weights of `kept` again, also after an interrupt."""
    extras = {"seed": cell.seed, "original": original}
    started = perf_counter()
    try:
        with _global_seed(cell.seed if takes(test, "seed") else 0, device_of(model)):
            output = test(model, task, **{name: value for name, value in extras.items() if takes(test, name)})
        result, error = _checked_result(output, cell.test), ""
    except Exception as problem:
        result, error = None, error_text(problem)
    finally:
        changed = kept.restore(model)
    if changed:
        result, before = None, f" It raised {error}" if error else ""
        error = (
            f"RuntimeError: expected a test that leaves the model as it was, got other values in {len(changed)} "
            f"parameters ({', '.join(changed[:3])}), which were put back: restore the weights in the test.{before}"
        )
    return replace(cell, result=result, error=error, seconds=perf_counter() - started)


def takes(test: Test, name: str) -> bool:
    """Whether a test has a parameter of this name that `functools.partial` has not bound."""
    bound = test.keywords if isinstance(test, partial) else {}
    try:
        parameters = inspect.signature(test).parameters
    except ValueError:  # of what is not written in Python
        return False
    return name in parameters and name not in bound


def error_text(problem: BaseException) -> str:
    """The type and message of an exception."""
    return f"{type(problem).__name__}: {problem}"


def _checked_result(output: Any, name: str) -> Result:
    """A test's result with its tensors on the CPU, as numbers; ValueError if it is not a result or not finite."""
    if not isinstance(output, Result):
        raise ValueError(
            f"expected a test (model, task) -> Result for the column {name!r}, got one that returns "
            f"{type(output).__name__}: wrap the number in mu.evaluate.Result(per_example=..., sense=...)."
        )
    values = output.per_example.detach().cpu()
    if len(values) == 0 or not bool(torch.isfinite(values).all()):
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        what = f"NaN or infinity for examples {bad[:5]}" if bad else "none"
        raise ValueError(f"expected finite values from the test {name!r}, got {what}: check the test.")
    numbers = values if values.is_floating_point() else values.float()
    curve = output.curve and replace(output.curve, per_prompt=output.curve.per_prompt.detach().cpu())
    control = None if output.control is None else _checked_result(output.control, f"control of {name}")
    return replace(output, per_example=numbers, names=tuple(output.names), curve=curve, control=control)


@contextmanager
def _global_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the global generators start from the seed; after, they go on as if nothing had been drawn."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(operator.index(seed))
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


@dataclass(frozen=True)
class CellsFile:
    """A line of JSON for each cell, with its SHA-256, written as they come; cells of other identities stay unused."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.absolute().parent.is_dir():
            raise ValueError(f"expected results in a folder that exists, got {self.path}: make the folder first.")

    def finished(self) -> dict[str, Cell]:
        """Key (of an identity) -> the cell with a result. Damaged lines are left out with a warning."""
        if not self.path.exists():
            return {}
        cells: dict[str, Cell] = {}
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                content = files.from_text(line, "Cell", Cell, path=self.path)
            except files.FormatError:
                raise
            except ValueError:
                warnings.warn(
                    f"line {number} of {self.path} is torn or damaged: that cell is computed again.", stacklevel=2
                )
            else:
                if content["cell"].result is not None:
                    cells[content["key"]] = content["cell"]
        return cells

    def append(self, identity: Mapping[str, Any], cell: Cell) -> None:
        """One more line, which is on the disk when this returns."""
        content = {"key": key_of(identity), "identity": identity, "cell": cell}
        line = files.to_text("Cell", content).encode() + b"\n"
        with self.path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            # What was written before may be torn: it gets its end, so that the next line is readable.
            file.write(line if file.read() in (b"", b"\n") else b"\n" + line)
            file.flush()
            os.fsync(file.fileno())
