"""How every result is drawn: one template and palette; heat maps, lines with their intervals, error bars."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from mechunlearn.components.component import Component
from mechunlearn.curve import Curve

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


INK, FAINT = "#333333", "#e4e4e4"


class Look(NamedTuple):
    """How a line, or the points of one row, are drawn."""

    color: str
    symbol: str
    dash: str


# Okabe & Ito 2008 (colours that the colour-blind tell apart), after a grey for the original; no yellow, which white
# paper swallows; then dark ones of Tol 2021. Symbols and dashes tell rows apart without colour.
_GREY, _OKABE = "#6b6b6b", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c510a")
_TOL = ("#332288", "#999933", "#882255", "#000000")
_COLORS = (_GREY, *_OKABE, *_TOL)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down", "cross")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
FIRST = Look(_OKABE[0], _SYMBOLS[0], _DASHES[0])
"""Of what is drawn alone."""

# In print and to the colour-blind, negative cells are the paler ones, and bear a minus.
_NEGATIVE, _POSITIVE = "#e08214", "#053061"
_MARKED = 2500
"""The most cells in which a minus can still be read."""

ON_A_PAGE = {"showlegend": True, "dragmode": False}
"""A figure among others: a finger on it scrolls the page."""


def looks(names: Iterable[str], *, first: int = 1) -> dict[str, Look]:
    """Name -> color, symbol and dash, as drawn here, from the `first` color on; 0 is the original's grey."""
    return {
        name: Look(_COLORS[(first + i) % len(_COLORS)], _SYMBOLS[i % len(_SYMBOLS)], _DASHES[i % len(_DASHES)])
        for i, name in enumerate(names)
    }


def titled(method: str, metric: str, n_prompts: int | None) -> tuple[str, str]:
    """The title of a figure of scores, and their unit."""
    unit = metric.replace("_", " ")
    title = f"{method.replace('_', ' ')}: {unit}" if unit else method.replace("_", " ")
    return title + (f", {n_prompts} prompts" if n_prompts else ""), unit


def shown(text: str, width: int = 0) -> str:
    """Text for plotly, with its tags escaped and lines broken at `width` characters."""
    return "<br>".join(map(escape, wrap(text, width))) if width else escape(text)


def dressed(figure: "Figure", *, title: str = "", height: int = 420, **layout: Any) -> "Figure":
    """A figure of your own, with this library's fonts and grid, and a legend below that takes its own room."""
    figure.update_layout(
        title={"text": shown(title), "font": {"size": 15}} if title else None,
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        height=height,
        margin={"l": 10, "r": 16, "t": 50 if title else 28, "b": 10},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left"}
        | {"font": {"size": 12}},
        **layout,
    )
    figure.update_xaxes(gridcolor=FAINT, zerolinecolor=FAINT, automargin=True)
    return figure.update_yaxes(gridcolor=FAINT, zerolinecolor=FAINT, automargin=True)


def whiskers(points: Iterable[tuple[float, float, float]], *, width: int = 2, color: str = INK) -> dict[str, Any]:
    """The intervals of points (value, low, high), as plotly draws them."""
    ends = [(high - value, value - low) for value, low, high in points]
    sizes = {"array": [up for up, _ in ends], "arrayminus": [down for _, down in ends]}
    return {"type": "data", "symmetric": False, "thickness": 1, "width": width, "color": color} | sizes


def is_new(figure: "Figure", name: str) -> bool:
    """Whether no trace has this name yet, so that it is in the legend once."""
    return not any(True for _ in figure.select_traces({"name": shown(name)}))


