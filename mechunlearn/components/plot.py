"""Figures of scores: heat maps of layer x component and source x destination, and graphs of edges."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.components.component import Component, ModelShape
from mechunlearn.components.edge import Edge

if TYPE_CHECKING:
    from networkx import DiGraph
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


def edge_heat_map(
    values: Float[Tensor, "source destination"],
    scored: Bool[Tensor, "source destination"],
    sources: Sequence[str],
    destinations: Sequence[str],
    *,
    title: str = "",
    unit: str = "",
) -> "Figure":
    """Heat map with one row per source and one column per destination that has an edge, zero at white."""
    rows, columns = scored.any(1).nonzero().flatten().tolist(), scored.any(0).nonzero().flatten().tolist()
    shown = values.double().masked_fill(~scored, torch.nan)[rows][:, columns]
    axes = {"xaxis": {"title": "destination"}, "yaxis": {"title": "source", "autorange": "reversed"}}
    size = {"width": 300 + 12 * min(len(columns), 100), "height": 200 + 12 * min(len(rows), 70)}
    return signed_heat_map(
        [[None if value != value else value for value in row] for row in shown.tolist()],
        [destinations[column] for column in columns],
        [sources[row] for row in rows],
        unit=unit,
        hover="%{y}->%{x}: %{z:.4g} " + unit,
        layout={"title": title, "plot_bgcolor": "#eee"} | axes | size,
    )


def edge_graph(values: Mapping[Edge, float], shape: ModelShape) -> "DiGraph":
    """A graph of the edges with their scores, and of an edge from each matrix that is read to the heads that use it."""
    import networkx as nx

    graph = nx.DiGraph()
    for edge, score in values.items():
        graph.add_edge(str(edge.source), str(edge.destination), score=score)
        end = edge.destination
        if isinstance(end, Component) and end.index is not None:
            group = 1 if end.matrix == "W_Q" else shape.n_heads // shape.n_kv_heads
            graph.add_edges_from((str(end), f"L{end.layer}H{end.index + i}") for i in range(group))
    return graph
