"""How the plots of a report look: one colour, symbol and dash per row, the same in every plot."""

from collections.abc import Iterable
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INK, FAINT = "#333333", "#e4e4e4"


class Look(NamedTuple):
    color: str
    symbol: str
    dash: str


# Okabe & Ito 2008 (colours that the colour-blind tell apart), after a grey for the first row, the original; no yellow,
# which white paper swallows; then dark ones of Tol 2021. Symbols and dashes tell rows apart without colour.
_GREY, _OKABE = "#6b6b6b", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c510a")
_TOL = ("#332288", "#999933", "#882255", "#000000")
_COLORS = (_GREY, *_OKABE, *_TOL)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down", "cross")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def looks(rows: Iterable[str]) -> dict[str, Look]:
    """Row -> how it is drawn."""
    return {
        row: Look(_COLORS[i % len(_COLORS)], _SYMBOLS[i % len(_SYMBOLS)], _DASHES[i % len(_DASHES)])
        for i, row in enumerate(rows)
    }


def shown(text: str, width: int = 0) -> str:
    """Text as plotly shows it: its tags written out, lines broken at `width` characters."""
    return "<br>".join(map(escape, wrap(text, width))) if width else escape(text)


def is_new(figure: "Figure", row: str) -> bool:
    """Whether no trace has the name yet: it is in the legend once."""
    return not any(True for _ in figure.select_traces({"name": shown(row)}))


def dressed(figure: "Figure", *, title: str = "", height: int = 420, **layout: Any) -> "Figure":
    """The figure with fonts, grid, and a legend below that takes its own room; a finger on it scrolls the page."""
    figure.update_layout(
        title={"text": shown(title), "font": {"size": 15}} if title else None,
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        height=height,
        margin={"l": 10, "r": 16, "t": 50 if title else 28, "b": 10},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left"}
        | {"font": {"size": 12}},
        showlegend=True,
        dragmode=False,
        **layout,
    )
    figure.update_xaxes(gridcolor=FAINT, zerolinecolor=FAINT, automargin=True)
    return figure.update_yaxes(gridcolor=FAINT, zerolinecolor=FAINT, automargin=True)
