"""Trade-offs: the knowledge left and the damage done, by size of the edit and as a Pareto front."""

from collections.abc import Mapping, Sequence
from math import log10
from typing import TYPE_CHECKING, Any

from mechunlearn.components.plot import INK, ON_A_PAGE, Look, dressed, is_new, looks, shown, whiskers
from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.report import figures, frames
from mechunlearn.evaluate.report.figures import Point

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def forget_tests(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The tests "forget, X" that have a "retain, X"."""
    panels = figures.groups_of_shares(cells)
    kept = set(panels.get("retain", {}).values())
    return tuple(test for test, name in panels.get("forget", {}).items() if name in kept)


def damage_tests(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The tests "text loss" and "other knowledge", if they gave a number."""
    first = frames.first_results(cells)
    return tuple(test for test in ("text loss", "other knowledge") if first.get(test) is not None)


def check_tests(cells: Sequence[Cell], tests: Sequence[str], role: str) -> None:
    known = [test for test, result in frames.first_results(cells).items() if result is not None]
    missing = [test for test in tests if test not in known]
    if missing or not tests:
        raise ValueError(
            f"expected tests of this report for {role} ({'; '.join(known)}), got {missing or 'none'}: "
            f"name them with {role}=[...]."
        )


def sizes(
    cells: Sequence[Cell],
    weights: Mapping[str, int],
    forgetting: Sequence[str],
    damage: Sequence[str],
    *,
    title: str = "",
) -> "Figure":
    """A panel for what is left of the knowledge and one for each test of damage, over the number of edited weights."""
    from plotly.subplots import make_subplots

    panels = {"knowledge left": tuple(forgetting)} | {test: (test,) for test in damage}
    figure = make_subplots(len(panels), 1, subplot_titles=[shown(name) for name in panels], vertical_spacing=0.1)
    grouped, first = frames.by_row_and_test(cells), frames.first_results(cells)
    styles = looks(dict.fromkeys(cell.row for cell in cells), first=0)
    for place, tests in enumerate(panels.values(), 1):
        for row, look in styles.items():
            left = _mean(grouped, row, tests)
            if left is not None and weights.get(row):
                _add_point(figure, row, look, Point(*[float(weights[row])] * 3), left, place)
        original = _mean(grouped, "original", tests)
        if original is not None:
            line, label = {"dash": "dash", "width": 1, "color": INK}, {"text": "original", "font": {"size": 11}}
            figure.add_hline(y=original.value, line=line, annotation=label, row=place, col=1)  # type: ignore[arg-type]
        result = first[tests[0]]
        figure.update_yaxes(title="" if result is None else shown(result.unit or result.sense), row=place, col=1)
    figure.update_yaxes(rangemode="tozero", row=1, col=1)
    dressed(figure, title=title, height=120 + 18 * len(styles) // 3 + 250 * len(panels), **ON_A_PAGE)
    figure.update_xaxes(**_size_axis([count for count in weights.values() if count]))
    return figure.update_xaxes(title="edited weights", row=len(panels), col=1)


def pareto(cells: Sequence[Cell], forgetting: Sequence[str], damage: str, *, title: str = "") -> "Figure":
    """Knowledge left over damage: a point per row, the front of those that no other row beats in both as a line."""
    import plotly.graph_objects as go

    figure, points = go.Figure(), tradeoffs(cells, forgetting, damage)
    styles = looks(dict.fromkeys(cell.row for cell in cells), first=0)
    for row, (harm, left) in points.items():
        _add_point(figure, row, styles[row], harm, left)
    best = sorted(front({row: (harm.value, left.value) for row, (harm, left) in points.items()}))
    line = {"color": INK, "dash": "dot", "width": 1.5, "shape": "hv"}
    x, y = [harm for harm, _ in best], [left for _, left in best]
    figure.add_scatter(x=x, y=y, name="Pareto front", mode="lines", line=line, hoverinfo="skip")
    dressed(figure, title=title, height=400 + 18 * len(styles) // 3, **ON_A_PAGE)
    figure.update_yaxes(title="knowledge left (share)", rangemode="tozero")
    result = frames.first_results(cells)[damage]
    assert result is not None
    change, unit = "drop" if result.unit == "share" else "rise", f" ({result.unit})" if result.unit else ""
    title = shown(f"damage: {change} of {damage} from the original{unit}", 30)
    return figure.update_xaxes(title=title, exponentformat="power")


def tradeoffs(cells: Sequence[Cell], forgetting: Sequence[str], damage: str) -> dict[str, tuple[Point, Point]]:
    """Row -> damage (the drop of a share or rise of a loss from the original) and knowledge left, if no test failed."""
    grouped = frames.by_row_and_test(cells)
    points = {}
    for row in dict.fromkeys(cell.row for cell in cells):
        harm, left = _harm(grouped, row, damage), _mean(grouped, row, forgetting)
        if harm is not None and left is not None:
            points[row] = (harm, left)
    return points


def front(points: Mapping[str, tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is at least as low as in both numbers and lower in one."""
    values = set(points.values())
    return [p for p in values if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in values)]


def _mean(grouped: frames.Grouped, row: str, tests: Sequence[str]) -> Point | None:
    """Mean over tests and seeds with its interval over facts and seeds; None where a test has no result."""
    cells = [[cell for cell in grouped.get((row, test), []) if cell.result is not None] for test in tests]
    if not all(cells):
        return None
    of_all = [cell for same in cells for cell in same]
    return Point(frames.value_over_seeds(of_all), *frames.interval_of(of_all))


def _harm(grouped: frames.Grouped, row: str, damage: str) -> Point | None:
    cells = grouped.get((row, damage), [])
    change = frames.paired_difference(cells, grouped.get(("original", damage), []))
    if not change:
        return None
    difference, low, high = change["difference"], change["low"], change["high"]
    falls = any(cell.result is not None and cell.result.unit == "share" for cell in cells)
    return Point(-difference, -high, -low) if falls else Point(difference, low, high)


def _add_point(figure: "Figure", row: str, look: Look, x: Point, y: Point, place: int | None = None) -> None:
    marker = {"color": look.color, "symbol": look.symbol, "size": 11, "line": {"width": 1, "color": "white"}}
    named = {"name": shown(row), "legendgroup": row, "showlegend": is_new(figure, row)}
    text = "%{x:.4g}, %{y:.3f}<extra>" + shown(row) + "</extra>"
    ends = {f"error_{axis}": whiskers([one], width=3, color=look.color) for axis, one in (("x", x), ("y", y))}
    point = {"x": [x.value], "y": [y.value], **ends}
    where = {} if place is None else {"row": place, "col": 1}
    figure.add_scatter(**point, **named, mode="markers", marker=marker, hovertemplate=text, **where)


def _size_axis(counts: Sequence[int]) -> dict[str, Any]:
    """Logarithmic, with marks at 1, 2 and 5 of each power of ten, and room for two marks at least."""
    if not counts:
        return {}
    low, high = min(counts) / 2.3, max(counts) * 2.3
    marks = [digit * 10**power for power in range(len(str(max(counts))) + 1) for digit in (1, 2, 5)]
    within = [mark for mark in marks if low <= mark <= high]
    written = {"tickvals": within, "ticktext": [_short(mark) for mark in within]}
    return {"type": "log", "range": [log10(low), log10(high)]} | written


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:g}{letter}"
    return str(count)
