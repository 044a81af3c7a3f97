"""Masks: immutable sets of components of a model."""

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mechunlearn.components.component import Component, ModelShape, resolve
from mechunlearn.components.plot import heat_map
from mechunlearn.files import Saved

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False, repr=False)
class ComponentMask(Set[Component], Saved):
    """A set of components: `|`, `&`, `-`, `^`, `in`, `len`, iteration in layer order.

    Two masks are equal when they select the same components of the same shape. Components may
    overlap (`L5H3` and `L5ATTN`): weights that several of them cover count once.
    """

    components: frozenset[Component]
    """What is selected."""
    shape: ModelShape
    """Of the model that it was made for."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: the method, its settings and what selected from it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", frozenset(resolve(self.components, self.shape)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @classmethod
    def of(cls, components: Iterable[Component | str], shape: ModelShape) -> "ComponentMask":
        """A mask written down by hand: `ComponentMask.of(["L2MLP", "L3MLP"], mu.shape(model))`."""
        return cls(frozenset(resolve(components, shape)), shape, {"method": "by hand"})

    @property
    def n_parameters(self) -> int:
        """Number of weights it covers, shared and overlapping ones counted once."""
        return self.shape.n_parameters(self.components)

    def plot(self) -> "Figure":
        """Layer x component map: 1 where selected."""
        return heat_map(dict.fromkeys(self, 1.0), title=f"{len(self)} components, {self.n_parameters:,} weights")

    def __contains__(self, component: object) -> bool:
        return (Component.parse(component) if isinstance(component, str) else component) in self.components

    def __iter__(self) -> Iterator[Component]:
        return iter(sorted(self.components))

    def __len__(self) -> int:
        return len(self.components)

    def __reduce__(self) -> tuple[Any, ...]:
        """The arguments that rebuild the mask in another process, to which a read-only mapping cannot be sent."""
        return ComponentMask, (self.components, self.shape, dict(self.provenance))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ComponentMask):
            return NotImplemented
        return (self.components, self.shape) == (other.components, other.shape)

    def __hash__(self) -> int:
        return hash((self.components, self.shape))

    def __and__(self, other: Set[Any]) -> "ComponentMask":
        return self._combined("&", other, self.components & self._compatible(other))

    def __or__(self, other: Set[Any]) -> "ComponentMask":  # type: ignore[override]  (a mask of masks is not a thing)
        return self._combined("|", other, self.components | self._compatible(other))

    def __sub__(self, other: Set[Any]) -> "ComponentMask":
        return self._combined("-", other, self.components - self._compatible(other))

    def __xor__(self, other: Set[Any]) -> "ComponentMask":
        return self._combined("^", other, self.components ^ self._compatible(other))

    def __rsub__(self, other: Set[Any]) -> "ComponentMask":
        return ComponentMask(self._compatible(other), self.shape, {"method": "by hand"}) - self

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __repr__(self) -> str:
        labels = [str(component) for component in self]
        shown = ", ".join(labels[:8]) + (f", ... ({len(labels) - 8} more)" if len(labels) > 8 else "")
        return f"ComponentMask({shown}; {self.n_parameters:,} weights)"

    def _compatible(self, other: Set[Any]) -> frozenset[Component]:
        if isinstance(other, ComponentMask) and other.shape != self.shape:
            raise ValueError(
                f"expected a mask of a model of the same shape ({self.shape}), got one of {other.shape}: "
                f"localize on the model that you edit."
            )
        return frozenset(Component.parse(c) if isinstance(c, str) else c for c in other)

    def _combined(self, operation: str, other: Set[Any], components: frozenset[Component]) -> "ComponentMask":
        right = dict(other.provenance) if isinstance(other, ComponentMask) else sorted(map(str, other))
        return ComponentMask(components, self.shape, {"left": dict(self.provenance), "set": operation, "right": right})
