"""One test of one row with one seed: the cell, and how its test is run; what goes wrong stays in the cell."""

import inspect
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch

from mechunlearn.evaluate.asking import Test
from mechunlearn.evaluate.results import Result
from mechunlearn.model import Model, device_of
from mechunlearn.model.guard import Snapshot
from mechunlearn.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Cell:
    """A result, or why there is none."""

    row: str
    """"original", the name of an edit, or the name of a control model."""
    test: str
    """The column."""
    seed: int
    result: Result | None
    error: str = ""
    """Kind and message of what the test raised."""
    seconds: float = 0.0


Original: TypeAlias = Callable[[], AbstractContextManager[Model]]
"""`with original() as model:` is the model with its original weights, and after it the tested one again."""


def tested(model: Model, task: Task, test: Test, cell: Cell, original: Original, kept: Snapshot) -> Cell:
    """The cell with its result or its error; the model has the weights of `kept` again, also after an interrupt.

    Random numbers that the test takes from the global generators depend on the seed alone, and not on what ran before.
    """
    given = {"seed": cell.seed, "original": original}
    started, changed = perf_counter(), []
    try:
        with _global_seed(cell.seed if takes(test, "seed") else 0, device_of(model)):
            found = test(model, task, **{name: value for name, value in given.items() if takes(test, name)})
        result, error = _checked(found, cell.test), ""
    except Exception as problem:
        result, error = None, told(problem)
    finally:
        changed = kept.restore(model)
    if changed:
        result, error = None, _left_changed(changed, error)
    return replace(cell, result=result, error=error, seconds=perf_counter() - started)


def takes(test: Test, name: str) -> bool:
    """Whether a test has a parameter of this name that `functools.partial` has not bound."""
    bound = test.keywords if isinstance(test, partial) else {}
    try:
        parameters = inspect.signature(test).parameters
    except ValueError:  # of what is not written in Python
        return False
    return name in parameters and name not in bound


def told(problem: BaseException) -> str:
    """Kind and message."""
    return f"{type(problem).__name__}: {problem}"


def _checked(found: Any, name: str) -> Result:
    """In the memory of the CPU, as numbers."""
    if not isinstance(found, Result):
        raise ValueError(
            f"expected a test (model, task) -> Result for the column {name!r}, got one that returns "
            f"{type(found).__name__}: wrap the number in mu.evaluate.Result(per_example=..., sense=...)."
        )
    values = found.per_example.detach().cpu()
    if len(values) == 0 or not bool(torch.isfinite(values).all()):
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        what = f"NaN or infinity for examples {bad[:5]}" if bad else "none"
        raise ValueError(f"expected finite values from the test {name!r}, got {what}: check the test.")
    numbers = values if values.is_floating_point() else values.float()
    curve = found.curve and replace(found.curve, per_prompt=found.curve.per_prompt.detach().cpu())
    control = None if found.control is None else _checked(found.control, f"control of {name}")
    return replace(found, per_example=numbers, names=tuple(found.names), curve=curve, control=control)


def _left_changed(names: list[str], error: str) -> str:
    before = f" It raised {error}" if error else ""
    return (
        f"RuntimeError: expected a test that leaves the model as it was, got other values in {len(names)} parameters "
        f"({', '.join(names[:3])}), which were put back: restore the weights in the test.{before}"
    )


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
