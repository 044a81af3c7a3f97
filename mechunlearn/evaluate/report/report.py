"""The results of `compare`: tables, intervals, differences, plots, one page, one file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mechunlearn import files
from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.report import frames, page, text
from mechunlearn.evaluate.report.figures import bars, curves, groups_of_shares, tests_with_curves
from mechunlearn.evaluate.report.tradeoffs import check_tests, damage_tests, forget_tests, pareto, sizes
from mechunlearn.evaluate.results import Result, pooled

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
        results: dict[str, dict[str, list[Result]]] = {row: {} for row in self.weights}
        for cell in self.cells:
            if cell.result is not None:
                results[cell.row].setdefault(cell.test, []).append(cell.result)
        return {row: {test: pooled(by_seed) for test, by_seed in tests.items()} for row, tests in results.items()}

    @property
    def table(self) -> "DataFrame":
        """A row for each model, a column for each test and for the number of edited weights; NaN: failed or not run."""
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
        """One line per row, test and seed: value, low, high, chance, n, sense, unit, control, error, seconds."""
        import pandas as pd

        rows = []
        for cell in self.cells:
            labels, result = {name: value for name, value in vars(cell).items() if name != "result"}, cell.result
            if result is not None:
                low, high = result.interval()
                control = None if result.control is None else result.control.value
                labels |= {"value": result.value, "low": low, "high": high, "n": len(result.per_example)}
                labels |= {"control": control} | frames.meaning_of(result)
            rows.append(labels)
        columns = ["row", "test", "seed", "value", "low", "high", "chance", "n", "sense", "unit", "control", "error"]
        return pd.DataFrame(rows, columns=[*columns, "seconds"])

    def per_example(self) -> "DataFrame":
        """One line per row, test, seed and example: its name and value."""
        import pandas as pd

        rows = [
            (cell.row, cell.test, cell.seed, i, cell.result.names[i] if cell.result.names else "", value)
            for cell in self.cells
            if cell.result is not None
            for i, value in enumerate(cell.result.per_example.tolist())
        ]
        return pd.DataFrame(rows, columns=["row", "test", "seed", "example", "name", "value"])

    def curves(self) -> "DataFrame":
        """One line per row, test, seed and point of a curve (budget of an attack, layer of a probe): value, low, high,
        chance, the value of the control there, n, unit."""
        import pandas as pd

        rows = []
        for cell in self.cells:
            if cell.result is not None and cell.result.curve is not None:
                curve, control = cell.result.curve, cell.result.control and cell.result.control.curve
                beside = {} if control is None else dict(zip(control.points, control.mean.tolist(), strict=True))
                labels, n = (cell.row, cell.test, cell.seed, curve.axis), len(curve.per_prompt)
                for point, *ends in curve.interval().itertuples():
                    rows.append((*labels, point, *ends, curve.chance, beside.get(point), n, curve.unit))
        columns = ["row", "test", "seed", "axis", "point", "value", "low", "high", "chance", "control", "n", "unit"]
        return pd.DataFrame(rows, columns=columns)

    @property
    def curve_intervals(self) -> "DataFrame":
        """One line per row, test and point of a curve: value, low, high over facts and seeds, chance, axis, and the
        control's value there, of the tests whose every result has one."""
        import pandas as pd

        pooled_curves = []
        with_curves = [cell for cell in self.cells if cell.result is not None and cell.result.curve is not None]
        for (row, test), alike in frames.by_row_and_test(with_curves).items():
            curve = alike[0].result.curve if alike[0].result else None
            assert curve is not None  # by the choice of cells above
            about = {"row": row, "test": test, "axis": curve.axis, "chance": curve.chance}
            controls = [cell.result.control.curve for cell in alike if cell.result and cell.result.control]
            means = [control.mean for control in controls if control is not None]
            mean = torch.stack(means).mean(0).tolist() if len(means) == len(alike) else None
            pooled_curves.append(frames.curve_over_seeds(alike).reset_index().assign(**about, control=mean))
        columns = ["row", "test", "axis", "point", "value", "low", "high", "chance", "control"]
        return pd.concat(pooled_curves).reindex(columns=columns) if pooled_curves else pd.DataFrame(columns=columns)

    def against(self, row: str) -> "DataFrame":
        """Each other row minus `row` on the same facts: difference, low, high (95 %, paired), NaN where one failed."""
        import pandas as pd

        if row not in self.weights:
            raise ValueError(f"expected a row of the report ({', '.join(self.weights)}), got {row!r}.")
        grouped = frames.by_row_and_test(self.cells)
        rows = [
            {"row": other, "test": test} | frames.paired_difference(same, grouped.get((row, test), []))
            for (other, test), same in grouped.items()
            if other != row
        ]
        columns = ["row", "test", "difference", "low", "high"]
        return pd.DataFrame(rows, columns=columns).set_index(["row", "test"])

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
        return text.markdown(self.cells, self.weights, intervals=intervals)

    def to_latex(self, *, intervals: bool = False) -> str:
        """The table for LaTeX with the package booktabs; what the numbers mean and what failed is in comments."""
        return text.latex(self.cells, self.weights, intervals=intervals)

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
        chosen = self._tests(forgetting, damage)
        page.write_page(path, self.cells, self.weights, self.provenance, *chosen, title=title)

    def save(self, path: str | Path) -> None:
        """Write one JSON file: all results, bit for bit, with provenance and a checksum."""
        files.save(self, path, text=True)

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """What `save` wrote; ValueError for a file that is damaged, of another class or of mechunlearn 0.1.0."""
        return files.load(cls, path)

    def plot(self) -> "Figure":
        """Bars of every test whose unit is a share, forget and retain side by side, with intervals and chance."""
        panels = groups_of_shares(self.cells)
        if not panels:
            raise ValueError(
                "expected a test whose unit is a share, such as an accuracy or a probability, got none: to_frame() has "
                "all numbers; a test of your own gives Result(..., unit='share')."
            )
        return bars(self.cells, panels, title="Share by test")

    def plot_curves(self, tests: Sequence[str] | None = None) -> "Figure":
        """Attacks over their budget: a panel per test that has a curve, a line per row."""
        return self._lines(tests, layers=False, title="Attacks over their budget")

    def plot_layers(self, tests: Sequence[str] | None = None) -> "Figure":
        """Probes and lenses over layers: a panel per test that has such a curve, a line per row."""
        return self._lines(tests, layers=True, title="By layer")

    def plot_sizes(self, *, forgetting: Sequence[str] | None = None, damage: Sequence[str] | None = None) -> "Figure":
        """The knowledge left and the damage done (as for `plot_pareto`), over the number of edited weights."""
        chosen = self._tests(forgetting, damage)
        check_tests(self.cells, chosen[0], "forgetting")
        return sizes(self.cells, self.weights, *chosen, title="Size of the edit")

    def plot_pareto(self, *, forgetting: Sequence[str] | None = None, damage: str | None = None) -> "Figure":
        """The knowledge left against the damage done, and the rows that no other beats in both.

        `forgetting`: the tests whose mean is the knowledge left; default: every "forget, X" that has a "retain, X".
        `damage`: the test whose change from the row "original" is the damage (the drop of a share, the rise of anything
        else); default: "text loss", else "other knowledge". ValueError without such a test or the row "original".
        """
        chosen, price = self._tests(forgetting, None if damage is None else [damage])
        check_tests(self.cells, chosen, "forgetting")
        check_tests(self.cells, price[:1], "damage")
        if "original" not in self.weights:
            raise ValueError('expected the row "original", which damage is measured from, got a report without it.')
        return pareto(self.cells, chosen, price[0], title="Forgetting against damage")

    def _lines(self, tests: Sequence[str] | None, *, layers: bool, title: str) -> "Figure":
        known = tests_with_curves(self.cells, layers=layers)
        if not known:
            raise ValueError("expected a test with such a curve, got none: run an attack or a probe that gives one.")
        return curves(self.cells, _chosen(tests, known, "tests with such a curve"), title=title)

    def _tests(
        self, forgetting: Sequence[str] | None, damage: Sequence[str] | None
    ) -> tuple[Sequence[str], Sequence[str]]:
        for role, tests in {"forgetting": forgetting, "damage": damage}.items():
            if tests is not None:
                check_tests(self.cells, tests, role)
        forgetting = forget_tests(self.cells) if forgetting is None else forgetting
        return forgetting, damage_tests(self.cells) if damage is None else damage

    __repr__ = to_markdown

    def _repr_html_(self) -> str:
        return page.table(self.cells, self.weights)


def _chosen(names: Sequence[str] | None, known: Sequence[str], what: str) -> list[str]:
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"expected {what} of the report ({'; '.join(known)}), got {unknown}.")
    return list(known if names is None else dict.fromkeys(names))
