"""The numbers of a report over seeds: of rows and tests, of curves, and of paired differences."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.results import Result, between, ends_over_seeds, facts_of, interval_over_seeds

if TYPE_CHECKING:
    from pandas import DataFrame


Grouped = dict[tuple[str, str], list[Cell]]


def by_row_and_test(cells: Iterable[Cell]) -> Grouped:
    """(row, test) -> their cells, one for each seed."""
    groups: Grouped = {}
    for cell in cells:
        groups.setdefault((cell.row, cell.test), []).append(cell)
    return groups


def first_results(cells: Iterable[Cell]) -> dict[str, Result | None]:
    """Test -> its first result, which has the sense, chance and unit of all others; None if all failed."""
    first: dict[str, Result | None] = {}
    for cell in cells:
        first[cell.test] = first.get(cell.test) or cell.result
    return first


def value_over_seeds(cells: Sequence[Cell]) -> float:
    """Mean over the seeds that gave a result; NaN if none did."""
    values = [cell.result.value for cell in cells if cell.result is not None]
    return sum(values) / len(values) if values else float("nan")


def interval_of(cells: Sequence[Cell]) -> tuple[float, float]:
    """The interval over facts and the seeds that gave a result, of which there must be one."""
    pairs = [(cell.result, cell.seed) for cell in cells if cell.result is not None]
    return interval_over_seeds([result for result, _ in pairs], [seed for _, seed in pairs])


def pooled_frame(cells: Iterable[Cell]) -> "DataFrame":
    """One row per row and test: mean over seeds, interval over facts and seeds."""
    import pandas as pd

    rows = [{"row": row, "test": test} | _pooled(same) for (row, test), same in by_row_and_test(cells).items()]
    columns = ["row", "test", "value", "low", "high", "chance", "n", "seeds", "sense", "unit"]
    return pd.DataFrame(rows, columns=columns).set_index(["row", "test"])


def paired_difference(cells: Sequence[Cell], reference: Sequence[Cell]) -> dict[str, float]:
    """The keys difference, low and high, of results of one seed; a single result is paired with all of the other."""
    paired = _pairs(cells, reference)
    if not paired:
        return {}
    differences = [one.difference(other) for one, other, _ in paired]
    if len(differences) == 1:
        return dict(zip(("difference", "low", "high"), differences[0], strict=True))
    values = [(one.per_example.double() - other.per_example.double())[:, None] for one, other, _ in paired]
    facts, seeds = [facts_of(one) for one, *_ in paired], [seed for *_, seed in paired]
    low, high = ends_over_seeds(values, facts, seeds, between(*paired[0][:2]))
    mean = sum(difference for difference, *_ in differences) / len(differences)
    return {"difference": mean, "low": float(low), "high": float(high)}


def _pairs(cells: Sequence[Cell], reference: Sequence[Cell]) -> list[tuple[Result, Result, int]]:
    own = {cell.seed: cell.result for cell in cells if cell.result is not None}
    others = {cell.seed: cell.result for cell in reference if cell.result is not None}
    if min(len(own), len(others)) == 1:
        return [(one, other, i if len(own) > 1 else j) for i, one in own.items() for j, other in others.items()]
    return [(one, others[seed], seed) for seed, one in own.items() if seed in others]


def curve_over_seeds(cells: Sequence[Cell]) -> "DataFrame":
    """The curve of one row and test: index point; columns value, low, high over facts and seeds."""
    import pandas as pd

    measured = [(cell.result, cell.result.curve, cell.seed) for cell in cells if cell.result and cell.result.curve]
    points = tuple(dict.fromkeys(point for _, curve, _ in measured for point in curve.points))
    if len(measured) == 1:
        return measured[0][1].interval()
    values, facts = [], []
    for result, curve, _ in measured:
        # NaN at the points that this curve does not have.
        at_points = torch.full((len(curve.per_prompt), len(points)), torch.nan, dtype=torch.float64)
        at_points[:, [points.index(point) for point in curve.points]] = curve.per_prompt.double()
        values.append(at_points)
        # A curve may be of other examples than its result.
        names = result.names if len(result.names) == len(at_points) else map(str, range(len(at_points)))
        facts.append(tuple(names))
    low, high = ends_over_seeds(values, facts, [seed for *_, seed in measured], measured[0][1].limits)
    mean = torch.stack([value.mean(0) for value in values]).nanmean(0)
    columns = {"value": mean.tolist(), "low": low.tolist(), "high": high.tolist()}
    return pd.DataFrame(columns, index=pd.Index(points, name="point"))


def _pooled(cells: Sequence[Cell]) -> dict[str, Any]:
    results = [cell.result for cell in cells if cell.result is not None]
    if not results:
        return {"value": float("nan"), "seeds": 0}
    low, high = interval_of(cells)
    n = max(len(result.per_example) for result in results)
    numbers = {"value": value_over_seeds(cells), "low": low, "high": high, "n": n, "seeds": len(results)}
    return numbers | meaning_of(results[0])


def meaning_of(result: Result) -> dict[str, Any]:
    """Its columns chance, sense and unit."""
    return {"chance": result.chance, "sense": result.sense, "unit": result.unit}
