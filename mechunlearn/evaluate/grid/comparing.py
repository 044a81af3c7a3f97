"""`compare`: every test on the original, on every edit and on every control, with every seed, in one report."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

from torch.nn import Module
from tqdm.auto import tqdm

from mechunlearn.evaluate.asking import Test, every_format
from mechunlearn.evaluate.grid.cells import Cell, CellsFile
from mechunlearn.evaluate.grid.rows import Grid, Load, Place, run_serially
from mechunlearn.evaluate.grid.workers import run_on
from mechunlearn.evaluate.report.report import Report
from mechunlearn.identity import key_of
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit


def compare(
    model: Model,
    task: Task,
    edits: Mapping[str, Edit | Sequence[Edit]],
    *,
    metrics: Mapping[str, Test] | None = None,
    seeds: Sequence[int] = (0,),
    controls: Mapping[str, Model | Load] | None = None,
    results: str | Path | None = None,
    executor: Executor | None = None,
    load: Load | None = None,
    progress: bool = True,
) -> Report:
    """Run every test on the original model, every edit and every control; all models are left as they were.

    - `edits`: row -> an edit, tested with every seed, or a sequence with one edit for each seed.
    - `metrics`: column -> a test `(model, task) -> Result`; default: `every_format(task)`. A test with a keyword `seed`
      runs once for each seed; one with `original` gets the original model.
    - `controls`: row -> another model with the same tokenizer, or a function that loads it, such as
      `partial(mu.testbed.load, without="basketball")`.
    - `results`: a file for finished cells; a later call runs only the others. A cell is the same if row, column, seed,
      model, edit, control, task, the test's own code and the versions are: take a new file if you change what it calls.
    - `executor`: any `concurrent.futures.Executor`, such as a `ProcessPoolExecutor` (start method "spawn"), for the
      same results.
    - `load`: with an executor, the function by which each worker loads the model. Controls must then be functions too.

    All is checked before anything runs. A test that raises, gives NaN or changes the model has an error in its cell.
    Random numbers are seeded for each cell. Cost: that of the tests, and a copy of the weights on the CPU. ValueError
    for edits of other weights, names that are taken, too few or many edits for the seeds, an executor without `load`,
    and, with `results`, a test that is bound to an object without a value.
    """
    metrics = every_format(task) if metrics is None else metrics
    grid = Grid.of(model, task, edits, metrics, seeds, controls or {})
    if executor is not None:
        _check_loads(load, grid)
    places = grid.places(for_file=results is not None)
    file = None if results is None else CellsFile(Path(results))
    finished = {} if file is None else file.finished()
    known = [(place, finished.get(key_of(place.identity))) for place in places]
    cells = {id(place): replace(cell, seed=place.cell.seed) for place, cell in known if cell is not None}
    todo = [place for place in places if id(place) not in cells]
    with tqdm(total=len(places), initial=len(cells), desc="evaluate", disable=not progress, leave=False) as bar:

        def begin(place: Place) -> None:
            bar.set_postfix_str(f"{place.cell.row}: {place.cell.test}")

        def keep(place: Place, cell: Cell) -> None:
            if file is not None:
                file.append(place.identity, cell)
            cells[id(place)] = cell
            bar.update()

        if executor is None:
            run_serially(grid, todo, begin, keep)
        else:
            assert load is not None
            run_on(executor, load, grid, todo, begin, keep)
    rows, tests = [row.name for row in grid.rows], [*metrics]
    order = sorted(places, key=lambda p: (rows.index(p.cell.row), tests.index(p.cell.test)))
    ordered = tuple(cells[id(place)] for place in order)
    return Report(ordered, {row.name: row.n_weights for row in grid.rows}, grid.provenance())


def _check_loads(load: Load | None, grid: Grid) -> None:
    if load is None:
        raise ValueError(
            "expected a function that loads the model in each worker, got none with an executor: pass load=..., such "
            "as mu.testbed.load or a functools.partial of TransformerBridge.boot_transformers."
        )
    for row in grid.rows:
        if isinstance(row.control, Module):
            raise ValueError(
                f"expected a function that loads the control {row.name!r} in each worker, got a model with an "
                f"executor: pass the function, such as functools.partial(mu.testbed.load, without=...)."
            )
