"""The field's picture of a localization: layer x component."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mechunlearn.components.component import Component

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def heat_map(values: Mapping[Component, float], *, title: str = "", unit: str = "") -> "Figure":
    """Heat map with one row per layer and one column per component of a layer, zero at white.

    `figure.show()` in a notebook, `figure.write_html(path)` for a page that opens in a browser.
    """
    import plotly.graph_objects as go

    columns = sorted({_column(c) for c in values}, key=lambda name: Component.parse("L0" + name))
    rows = sorted({c.layer for c in values})
    place = {(c.layer, _column(c)): value for c, value in values.items()}
    limit = max((abs(value) for value in values.values()), default=1.0) or 1.0
    heat = go.Heatmap(
        z=[[place.get((layer, column)) for column in columns] for layer in rows],
        x=columns,
        y=[f"L{layer}" for layer in rows],
        colorscale="RdBu",
        zmid=0,
        zmin=-limit,
        zmax=limit,
        colorbar={"title": {"text": unit, "side": "right"}},
        hovertemplate="%{y}%{x}: %{z:.4g} " + unit + "<extra></extra>",
        xgap=1,
        ygap=1,
    )
    layout = {"title": title, "template": "plotly_white", "width": 200 + 55 * min(len(columns), 20)}
    axes = {"xaxis": {"title": "component"}, "yaxis": {"title": "layer"}}
    return go.Figure(heat, layout=layout | axes | {"height": 180 + 34 * len(rows)})


def _column(component: Component) -> str:
    return str(component).removeprefix(f"L{component.layer}")
