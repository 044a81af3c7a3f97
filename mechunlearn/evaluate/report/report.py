"""The results of `compare`: tables, intervals, differences, plots, one page, one file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.grid.file import decoded, encoded
from mechunlearn.evaluate.report import frames, page, words
from mechunlearn.evaluate.report.figures import bars, curves, groups_of_shares, tests_with_curves
from mechunlearn.evaluate.report.tradeoffs import check_tests, damage_tests, forget_tests, pareto, sizes
from mechunlearn.evaluate.results import Result, pooled
from mechunlearn.files import read_json, write_json

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """Results of every test for the original model, every edit and every control model.

    A number is the mean over seeds of the mean over examples. Intervals are of 95 %: of one seed over facts
    (`Result.interval`), of several over facts and seeds together (both are drawn anew).
    """

    cells: tuple[Cell, ...]
    """One for each row, test and seed. Rows: the original, the edits, the controls; columns: the tests."""
    weights: Mapping[str, int]
    """Row -> number of edited weights; 0 for models that are not edited."""
    provenance: Mapping[str, Any]
    """Versions, seeds, fingerprints, masks and settings."""

    @property
    def results(self) -> dict[str, dict[str, Result]]:
        """Row -> column -> result, pooled over seeds; a test that failed with every seed has none."""
        found: dict[str, dict[str, list[Result]]] = {row: {} for row in self.weights}
        for cell in self.cells:
            if cell.result is not None:
                found[cell.row].setdefault(cell.test, []).append(cell.result)
        return {row: {test: pooled(each) for test, each in tests.items()} for row, tests in found.items()}

    @property
    def table(self) -> "DataFrame":
        """Rows: the original, then the edits and controls. Columns: the tests, and the number of edited weights.

        NaN where a test failed (`errors` says why) or was not run.
        """
        import pandas as pd

        values = {key: frames.value_over_seeds(cells) for key, cells in frames.by_row_and_test(self.cells).items()}
        tests = dict.fromkeys(cell.test for cell in self.cells)
        rows = [[values.get((row, test), float("nan")) for test in tests] for row in self.weights]
        frame = pd.DataFrame(rows, index=list(self.weights), columns=list(tests), dtype=float)
        return frame.assign(**{"edited weights": list(self.weights.values())})

    @property
    def intervals(self) -> "DataFrame":
        """One line per row and test: value, low, high, chance, n (examples of a seed), seeds, sense, unit."""
        return frames.pooled_frame(self.cells)

    @property
    def errors(self) -> "DataFrame":
        """The cells without a result: row, test, seed, and what was raised."""
        frame = self.to_frame()
        failed = [cell.result is None for cell in self.cells]
        return frame.loc[failed, ["row", "test", "seed", "error"]].reset_index(drop=True)

    def to_frame(self) -> "DataFrame":
        """One line per row, test and seed: value, low, high, chance, n, sense, unit, the value of the control, error,
        seconds."""
        return frames.cell_frame(self.cells)

    def per_example(self) -> "DataFrame":
        """One line per row, test, seed and example: its name and value."""
        return frames.example_frame(self.cells)

    def curves(self) -> "DataFrame":
        """One line per row, test, seed and point of a curve (budget of an attack, layer of a probe): value, low, high,
        chance, the value of the control there, n, unit."""
        return frames.curve_frame(self.cells)

    @property
    def curve_intervals(self) -> "DataFrame":
        """One line per row, test and point of a curve: value, low, high over facts and seeds, chance, axis, and the
        control's value there, of the tests whose every result has one."""
        return frames.pooled_curve_frame(self.cells)

    def against(self, row: str) -> "DataFrame":
        """Each other row minus `row` on the same facts: difference, low, high (95 %, paired), NaN where one failed.

        ValueError for a row that is not in the report and for results on different examples.
        """
        if row not in self.weights:
            raise ValueError(f"expected a row of the report ({', '.join(self.weights)}), got {row!r}.")
        return frames.difference_frame(self.cells, row)

    def select(self, *, rows: Sequence[str] | None = None, tests: Sequence[str] | None = None) -> "Report":
        """The same report with fewer rows and columns, in the order given; ValueError for one that it lacks."""
        known = {"rows": list(self.weights), "tests": list(dict.fromkeys(cell.test for cell in self.cells))}
        kept_rows, kept_tests = _chosen(rows, known["rows"], "rows"), _chosen(tests, known["tests"], "tests")
        chosen = [cell for cell in self.cells if cell.row in kept_rows and cell.test in kept_tests]
        chosen.sort(key=lambda cell: (kept_rows.index(cell.row), kept_tests.index(cell.test)))
        return Report(tuple(chosen), {row: self.weights[row] for row in kept_rows}, self.provenance)

    def to_markdown(self, *, intervals: bool = False) -> str:
        """The table with chance as its last row, or of more than 12 tests with a line for each; below it what the
        numbers mean and what failed why."""
        return words.markdown(self.cells, self.weights, intervals=intervals)

    def to_latex(self, *, intervals: bool = False) -> str:
        """The table for LaTeX with the package booktabs; what the numbers mean and what failed is in comments."""
        return words.latex(self.cells, self.weights, intervals=intervals)

    def to_html(
        self,
        path: str | Path,
        *,
        title: str = "Is it gone?",
        forgetting: Sequence[str] | None = None,
        damage: Sequence[str] | None = None,
    ) -> None:
        """Write one page that needs nothing else (5 MB, plotly.js is in it): the table, the plots that there are
        numbers for, what failed, and the provenance. `forgetting`, `damage`: as for `plot_pareto`."""
        chosen = self._forgetting(forgetting), self._damage(damage)
        page.write_page(path, self.cells, self.weights, self.provenance, *chosen, title=title)

    def save(self, path: str | Path) -> None:
        """Write one JSON file: all results, bit for bit, with provenance and a checksum."""
        write_report(path, self.cells, self.weights, self.provenance)

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """What `save` wrote; ValueError if the file is of another kind, cut short or altered."""
        return cls(*read_report(path))

    def plot(self) -> "Figure":
        """Bars of every test whose unit is a share, forget and retain side by side, with intervals and chance."""
        return bars(self.cells, groups_of_shares(self.cells), title="Share by test")

    def plot_curves(self, tests: Sequence[str] | None = None) -> "Figure":
        """What attacks reach over their budget: a panel per test that has a curve, a line per row."""
        return self._lines(tests, layers=False, title="Attacks over their budget")

    def plot_layers(self, tests: Sequence[str] | None = None) -> "Figure":
        """What probes and lenses read at each layer: a panel per test that has such a curve, a line per row."""
        return self._lines(tests, layers=True, title="By layer")

    def plot_sizes(self, *, forgetting: Sequence[str] | None = None, damage: Sequence[str] | None = None) -> "Figure":
        """What is left of the knowledge and of general ability over the number of edited weights.

        `forgetting`, `damage`: as for `plot_pareto`.
        """
        chosen = self._forgetting(forgetting), self._damage(damage)
        check_tests(self.cells, chosen[0], "forgetting")
        return sizes(self.cells, self.weights, *chosen, title="Size of the edit")

    def plot_pareto(self, *, forgetting: Sequence[str] | None = None, damage: str | None = None) -> "Figure":
        """What is left of the knowledge against damage, and the rows that no other beats in both.

        `forgetting`: tests whose mean is what is left; default: every "forget, X" that has a "retain, X". `damage`: a
        test whose change from the row "original" is the damage (of a share its drop, else its rise); default: "text
        loss", else "other knowledge". ValueError where the report has no such test or no row "original".
        """
        chosen, price = self._forgetting(forgetting), self._damage(None if damage is None else [damage])[:1]
        check_tests(self.cells, chosen, "forgetting")
        check_tests(self.cells, price, "damage")
        if "original" not in self.weights:
            raise ValueError('expected the row "original", which damage is measured from, got a report without it.')
        return pareto(self.cells, chosen, price[0], title="Forgetting against damage")

    def _lines(self, tests: Sequence[str] | None, *, layers: bool, title: str) -> "Figure":
        known = tests_with_curves(self.cells, layers=layers)
        if not known:
            raise ValueError("expected a test with such a curve, got none: run an attack or a probe that gives one.")
        return curves(self.cells, _chosen(tests, known, "tests with such a curve"), title=title)

    def _forgetting(self, tests: Sequence[str] | None) -> Sequence[str]:
        if tests is not None:
            check_tests(self.cells, tests, "forgetting")
        return forget_tests(self.cells) if tests is None else tests

    def _damage(self, tests: Sequence[str] | None) -> Sequence[str]:
        if tests is not None:
            check_tests(self.cells, tests, "damage")
        return damage_tests(self.cells) if tests is None else tests

    def __repr__(self) -> str:
        return self.to_markdown()

    def _repr_html_(self) -> str:
        return page.table(self.cells, self.weights)


def _chosen(given: Sequence[str] | None, known: Sequence[str], what: str) -> list[str]:
    unknown = [name for name in given or () if name not in known]
    if unknown:
        raise ValueError(f"expected {what} of the report ({'; '.join(known)}), got {unknown}.")
    return list(known if given is None else dict.fromkeys(given))


def write_report(
    path: str | Path, cells: Sequence[Cell], weights: Mapping[str, int], provenance: Mapping[str, Any]
) -> None:
    content = {
        "cells": [encoded(cell) for cell in cells],
        "rows": [{"row": row, "weights": count} for row, count in weights.items()],  # a list keeps its order
        "provenance": dict(provenance),
    }
    write_json(path, "Report", content)


def read_report(path: str | Path) -> tuple[tuple[Cell, ...], dict[str, int], dict[str, Any]]:
    """Cells, weights and provenance."""
    content = read_json(path, "Report")
    weights = {each["row"]: each["weights"] for each in content["rows"]}
    return tuple(decoded(cell) for cell in content["cells"]), weights, content["provenance"]
