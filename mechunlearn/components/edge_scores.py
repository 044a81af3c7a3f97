"""Scores of edges, which edge methods return, and circuits: sets of edges."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.components.component import Component, ModelShape
from mechunlearn.components.edge import Edge, destinations, edge_mask, edges_where, mask_of, place_of, sources
from mechunlearn.components.mask import ComponentMask
from mechunlearn.components.plot import signed_heat_map, titled
from mechunlearn.components.scores import ComponentScores, count_of, interval_frame, resolved
from mechunlearn.files import Saved

if TYPE_CHECKING:
    from networkx import DiGraph
    from pandas import DataFrame
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(Mapping[Edge, float], Saved):
    """A score for every edge: a mapping from edges (or their labels, `"L1H2->L3H0.W_Q"`) to floats."""

    tensor: Float[Tensor, "source destination"]
    """The scores; rows are `sources(shape)`, columns `destinations(shape)`. 0 where there is none."""
    scored: Bool[Tensor, "source destination"]
    """True at the edges that have a score: at most the real ones."""
    shape: ModelShape
    """Of the model that they were computed on."""
    method: str
    """The function that made it."""
    metric: str = ""
    """The metric whose change the scores are; their unit is the metric's."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The method's arguments, direction and number of steps among them."""
    per_prompt: Float[Tensor, "prompt source destination"] | None = None
    """Each prompt's own scores, where they were kept; the scores are their mean. They take 280 kB per prompt for GPT-2
    small, so methods have an argument to leave them out."""

    @classmethod
    def of(
        cls,
        values: Mapping[Edge, float] | Mapping[str, float],
        shape: ModelShape,
        *,
        method: str = "by hand",
        metric: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> "EdgeScores":
        """Your own scores: `EdgeScores.of({"L2MLP->logits": 0.8}, mu.shape(model))`."""
        scored = mask_of(values, shape)
        tensor = torch.zeros(scored.shape, dtype=torch.float64)
        for edge, value in values.items():
            tensor[place_of(edge, shape)] = value
        return cls(tensor, scored, shape, method, metric, settings or {})

    def __post_init__(self) -> None:
        expected = len(sources(self.shape)), len(destinations(self.shape))
        if self.tensor.shape != expected or self.scored.shape != expected or not bool(self.scored.any()):
            raise ValueError(
                f"expected scores of shape {expected} (sources, destinations) with at least one edge scored, got "
                f"{tuple(self.tensor.shape)} and {int(self.scored.sum())} edges."
            )
        if self.per_prompt is not None and self.per_prompt.shape[1:] != self.tensor.shape:
            raise ValueError(f"expected per-prompt values (prompts, *{expected}), got {tuple(self.per_prompt.shape)}.")
        if bool((self.scored & ~edge_mask(self.shape)).any()):
            raise ValueError("expected scores of real edges, got some that go backwards in the model: check the mask.")
        if not bool(torch.isfinite(self.tensor[self.scored]).all()):
            bad = [str(e) for e in edges_where(self.scored & ~torch.isfinite(self.tensor), self.shape)][:5]
            raise ValueError(f"expected finite scores, got NaN or infinity at {', '.join(bad)}: check the metric.")

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """What is scored, in model order: by source, then destination."""
        return tuple(edges_where(self.scored, self.shape))

    @cached_property
    def values_in_order(self) -> Float[Tensor, "edge"]:
        """The scores of `edges`."""
        return self.tensor[self.scored]

    @property
    def n_prompts(self) -> int | None:
        """How many prompts the scores are means over, where that is known."""
        return None if self.per_prompt is None else len(self.per_prompt)

    @property
    def resolution(self) -> float | None:
        """The smallest score that exact patching of a half-precision model tells from rounding; else None.

        As `ComponentScores.resolution`.
        """
        return self.settings.get("resolution")

    def top(
        self,
        *,
        k: int | None = None,
        fraction: float | None = None,
        threshold: float | None = None,
        by: Callable[[Tensor], Tensor] = torch.abs,
    ) -> "EdgeMask":
        """The edges that score highest, by exactly one of three rules.

        `by` turns scores into ranks (default: their size, whatever the sign; `torch.neg` ranks the most negative
        first). Ties go to the edge that comes first in the model: lower source, then lower destination.

        - `k`: that many edges.
        - `fraction` in (0, 1]: that share of the edges, rounded up.
        - `threshold`: all with `by(score) >= threshold`.

        Edges are taken one by one: some may not lie on a path from the embedding to the logits. ValueError for a value
        out of range and for a rule that selects nothing.
        """
        rules = {"k": k, "fraction": fraction, "threshold": threshold}
        rule = {name: value for name, value in rules.items() if value is not None}
        if len(rule) != 1:
            raise ValueError(f"expected exactly one of k, fraction and threshold, got {rule or 'none'}.")
        ranks = by(self.values_in_order)
        by_rank = None if threshold is None else int((ranks >= threshold).sum())
        count = count_of(len(ranks), "edges", k, fraction) if by_rank is None else by_rank
        order = torch.sort(ranks, descending=True, stable=True).indices[:count]
        if not len(order):
            raise ValueError(
                f"expected a rule that selects at least one edge, got {rule}, which selects none: the highest rank "
                f"is {float(ranks.max()):.4g}."
            )
        chosen = torch.zeros_like(self.scored)
        chosen[tuple(self.scored.nonzero()[order].T)] = True
        provenance = {"method": self.method, "metric": self.metric, "settings": dict(self.settings), "top": rule}
        return EdgeMask(frozenset(edges_where(chosen, self.shape)), self.shape, provenance)

    def nodes(self) -> ComponentScores:
        """Each head's and MLP's score: the signed sum over the destinations of its edges (the embedding is left out).

        For edge attribution over all edges, this is the node's own attribution.
        """
        scored = self.scored.any(1).tolist()
        rows = [row for row, source in enumerate(sources(self.shape)) if source != "embed" and scored[row]]
        if not rows:
            raise ValueError("expected an edge from a head or an MLP, got edges from the embedding only: score others.")
        chosen = tuple(end for end in (sources(self.shape)[row] for row in rows) if isinstance(end, Component))
        per_prompt = None if self.per_prompt is None else self.per_prompt.sum(-1)[:, rows]
        settings = dict(self.settings) | {"summed over": f"{int(self.scored.sum())} edges"}
        settings.pop("resolution", None)  # a sum has more rounding than its parts
        total = self.tensor.sum(-1)[rows]
        return ComponentScores(chosen, total, self.shape, self.method, self.metric, settings, per_prompt)

    def interval(
        self, *, others: int | None = None, confidence: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> "DataFrame":
        """Bootstrap interval over prompts for each edge: columns score, low, high; as `ComponentScores.interval`."""
        if self.per_prompt is None:
            raise ValueError("expected scores with per-prompt values, got none: let the method keep them.")
        options = {"confidence": confidence, "draws": draws, "seed": seed}
        return interval_frame(self, self.per_prompt[:, self.scored], "edge", others, **options)

    def to_frame(self) -> "DataFrame":
        """One row per edge: source, destination, score; highest size first."""
        import pandas as pd

        rows = [(str(e), str(e.source), str(e.destination)) for e in self.edges]
        frame = pd.DataFrame(rows, columns=["edge", "source", "destination"]).set_index("edge")
        frame["score"] = self.values_in_order.tolist()
        return frame.sort_values("score", key=abs, ascending=False, kind="stable")

    def to_graph(self, edges: "EdgeMask | None" = None) -> "DiGraph":
        """A networkx graph of the scored edges, or of those of a circuit (`scores.to_graph(scores.top(k=20))`).

        Nodes are labels. A head is entered through `L3H0.W_Q`, `L3H0.W_K`, `L3H0.W_V`, each with an edge of no score
        to every head that reads it, so that paths from "embed" to "logits" are the model's. The other edges have an
        attribute `score`.
        """
        import networkx as nx

        graph = nx.DiGraph()
        for edge in edges_where(self.scored if edges is None else self.scored & edges.tensor, self.shape):
            graph.add_edge(str(edge.source), str(edge.destination), score=self[edge])
            end = edge.destination
            if isinstance(end, Component) and end.index is not None:
                group = 1 if end.matrix == "W_Q" else self.shape.n_heads // self.shape.n_kv_heads
                graph.add_edges_from((str(end), f"L{end.layer}H{end.index + i}") for i in range(group))
        return graph

    def plot(self) -> "Figure":
        """Source x destination heat map; orange is negative, blue positive, grey no edge."""
        title, unit = titled(self.method, self.metric, self.n_prompts)
        rows, columns = (self.scored.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
        values = self.tensor.double().masked_fill(~self.scored, torch.nan)[rows][:, columns].tolist()
        figure = signed_heat_map(
            [[None if value != value else value for value in row] for row in values],
            [str(destinations(self.shape)[column]) for column in columns],
            [str(sources(self.shape)[row]) for row in rows],
            unit=unit,
            hover="%{y}->%{x}: %{z:.4g} " + unit,
            title=title,
            width=300 + 12 * min(len(columns), 100),
            height=200 + 12 * min(len(rows), 70),
            plot_bgcolor="#eee",
        )
        figure.update_xaxes(title="destination")
        return figure.update_yaxes(title="source", autorange="reversed")

    def __getitem__(self, edge: Edge | str) -> float:
        place = place_of(edge, self.shape)
        if not bool(self.scored[place]):
            raise KeyError(str(edge))
        return float(self.tensor[place])

    def __contains__(self, edge: object) -> bool:
        return isinstance(edge, (Edge, str)) and bool(self.scored[place_of(edge, self.shape)])

    def __iter__(self) -> Iterator[Edge]:
        return iter(self.edges)

    def __len__(self) -> int:
        return int(self.scored.sum())

    def __repr__(self) -> str:
        order = torch.sort(self.values_in_order.abs(), descending=True, stable=True).indices[:5].tolist()
        shown = ", ".join(f"{self.edges[i]}: {float(self.values_in_order[i]):+.3g}" for i in order)
        more = ", ..." if len(self) > len(order) else ""
        return f"EdgeScores({self.method}, {self.metric}; {len(self)} edges; {shown}{more}{resolved(self)})"


@dataclass(frozen=True, eq=False, repr=False)
class EdgeMask(Set[Edge], Saved):
    """A set of edges: `|`, `&`, `-`, `^`, `in`, `len`, iteration in model order; equal for the same edges and shape."""

    edges: frozenset[Edge]
    """What is selected."""
    shape: ModelShape
    """Of the model that it was made for."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: the method, its settings and what selected from it."""

    def __post_init__(self) -> None:
        inside = edges_where(mask_of(self.edges, self.shape), self.shape)  # KV heads under one label
        object.__setattr__(self, "edges", frozenset(inside))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @classmethod
    def of(cls, edges: Iterable[Edge | str], shape: ModelShape) -> "EdgeMask":
        """A circuit written down by hand: `EdgeMask.of(["L1H2->L3H0.W_Q"], mu.shape(model))`."""
        members = (Edge.parse(edge) if isinstance(edge, str) else edge for edge in edges)
        return cls(frozenset(members), shape, {"method": "by hand"})

    @property
    def tensor(self) -> Bool[Tensor, "source destination"]:
        """True at the selected edges; rows and columns as in `EdgeScores.tensor`."""
        return mask_of(self.edges, self.shape)

    def components(self) -> ComponentMask:
        """The heads and MLPs at either end of its edges, as a mask for editors.

        A KV head that several query heads share counts as its matrix alone (`L3H0.W_K`), since the edge does
        not say which of those heads it is for.
        """
        shared = ("W_K", "W_V") if self.shape.n_kv_heads < self.shape.n_heads else ()
        ends = {end for edge in self.edges for end in (edge.source, edge.destination) if isinstance(end, Component)}
        chosen = (end if end.matrix in shared else Component(end.layer, end.part, end.index) for end in ends)
        provenance = dict(self.provenance) | {"components of": f"{len(self)} edges"}
        return ComponentMask(frozenset(chosen), self.shape, provenance)

    def __contains__(self, edge: object) -> bool:
        return (Edge.parse(edge) if isinstance(edge, str) else edge) in self.edges

    def __iter__(self) -> Iterator[Edge]:
        return edges_where(self.tensor, self.shape)

    def __len__(self) -> int:
        return len(self.edges)

    def __reduce__(self) -> tuple[Any, ...]:
        """The arguments that rebuild the circuit in another process, to which a read-only mapping cannot be sent."""
        return EdgeMask, (self.edges, self.shape, dict(self.provenance))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EdgeMask):
            return NotImplemented
        return (self.edges, self.shape) == (other.edges, other.shape)

    def __hash__(self) -> int:
        return hash((self.edges, self.shape))

    def __and__(self, other: Set[Any]) -> "EdgeMask":
        return self._combined("&", other, self.edges & self._compatible(other))

    def __or__(self, other: Set[Any]) -> "EdgeMask":  # type: ignore[override]  (a circuit of circuits is not a thing)
        return self._combined("|", other, self.edges | self._compatible(other))

    def __sub__(self, other: Set[Any]) -> "EdgeMask":
        return self._combined("-", other, self.edges - self._compatible(other))

    def __xor__(self, other: Set[Any]) -> "EdgeMask":  # type: ignore[override]  (see __or__)
        return self._combined("^", other, self.edges ^ self._compatible(other))

    def __rsub__(self, other: Set[Any]) -> "EdgeMask":
        return EdgeMask(self._compatible(other), self.shape, {"method": "by hand"}) - self

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __repr__(self) -> str:
        labels = [str(edge) for edge in self]
        shown = ", ".join(labels[:6]) + (f", ... ({len(labels) - 6} more)" if len(labels) > 6 else "")
        return f"EdgeMask({shown})"

    def _compatible(self, other: Set[Any]) -> frozenset[Edge]:
        if isinstance(other, EdgeMask) and other.shape != self.shape:
            raise ValueError(
                f"expected edges of a model of the same shape ({self.shape}), got those of {other.shape}: "
                f"a circuit belongs to the model that it was found in."
            )
        return frozenset(Edge.parse(edge) if isinstance(edge, str) else edge for edge in other)

    def _combined(self, operation: str, other: Set[Any], edges: frozenset[Edge]) -> "EdgeMask":
        right = dict(other.provenance) if isinstance(other, EdgeMask) else sorted(map(str, other))
        return EdgeMask(edges, self.shape, {"left": dict(self.provenance), "set": operation, "right": right})