def add_line(
    figure: "Figure",
    name: str,
    look: Look,
    x: Sequence[Any],
    values: Iterable[float],
    low: Iterable[float],
    high: Iterable[float],
    **where: Any,
) -> None:
    """A line with its band; in the legend once, whatever the number of panels."""
    shared = {"legendgroup": name, **where}
    drawn = {"line": {"color": look.color, "dash": look.dash, "width": 2}, "mode": "lines+markers"}
    drawn |= {"marker": {"symbol": look.symbol, "size": 8, "color": look.color}, "showlegend": is_new(figure, name)}
    band = {"x": [*x, *reversed(x)], "y": [*high, *reversed([*low])], "line": {"width": 0}, "mode": "lines"}
    area = {"fill": "toself", "fillcolor": look.color, "opacity": 0.15, "hoverinfo": "skip", "showlegend": False}
    figure.add_scatter(**band, **area, **shared)
    text = "%{x}: %{y:.3f}<extra>" + shown(name) + "</extra>"
    figure.add_scatter(x=[*x], y=[*values], name=shown(name), hovertemplate=text, **drawn, **shared)


def lines(curves: Mapping[str, Curve], *, title: str = "") -> "Figure":
    """One line per curve, all of one unit, with bands of 95 % intervals and dotted lines at chance."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for (name, curve), look in zip(curves.items(), looks(curves).values(), strict=True):
        ends = curve.interval()
        add_line(figure, name, look, list(curve.points), ends["value"], ends["low"], ends["high"])
        if curve.chance is not None:
            label = {"text": "chance", "font": {"size": 11}}
            figure.add_hline(y=curve.chance, line={"dash": "dot", "width": 1, "color": INK}, annotation=label)  # type: ignore[arg-type]
    first = next(iter(curves.values()))
    dressed(figure, title=title, showlegend=True).update_xaxes(title=shown(first.axis), type="category")
    return figure.update_yaxes(title=shown(first.unit))


def heat_map(values: Mapping[Component, float], *, title: str = "", unit: str = "") -> "Figure":
    """Heat map with one row per layer and one column per component of a layer, zero at white.

    `figure.show()` in a notebook, `figure.write_html(path)` for a page that opens in a browser.
    """
    columns = sorted({_column(c) for c in values}, key=lambda name: Component.parse("L0" + name))
    rows = sorted({c.layer for c in values})
    place = {(c.layer, _column(c)): value for c, value in values.items()}
    z = [[place.get((layer, column)) for column in columns] for layer in rows]
    size = {"width": 200 + 55 * min(len(columns), 20), "height": 180 + 34 * min(len(rows), 20)}
    labels, hover = [f"L{layer}" for layer in rows], "%{y}%{x}: %{z:.4g} " + unit
    figure = signed_heat_map(z, columns, labels, unit=unit, hover=hover, title=title, **size)
    return figure.update_traces(xgap=1, ygap=1).update_xaxes(title="component").update_yaxes(title="layer")


def signed_heat_map(
    values: Sequence[Sequence[float | None]],
    x: Sequence[Any],
    y: Sequence[Any],
    *,
    unit: str,
    hover: str,
    title: str,
    height: int,
    **layout: Any,
) -> "Figure":
    """Heat map of rows of values: orange with a minus for negative, white for zero, blue for positive."""
    import plotly.graph_objects as go

    limit = max((abs(value) for row in values for value in row if value is not None and value == value), default=0.0)
    scale = [[0, _NEGATIVE], [0.5, "#ffffff"], [1, _POSITIVE]]
    colors = {"colorscale": scale, "zmid": 0, "zmin": -(limit or 1.0), "zmax": limit or 1.0}
    colors["colorbar"] = {"title": {"text": shown(unit), "side": "right"}}
    if len(x) * len(y) <= _MARKED:
        marks = [["–" if value is not None and value < -limit / 10 else "" for value in row] for row in values]
        colors |= {"text": marks, "texttemplate": "%{text}", "textfont": {"color": INK}}
    heat = go.Heatmap(z=values, x=x, y=y, hovertemplate=f"{hover}<extra></extra>", **colors)
    figure = dressed(go.Figure(heat), title=title, height=height, **layout)
    return figure.update_xaxes(showgrid=False).update_yaxes(showgrid=False)


def _column(component: Component) -> str:
    return str(component).removeprefix(f"L{component.layer}")
