"""The plots of a report: bars of shares, curves along budgets and layers, and how they look."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import isnan
from typing import TYPE_CHECKING, Any, NamedTuple

from mechunlearn.components.plot import INK, ON_A_PAGE, Look, add_line, dressed, is_new, looks, shown, whiskers
from mechunlearn.curve import LAYERS
from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.report.frames import Grouped, by_row_and_test, curve_over_seeds, first_results, pooled_frame

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


class Point(NamedTuple):
    """A number with its interval."""

    value: float
    low: float
    high: float


_THICK = 13
"""Pixels of one bar."""


def groups_of_shares(cells: Sequence[Cell]) -> dict[str, dict[str, str]]:
    """Panel -> test -> its bar, of tests that gave a share: "forget, X" is X of "forget", the rest is in "other"."""
    panels: dict[str, dict[str, str]] = {"forget": {}, "retain": {}, "other": {}}
    for test, result in first_results(cells).items():
        if result is not None and result.unit == "share":
            side, _, name = test.partition(", ")
            panel, bar = (side, name) if side in ("forget", "retain") and name else ("other", test)
            panels[panel][test] = bar
    return {panel: tests for panel, tests in panels.items() if tests}


def bars(cells: Sequence[Cell], panels: Mapping[str, Mapping[str, str]], *, title: str = "") -> "Figure":
    """A panel of bars for each group of tests, with 95 % intervals; chance is a short line across the bars."""
    from plotly.subplots import make_subplots

    names = [f"{panel} (share)" for panel in panels]
    figure = make_subplots(1, max(1, len(panels)), subplot_titles=names if len(panels) > 1 else None)
    numbers = pooled_frame(cell for cell in cells if any(cell.test in tests for tests in panels.values()))
    styles = looks(dict.fromkeys(cell.row for cell in cells), first=0)
    for column, tests in enumerate(panels.values(), 1):
        for row, look in styles.items():
            figure.add_bar(**_bars(numbers, row, tests, look), showlegend=column == 1, row=1, col=column)
        _add_chance(figure, numbers, tests, column)
    most = max((len(tests) for tests in panels.values()), default=1)
    height = 130 + 18 * len(styles) // 3 + most * (len(styles) * _THICK + 14)
    dressed(figure, title=title, height=height, barmode="group", bargap=0.14, **ON_A_PAGE)
    return figure.update_xaxes(range=[0, 1.05], title="share").update_yaxes(autorange="reversed")


def _bars(numbers: "DataFrame", row: str, tests: Mapping[str, str], look: Look) -> dict[str, Any]:
    numbers_of = [numbers.loc[(row, test)] if (row, test) in numbers.index else None for test in tests]
    values = [None if one is None or one["seeds"] == 0 else float(one["value"]) for one in numbers_of]
    points = [
        Point(0.0, 0.0, 0.0) if one is None or value is None else Point(value, float(one["low"]), float(one["high"]))
        for one, value in zip(numbers_of, values, strict=True)
    ]
    named = {"name": shown(row), "legendgroup": row, "orientation": "h", "marker": {"color": look.color}}
    text = "%{y}: %{x:.3f}<extra>" + shown(row) + "</extra>"
    names = [shown(name, 17) for name in tests.values()]
    return {**named, "x": values, "y": names, "error_x": whiskers(points), "hovertemplate": text}


def _add_chance(figure: "Figure", numbers: "DataFrame", tests: Mapping[str, str], column: int) -> None:
    chances: dict[str, float] = numbers["chance"].astype(float).groupby(level="test").first().to_dict()
    line = {"width": 1.5, "color": "black"}
    named = {"name": "chance", "legendgroup": "chance", "showlegend": column == 1, "row": 1, "col": column}
    drawn = {"mode": "markers", "marker": {"symbol": "line-ns", "size": 8, "line": line}}
    x, y = [chances[test] for test in tests], [shown(name, 17) for name in tests.values()]
    figure.add_scatter(x=x, y=y, hovertemplate="%{y}: chance %{x:.3f}<extra></extra>", **drawn, **named)
    for place, test in enumerate(tests):
        if not isnan(chances[test]):
            ends = {"x0": chances[test], "x1": chances[test], "y0": place - 0.43, "y1": place + 0.43}
            figure.add_shape(type="line", line=line, **ends, row=1, col=column)  # type: ignore[arg-type]


def tests_with_curves(cells: Sequence[Cell], *, layers: bool) -> list[str]:
    """The tests that have a curve over layers, or over anything else."""
    curve_of = [(cell.test, cell.result.curve) for cell in cells if cell.result is not None]
    tests = (test for test, curve in curve_of if curve is not None and (curve.axis == LAYERS) == layers)
    return list(dict.fromkeys(tests))


def has_controls(cells: Sequence[Cell], test: str) -> bool:
    """Whether a control of the test has a curve of its own."""
    return any(_control(cell) is not None for cell in cells if cell.test == test)


def curves(cells: Sequence[Cell], tests: Sequence[str], *, title: str = "") -> "Figure":
    """A panel for each test: a line per row with its band of 95 %, a thin line for its control, chance dotted."""
    from plotly.subplots import make_subplots

    figure = make_subplots(max(1, len(tests)), 1, subplot_titles=tests if len(tests) > 1 else None)
    styles = looks(dict.fromkeys(cell.row for cell in cells), first=0)
    grouped = by_row_and_test(cells)
    for place, test in enumerate(tests, 1):
        for row, look in styles.items():
            same = grouped.get((row, test), [])
            _add_control(figure, [control for cell in same if (control := _control(cell))], look, place)
            _add_line(figure, same, look, place)
        _add_axes(figure, grouped, test, place)
    return dressed(figure, title=title, height=110 + 18 * len(styles) // 3 + 320 * len(tests), **ON_A_PAGE)


def _add_line(figure: "Figure", cells: Sequence[Cell], look: Look, place: int) -> None:
    drawn = [cell for cell in cells if cell.result is not None and cell.result.curve is not None]
    if not drawn:
        return
    ends, row = curve_over_seeds(drawn), drawn[0].row
    x, high, low = list(ends.index), list(ends["high"]), list(ends["low"])
    add_line(figure, row, look, x, ends["value"], low, high, row=place, col=1)


def _add_control(figure: "Figure", cells: Sequence[Cell], look: Look, place: int) -> None:
    if cells:
        mean, line = curve_over_seeds(cells)["value"], {"color": look.color, "width": 1}
        text = "%{x}: %{y:.3f}<extra>control of " + shown(cells[0].row) + "</extra>"
        where = {"row": place, "col": 1, "legendgroup": cells[0].row, "showlegend": False, "mode": "lines"}
        figure.add_scatter(x=list(mean.index), y=mean, line=line, opacity=0.6, hovertemplate=text, **where)


def _control(cell: Cell) -> Cell | None:
    """The cell with the control in place of its result; None without a curve of the control."""
    control = None if cell.result is None else cell.result.control
    return None if control is None or control.curve is None else replace(cell, result=control)


def _add_axes(figure: "Figure", grouped: Grouped, test: str, place: int) -> None:
    cells = [cell for (_, name), shown_curves in grouped.items() if name == test for cell in shown_curves]
    shown_curves = [cell.result.curve for cell in cells if cell.result is not None and cell.result.curve is not None]
    points = list(dict.fromkeys(point for curve in shown_curves for point in curve.points))
    with suppress(ValueError):  # in their own order where not all are numbers
        points = sorted(points, key=float)
    chance = next((curve.chance for curve in shown_curves if curve.chance is not None), None)
    if chance is not None:
        line = {"color": INK, "dash": "dot", "width": 1}
        named = {"name": "chance", "showlegend": is_new(figure, "chance")}
        ends = {"x": [points[0], points[-1]], "y": [chance, chance], "mode": "lines", "hoverinfo": "skip"}
        figure.add_scatter(**ends, line=line, legendgroup="chance", **named, row=place, col=1)
    order = {"type": "category", "categoryorder": "array", "categoryarray": points}
    figure.update_xaxes(title=shown(shown_curves[0].axis), **order, row=place, col=1)
    bounded = bool(all(float(c.per_prompt.min()) >= 0 and float(c.per_prompt.max()) <= 1 for c in shown_curves))
    unit = shown(shown_curves[0].unit, 32)  # on its side, in the height of one panel
    figure.update_yaxes(title=unit, range=[0, 1.05] if bounded else None, row=place, col=1)
