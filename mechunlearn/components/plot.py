"""Pictures of a localization: layer x component for components, source x destination for edges."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

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
    import plotly.graph_objects as go

    rows, columns = scored.any(1).nonzero().flatten().tolist(), scored.any(0).nonzero().flatten().tolist()
    shown = values.double().masked_fill(~scored, torch.nan)[rows][:, columns]
    limit = float(values[scored].abs().max()) or 1.0
    heat = go.Heatmap(
        z=[[None if value != value else value for value in row] for row in shown.tolist()],
        x=[destinations[column] for column in columns],
        y=[sources[row] for row in rows],
        colorscale="RdBu",
        zmid=0,
        zmin=-limit,
        zmax=limit,
        colorbar={"title": {"text": unit, "side": "right"}},
        hovertemplate="%{y}->%{x}: %{z:.4g} " + unit + "<extra></extra>",
    )
    axes = {"xaxis": {"title": "destination"}, "yaxis": {"title": "source", "autorange": "reversed"}}
    size = {"width": 300 + 12 * min(len(columns), 100), "height": 200 + 12 * min(len(rows), 70)}
    return go.Figure(heat, layout={"title": title, "template": "plotly_white", "plot_bgcolor": "#eee"} | axes | size)


def edge_graph(values: Mapping[Edge, float], shape: ModelShape) -> "DiGraph":
    """The edges with their scores, and from each matrix that is read into the heads that it serves."""
    import networkx as nx

    graph = nx.DiGraph()
    for edge, score in values.items():
        graph.add_edge(str(edge.source), str(edge.destination), score=score)
        for head in _heads_behind(edge.destination, shape):
            graph.add_edge(str(edge.destination), head)
    return graph


def _heads_behind(destination: Component | str, shape: ModelShape) -> list[str]:
    if not isinstance(destination, Component) or destination.index is None:
        return []
    group = 1 if destination.matrix == "W_Q" else shape.n_heads // shape.n_kv_heads
    return [f"L{destination.layer}H{destination.index + i}" for i in range(group)]
