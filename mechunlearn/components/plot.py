"""Heat maps of scores: of layer x component, and of any rows and columns."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mechunlearn.components.component import Component

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def heat_map(values: Mapping[Component, float], *, title: str = "", unit: str = "") -> "Figure":
    """Heat map with one row per layer and one column per component of a layer, zero at white.

    `figure.show()` in a notebook, `figure.write_html(path)` for a page that opens in a browser.
    """
    columns = sorted({_column(c) for c in values}, key=lambda name: Component.parse("L0" + name))
    rows = sorted({c.layer for c in values})
    place = {(c.layer, _column(c)): value for c, value in values.items()}
    z = [[place.get((layer, column)) for column in columns] for layer in rows]
    size = {"width": 200 + 55 * min(len(columns), 20), "height": 180 + 34 * len(rows)}
    axes = {"xaxis": {"title": "component"}, "yaxis": {"title": "layer"}}
    layout, hover = {"title": title} | size | axes, "%{y}%{x}: %{z:.4g} " + unit
    labels = [f"L{layer}" for layer in rows]
    return signed_heat_map(z, columns, labels, unit=unit, hover=hover, layout=layout, xgap=1, ygap=1)


def signed_heat_map(
    values: Sequence[Sequence[float | None]],
    x: Sequence[Any],
    y: Sequence[Any],
    *,
    unit: str,
    hover: str,
    layout: Mapping[str, Any],
    **cells: Any,
) -> "Figure":
    """Heat map of rows of values: red for negative, white for zero, blue for positive, up to the largest size."""
    import plotly.graph_objects as go

    sizes = (abs(value) for row in values for value in row if value is not None and value == value)
    limit = max(sizes, default=0.0) or 1.0
    colors = {"colorscale": "RdBu", "zmid": 0, "zmin": -limit, "zmax": limit}
    colors["colorbar"] = {"title": {"text": unit, "side": "right"}}
    heat = go.Heatmap(z=values, x=x, y=y, hovertemplate=f"{hover}<extra></extra>", **colors, **cells)
    return go.Figure(heat, layout={"template": "plotly_white", **layout})


def _column(component: Component) -> str:
    return str(component).removeprefix(f"L{component.layer}")
