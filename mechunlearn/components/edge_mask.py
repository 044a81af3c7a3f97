"""A circuit: an immutable set of edges of a model of one shape."""

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from mechunlearn.components.component import Component, ModelShape
from mechunlearn.components.edge import Destination, Edge, edges_where, mask_of
from mechunlearn.components.mask import ComponentMask
from mechunlearn.files import read_json, write_json


@dataclass(frozen=True, eq=False, repr=False)
class EdgeMask(Set[Edge]):
    """A set of edges: `|`, `&`, `-`, `^`, `in`, `len`, iteration in model order.

    Two of them are equal when they select the same edges of the same shape.
    """

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
        """The heads and MLPs at either end of its edges: what an editor would edit.

        A KV head that several query heads share counts as its matrix alone (`L3H0.W_K`), since the edge does
        not say which of those heads it is for.
        """
        ends = {edge.source for edge in self.edges} | {self._part(edge.destination) for edge in self.edges}
        chosen = frozenset(end for end in ends if isinstance(end, Component))
        return ComponentMask(chosen, self.shape, dict(self.provenance) | {"components of": f"{len(self)} edges"})

    def save(self, path: str | Path) -> None:
        """Write JSON with provenance and a checksum."""
        content = {
            "edges": [str(edge) for edge in self],
            "shape": asdict(self.shape),
            "provenance": dict(self.provenance),
        }
        write_json(path, "EdgeMask", content)

    @classmethod
    def load(cls, path: str | Path) -> "EdgeMask":
        """What `save` wrote; ValueError for a corrupted or truncated file."""
        content = read_json(path, "EdgeMask")
        members = frozenset(Edge.parse(label) for label in content["edges"])
        return cls(members, ModelShape(**content["shape"]), content["provenance"])

    def __contains__(self, edge: object) -> bool:
        return (Edge.parse(edge) if isinstance(edge, str) else edge) in self.edges

    def __iter__(self) -> Iterator[Edge]:
        return iter(sorted(self.edges, key=lambda edge: edge._order))

    def __len__(self) -> int:
        return len(self.edges)

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

    def __repr__(self) -> str:
        labels = [str(edge) for edge in self]
        shown = ", ".join(labels[:6]) + (f", ... ({len(labels) - 6} more)" if len(labels) > 6 else "")
        return f"EdgeMask({shown})"

    def _part(self, destination: Destination) -> Destination:
        if not isinstance(destination, Component) or destination.part == "MLP":
            return destination
        shared = destination.matrix != "W_Q" and self.shape.n_kv_heads < self.shape.n_heads
        return destination if shared else Component(destination.layer, "H", destination.index)

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
