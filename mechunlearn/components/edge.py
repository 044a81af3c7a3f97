"""Edges: what one component adds to the residual stream, as another reads it; and the edges that a model has."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, total_ordering
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.components.component import Component, ModelShape

Source: TypeAlias = Component | Literal["embed"]
"""What writes to the residual stream: a head, an MLP, or the embedding (the residual that enters layer 0)."""
Destination: TypeAlias = Component | Literal["logits"]
"""What reads it: a head's `W_Q`, `W_K` or `W_V`, an MLP, or the final norm and unembedding."""

_KV = ("W_K", "W_V")
_READS = ("W_Q", *_KV)
_SOURCES = ("embed", ("H", None), ("MLP", None))
_DESTINATIONS = ("logits", ("MLP", None), *(("H", matrix) for matrix in _READS))


@total_ordering
@dataclass(frozen=True)
class Edge:
    """The direct path from one source to one destination: through the residual stream and nothing else.

    | label | what it is |
    |---|---|
    | `L1H2->L3H0.W_Q` | what head L1H2 adds, as L3H0 reads it for its queries |
    | `L1H2->L3H0.W_K` | ... for the keys of the KV head that L3H0 reads |
    | `embed->L0MLP` | the embedding, as the MLP of layer 0 reads it |
    | `L4MLP->logits` | what the MLP adds, as the final norm and the unembedding read it |

    `str(edge)` and `Edge.parse` are inverses. Where query heads share a KV head, `edges(shape)` lists the KV
    head's `W_K` and `W_V` once, under the lowest query head that reads them, as `matrices(shape)` does.
    """

    source: Source
    destination: Destination

    def __post_init__(self) -> None:
        ends = (end.kind if isinstance(end, Component) else end for end in (self.source, self.destination))
        if not all(end in known for end, known in zip(ends, (_SOURCES, _DESTINATIONS), strict=True)):
            raise ValueError(f"{_EXPECTED}, got {self}: heads and MLPs write, W_Q, W_K, W_V, MLPs and logits read.")
        if _stage(self.source) >= _stage(self.destination):
            raise ValueError(
                f"expected an edge that goes forward in the model, got {self}: a destination reads what earlier layers "
                f"wrote (and an MLP the heads of its own layer)."
            )

    @classmethod
    def parse(cls, label: str) -> "Edge":
        """The edge of that label; ValueError for anything else."""
        parts = re.fullmatch(r"([^>]+)->([^>]+)", label)
        if parts is None:
            raise ValueError(f"{_EXPECTED}, got {label!r}: write source->destination.")
        source, destination = parts.groups()
        return cls(
            "embed" if source == "embed" else Component.parse(source),
            "logits" if destination == "logits" else Component.parse(destination),
        )

    def __str__(self) -> str:
        return f"{self.source}->{self.destination}"

    __repr__ = __str__

    def __lt__(self, other: "Edge") -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[bool, Source, bool, Destination]:
        """By source, then destination, in model order: embed comes first, logits last."""
        return self.source != "embed", self.source, self.destination == "logits", self.destination


_EXPECTED = "expected an edge with a label such as L1H2->L3H0.W_Q, embed->L0MLP or L4MLP->logits"


def edges(shape: ModelShape, *, parallel: bool = False) -> list[Edge]:
    """Every edge, in model order; `parallel`: a layer's MLP reads what its heads read (GPT-NeoX), not what they add."""
    return list(edges_where(edge_mask(shape, parallel=parallel), shape))


@cache
def sources(shape: ModelShape) -> tuple[Source, ...]:
    """Everything that writes to the residual stream, in model order: the rows of `EdgeScores.tensor`."""
    writers: list[Source] = ["embed"]
    for layer in range(shape.n_layers):
        writers += [Component(layer, "H", head) for head in range(shape.n_heads)]
        writers.append(Component(layer, "MLP"))
    return tuple(writers)


@cache
def destinations(shape: ModelShape) -> tuple[Destination, ...]:
    """Everything that reads the residual stream, in model order: the columns of `EdgeScores.tensor`."""
    group = shape.n_heads // shape.n_kv_heads
    readers: list[Destination] = []
    for layer in range(shape.n_layers):
        for head in range(shape.n_heads):
            read = _READS if head % group == 0 else ("W_Q",)
            readers += [Component(layer, "H", head, matrix) for matrix in read]
        readers.append(Component(layer, "MLP"))
    return (*readers, "logits")


def edge_mask(shape: ModelShape, *, parallel: bool = False) -> Bool[Tensor, "source destination"]:
    """True where the destination reads what the source writes."""
    writes = torch.tensor([_stage(source) for source in sources(shape)])
    reads = torch.tensor([_stage(d, parallel=parallel) for d in destinations(shape)])
    return writes[:, None] < reads[None, :]


def edges_where(chosen: Bool[Tensor, "source destination"], shape: ModelShape) -> Iterator[Edge]:
    """The edges at the True entries, in model order."""
    known = _edges(shape)
    for row, column in chosen.nonzero().tolist():
        yield known.get((row, column)) or Edge(sources(shape)[row], destinations(shape)[column])


def place_of(edge: Edge | str, shape: ModelShape) -> tuple[int, int]:
    """Row and column of an edge (or its label) in `EdgeScores.tensor`; ValueError for one outside the shape.

    `L3H1.W_K` is found at `L3H0.W_K` where both heads read the same KV head.
    """
    wanted = Edge.parse(edge) if isinstance(edge, str) else edge
    if (known := _places_of_edges(shape).get(wanted)) is not None:
        return known
    for end in (wanted.source, wanted.destination):
        if isinstance(end, Component):
            shape.units_of(end)
    rows, columns = _places(shape)
    return rows[wanted.source], columns[_shared(wanted.destination, shape)]


def mask_of(chosen: Iterable[Edge | str], shape: ModelShape) -> Bool[Tensor, "source destination"]:
    """True at the given edges or labels; ValueError for one outside the shape."""
    mask = torch.zeros(len(sources(shape)), len(destinations(shape)), dtype=torch.bool)
    places = [place_of(edge, shape) for edge in chosen]
    if places:
        mask[tuple(torch.tensor(places).T)] = True
    return mask


@cache
def _places(shape: ModelShape) -> tuple[dict[Source, int], dict[Destination, int]]:
    rows, columns = enumerate(sources(shape)), enumerate(destinations(shape))
    return {source: row for row, source in rows}, {destination: column for column, destination in columns}


@cache
def _edges(shape: ModelShape) -> dict[tuple[int, int], Edge]:
    """Row and column -> edge. Circuits are large, and an edge is slow to make: each is made once."""
    rows, columns = sources(shape), destinations(shape)
    return {(row, column): Edge(rows[row], columns[column]) for row, column in edge_mask(shape).nonzero().tolist()}


@cache
def _places_of_edges(shape: ModelShape) -> dict[Edge, tuple[int, int]]:
    return {edge: place for place, edge in _edges(shape).items()}


def _shared(destination: Destination, shape: ModelShape) -> Destination:
    """A KV head's matrix under the lowest query head that reads it."""
    if not isinstance(destination, Component) or destination.matrix not in _KV:
        return destination
    group = shape.n_heads // shape.n_kv_heads
    assert destination.index is not None  # a head has one
    return Component(destination.layer, "H", destination.index // group * group, destination.matrix)


def _stage(end: Source | Destination, *, parallel: bool = False) -> float:
    """The point of a forward pass at which it reads or writes: destinations read the sources of earlier stages."""
    if not isinstance(end, Component):
        return -1.0 if end == "embed" else torch.inf
    return float(2 * end.layer + (end.part == "MLP" and not parallel))
