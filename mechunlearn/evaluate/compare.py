"""Every test on the original and on every edit, in one table."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from mechunlearn.evaluate.in_task import Test, every_format
from mechunlearn.evaluate.result import Result
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """Results of every test for the original model and every edit."""

    results: Mapping[str, Mapping[str, Result]]
    """Row -> column -> result; the first row is the original model."""
    weights: Mapping[str, int]
    """Row -> number of edited weights."""

    @property
    def table(self) -> "DataFrame":
        """Rows: the original, then the edits. Columns: the tests, and the number of edited weights."""
        import pandas as pd

        rows = {row: {name: result.value for name, result in found.items()} for row, found in self.results.items()}
        frame = pd.DataFrame.from_dict(rows, orient="index")
        return frame.assign(**{"edited weights": list(self.weights.values())})

    @property
    def intervals(self) -> "DataFrame":
        """95 % bootstrap intervals over facts: one row per edit and test, columns value, low, high,
        chance, n, sense."""
        import pandas as pd

        rows = [
            {"edit": row, "test": name, "value": result.value, "low": result.interval()[0]}
            | {"high": result.interval()[1], "chance": result.chance, "n": len(result.per_example)}
            | {"sense": result.sense}
            for row, found in self.results.items()
            for name, result in found.items()
        ]
        return pd.DataFrame(rows).set_index(["edit", "test"])

    def to_markdown(self) -> str:
        """The table with its chance levels as a last row, and what the numbers mean below."""
        table = self.table
        rows = [["", *table.columns], ["---"] * (len(table.columns) + 1)]
        for name, row in table.iterrows():
            rows.append([str(name), *(f"{value:.3f}" for value in row[:-1]), f"{int(row.iloc[-1]):,}"])
        first = next(iter(self.results.values()))
        chances = [result.chance for result in first.values()]
        rows.append(["*chance*", *("" if chance is None else f"{chance:.3f}" for chance in chances), ""])
        senses = dict.fromkeys(f"{_meaning(r)}: {self._columns(r.sense)}" for r in first.values())
        return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\n" + "\n".join(f"- {s}" for s in senses)

    def against(self, row: str) -> "DataFrame":
        """Each other row minus `row` on the same facts: difference, low, high (95 %, paired bootstrap)."""
        import pandas as pd

        rows = []
        for name, found in self.results.items():
            for test, result in found.items():
                if name != row:
                    difference, low, high = result.difference(self.results[row][test])
                    rows.append({"edit": name, "test": test, "difference": difference, "low": low, "high": high})
        return pd.DataFrame(rows).set_index(["edit", "test"])

    def plot(self) -> "Figure":
        """A group of bars for each test whose unit is a share, a bar per row, with 95 % intervals; chance is a dash."""
        import plotly.graph_objects as go

        first = next(iter(self.results.values()))
        shown = [name for name, result in first.items() if result.unit == "share"]
        figure = go.Figure()
        for row, found in self.results.items():
            ends = [found[name].interval() for name in shown]
            values = [found[name].value for name in shown]
            above = [high - value for (_, high), value in zip(ends, values, strict=True)]
            below = [value - low for (low, _), value in zip(ends, values, strict=True)]
            bars = {"type": "data", "array": above, "arrayminus": below, "symmetric": False, "thickness": 1}
            figure.add_bar(name=row, x=shown, y=values, error_y=bars)
        marker = {"symbol": "line-ew", "size": 40, "color": "black", "line": {"width": 1.5, "color": "black"}}
        figure.add_scatter(name="chance", x=shown, y=[first[n].chance for n in shown], mode="markers", marker=marker)
        return figure.update_layout(
            barmode="group", template="plotly_white", yaxis={"range": [0, 1.05], "title": "share"}
        )

    def _columns(self, sense: str) -> str:
        first = next(iter(self.results.values()))
        return "; ".join(name for name, result in first.items() if result.sense == sense)

    def __repr__(self) -> str:
        return self.to_markdown()

    def _repr_html_(self) -> str:
        return self.table.to_html(float_format="{:.3f}".format)


def compare(
    model: Model,
    task: Task,
    edits: Mapping[str, Edit],
    *,
    metrics: Mapping[str, Test] | None = None,
    progress: bool = True,
) -> Report:
    """Run every test on the original model and with every edit applied; the model is left as it was.

    `metrics`: column -> `(model, task) -> Result`; default: everything that the task can be asked
    (`every_format(task)`), while `paper_metrics` has the paper's columns. Cost: one forward over each
    test's prompts, per row. ValueError, before anything runs, if an edit was made for other weights or is
    named "original".
    """
    if "original" in edits:
        raise ValueError('expected names of edits other than "original", which is the first row: rename that edit.')
    for edit in edits.values():
        edit.check(model)
    metrics = every_format(task) if metrics is None else metrics
    results: dict[str, dict[str, Result]] = {}
    for row in tqdm(["original", *edits], desc="evaluate", disable=not progress, leave=False):
        with edits[row].applied(model) if row in edits else nullcontext():
            results[row] = {name: _run(test, name, model, task) for name, test in metrics.items()}
    return Report(results, {"original": 0} | {name: edit.n_parameters for name, edit in edits.items()})


def _meaning(result: Result) -> str:
    return result.sense if result.unit in ("", "share") else f"{result.sense}, {result.unit}"


def _run(test: Test, name: str, model: Model, task: Task) -> Result:
    result = test(model, task)
    if not isinstance(result, Result):
        raise ValueError(
            f"expected a test (model, task) -> Result for the column {name!r}, got one that returns "
            f"{type(result).__name__}: wrap the number in mu.evaluate.Result(per_example=..., sense=...)."
        )
    return result
