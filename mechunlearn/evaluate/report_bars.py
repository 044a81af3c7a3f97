"""Bars: each share that was measured, forget and retain side by side."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import TYPE_CHECKING, Any

from mechunlearn.evaluate.cell import Cell
from mechunlearn.evaluate.report_frames import first_results, pooled_frame
from mechunlearn.evaluate.report_style import INK, Look, dressed, looks, shown

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

SIDES = ("forget", "retain")
_THICK = 13
"""Pixels of one bar."""


def groups_of_shares(cells: Sequence[Cell]) -> dict[str, dict[str, str]]:
    """Panel -> test -> its name there, of the tests whose unit is a share and that gave a number.

    "forget, X" and "retain, X" are the bar X of the panels "forget" and "retain"; the others are in the panel "other".
    """
    found: dict[str, dict[str, str]] = {"forget": {}, "retain": {}, "other": {}}
    for test, result in first_results(cells).items():
        if result is not None and result.unit == "share":
            side, _, name = test.partition(", ")
            panel, bar = (side, name) if side in SIDES and name else ("other", test)
            found[panel][test] = bar
    return {panel: tests for panel, tests in found.items() if tests}


def bars(cells: Sequence[Cell], panels: Mapping[str, Mapping[str, str]], *, title: str = "") -> "Figure":
    """A panel of bars for each group of tests, with 95 % intervals; chance is a short line across the bars."""
    from plotly.subplots import make_subplots

    names = [f"{panel} (share)" for panel in panels]
    figure = make_subplots(1, max(1, len(panels)), subplot_titles=names if len(panels) > 1 else None)
    numbers = pooled_frame(cell for cell in cells if any(cell.test in tests for tests in panels.values()))
    styles = looks(dict.fromkeys(cell.row for cell in cells))
    for column, tests in enumerate(panels.values(), 1):
        for row, look in styles.items():
            figure.add_bar(**_bars(numbers, row, tests, look), showlegend=column == 1, row=1, col=column)
        _add_chance(figure, numbers, tests, column)
    most = max((len(tests) for tests in panels.values()), default=1)
    height = 130 + 18 * len(styles) // 3 + most * (len(styles) * _THICK + 14)
    dressed(figure, title=title, height=height, barmode="group", bargap=0.14)
    return figure.update_xaxes(range=[0, 1.05], title="share").update_yaxes(autorange="reversed")


def _bars(numbers: "DataFrame", row: str, tests: Mapping[str, str], look: Look) -> dict[str, Any]:
    found = [numbers.loc[(row, test)] if (row, test) in numbers.index else None for test in tests]
    values = [None if one is None or one["seeds"] == 0 else float(one["value"]) for one in found]
    ends = [
        (float(one["high"]) - value, value - float(one["low"])) if one is not None and value is not None else (0.0, 0.0)
        for one, value in zip(found, values, strict=True)
    ]
    whiskers = {"type": "data", "array": [high for high, _ in ends], "arrayminus": [low for _, low in ends]}
    return {
        "name": shown(row),
        "legendgroup": row,
        "orientation": "h",
        "x": values,
        "y": [shown(name, 17) for name in tests.values()],
        "error_x": whiskers | {"symmetric": False, "thickness": 1, "width": 2, "color": INK},
        "marker": {"color": look.color},
        "hovertemplate": "%{y}: %{x:.3f}<extra>" + shown(row) + "</extra>",
    }


def _add_chance(figure: "Figure", numbers: "DataFrame", tests: Mapping[str, str], column: int) -> None:
    """A line across the bars of each test, and its entry in the legend."""
    chances: dict[str, float] = numbers["chance"].astype(float).groupby(level="test").first().to_dict()
    line = {"width": 1.5, "color": "black"}
    figure.add_scatter(
        name="chance",
        legendgroup="chance",
        showlegend=column == 1,
        x=[chances[test] for test in tests],
        y=[shown(name, 17) for name in tests.values()],
        mode="markers",
        marker={"symbol": "line-ns", "size": 8, "line": line},
        hovertemplate="%{y}: chance %{x:.3f}<extra></extra>",
        row=1,
        col=column,
    )
    for place, test in enumerate(tests):
        if not isnan(chances[test]):
            ends = {"x0": chances[test], "x1": chances[test], "y0": place - 0.43, "y1": place + 0.43}
            figure.add_shape(type="line", line=line, **ends, row=1, col=column)  # type: ignore[arg-type]
