"""Lines: what an attack reaches along its budget, what a probe reads along the layers."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mechunlearn.curve import LAYERS
from mechunlearn.evaluate.cell import Cell
from mechunlearn.evaluate.report_frames import Grouped, by_row_and_test, curve_over_seeds
from mechunlearn.evaluate.report_style import INK, Look, dressed, is_new, looks, shown

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def tests_with_curves(cells: Sequence[Cell], *, layers: bool) -> list[str]:
    """The tests with a curve along the layers, or along anything else."""
    found = [(cell.test, cell.result.curve) for cell in cells if cell.result is not None]
    return list(dict.fromkeys(test for test, curve in found if curve is not None and (curve.axis == LAYERS) == layers))


def has_controls(cells: Sequence[Cell], test: str) -> bool:
    """Whether a control of the test has a curve of its own."""
    return any(_control(cell) is not None for cell in cells if cell.test == test)


def curves(cells: Sequence[Cell], tests: Sequence[str], *, title: str = "") -> "Figure":
    """A panel for each test: a line per row with its band of 95 %, a thin line for its control, chance dotted."""
    from plotly.subplots import make_subplots

    height = 320
    figure = make_subplots(max(1, len(tests)), 1, subplot_titles=tests if len(tests) > 1 else None)
    styles = looks(dict.fromkeys(cell.row for cell in cells))
    grouped = by_row_and_test(cells)
    for place, test in enumerate(tests, 1):
        for row, look in styles.items():
            found = grouped.get((row, test), [])
            _add_control(figure, [control for cell in found if (control := _control(cell))], look, place)
            _add_line(figure, found, look, place)
        _label(figure, grouped, test, place)
    return dressed(figure, title=title, height=110 + 18 * len(styles) // 3 + height * len(tests))


def _add_line(figure: "Figure", cells: Sequence[Cell], look: Look, place: int) -> None:
    found = [cell for cell in cells if cell.result is not None and cell.result.curve is not None]
    if not found:
        return
    ends, row = curve_over_seeds(found), found[0].row
    x, high, low = list(ends.index), list(ends["high"]), list(ends["low"])
    where = {"row": place, "col": 1, "legendgroup": row}
    area = {"x": x + x[::-1], "y": high + low[::-1], "fill": "toself", "fillcolor": look.color, "line": {"width": 0}}
    figure.add_scatter(**area, opacity=0.15, hoverinfo="skip", showlegend=False, mode="lines", **where)
    line = {"color": look.color, "dash": look.dash, "width": 2}
    marker = {"symbol": look.symbol, "size": 8, "color": look.color}
    shared = {"name": shown(row), "showlegend": is_new(figure, row)}
    text = "%{x}: %{y:.3f}<extra>" + shown(row) + "</extra>"
    figure.add_scatter(
        x=x, y=ends["value"], mode="lines+markers", line=line, marker=marker, hovertemplate=text, **shared, **where
    )


def _add_control(figure: "Figure", cells: Sequence[Cell], look: Look, place: int) -> None:
    if cells:
        mean, line = curve_over_seeds(cells)["value"], {"color": look.color, "width": 1}
        text = "%{x}: %{y:.3f}<extra>control of " + shown(cells[0].row) + "</extra>"
        where = {"row": place, "col": 1, "legendgroup": cells[0].row, "showlegend": False}
        figure.add_scatter(
            x=list(mean.index), y=mean, mode="lines", line=line, opacity=0.6, hovertemplate=text, **where
        )


def _control(cell: Cell) -> Cell | None:
    """The control in place of the result, if it has a curve."""
    control = None if cell.result is None else cell.result.control
    return None if control is None or control.curve is None else replace(cell, result=control)


def _label(figure: "Figure", grouped: Grouped, test: str, place: int) -> None:
    """Axes in the curve's own units, and chance."""
    cells = [cell for (_, name), found in grouped.items() if name == test for cell in found]
    found = [cell.result.curve for cell in cells if cell.result is not None and cell.result.curve is not None]
    points = _in_order(dict.fromkeys(point for curve in found for point in curve.points))
    chance = next((curve.chance for curve in found if curve.chance is not None), None)
    if chance is not None:
        line = {"color": INK, "dash": "dot", "width": 1}
        named = {"name": "chance", "showlegend": is_new(figure, "chance")}
        ends = {"x": [points[0], points[-1]], "y": [chance, chance], "mode": "lines", "hoverinfo": "skip"}
        figure.add_scatter(**ends, line=line, legendgroup="chance", **named, row=place, col=1)
    order = {"type": "category", "categoryorder": "array", "categoryarray": points}
    figure.update_xaxes(title=shown(found[0].axis), **order, row=place, col=1)
    bounded = bool(all(float(c.per_prompt.min()) >= 0 and float(c.per_prompt.max()) <= 1 for c in found))
    unit = shown(found[0].unit, 32)  # on its side, in the height of one panel
    figure.update_yaxes(title=unit, range=[0, 1.05] if bounded else None, row=place, col=1)


def _in_order(points: Iterable[str]) -> list[str]:
    """By number where all are numbers, else as they came."""
    try:
        return sorted(points, key=float)
    except ValueError:
        return list(points)
