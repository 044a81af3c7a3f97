"""Masks: immutable sets of components of a model, and random masks that cover as many weights."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mechunlearn.components.component import (
    Component,
    Components,
    Cover,
    ModelShape,
    heads,
    layers,
    matrices,
    mlps,
    neurons,
    resolve,
)
from mechunlearn.components.plot import heat_map
from mechunlearn.files import read_json, write_json

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False, repr=False)
class ComponentMask(Set[Component]):
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

    def save(self, path: str | Path) -> None:
        """Write JSON with provenance and a checksum."""
        content = {
            "components": [str(component) for component in self],
            "shape": asdict(self.shape),
            "provenance": dict(self.provenance),
        }
        write_json(path, "ComponentMask", content)

    @classmethod
    def load(cls, path: str | Path) -> "ComponentMask":
        """What `save` wrote; ValueError for a corrupted or truncated file."""
        content = read_json(path, "ComponentMask")
        members = frozenset(Component.parse(label) for label in content["components"])
        return cls(members, ModelShape(**content["shape"]), content["provenance"])

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


def matched(mask: ComponentMask, seed: int, *, pool: Components | None = None) -> ComponentMask:
    """A random mask that covers as many weights as `mask`; see `mu.localize.random_like`, which is for users."""
    sizes = mask.shape
    members = sorted(set(resolve(pool, sizes))) if pool is not None else _same_kinds(mask, sizes)
    generator = Random(f"random_like {seed}")
    for _ in range(100):
        chosen = _matching(mask, members, generator, by_kind=pool is None)
        if chosen != mask.components:
            break
    else:
        raise ValueError(
            f"expected a pool with other components than the mask's {len(mask)}, got one of {len(members)}: "
            f"a control equal to the mask is none; pass a larger pool, such as heads_and_mlps."
        )
    provenance = {"method": "random_like", "seed": seed, "weights": sizes.n_parameters(chosen)}
    provenance |= {"matched": mask.n_parameters, "shared": len(chosen & mask.components)}
    provenance["pool"] = "the same kinds" if pool is None else [str(member) for member in members]
    return ComponentMask(chosen, sizes, provenance)


def _matching(
    mask: ComponentMask, members: list[Component], generator: Random, *, by_kind: bool
) -> frozenset[Component]:
    """Members in random order for as long as they fit into the mask's number of weights."""
    sizes = mask.shape
    one_of_each = {member.kind: member for member in members}.values()
    target, smallest = mask.n_parameters, min((sizes.n_parameters([m]) for m in one_of_each), default=0)
    chosen, cover, count = [], Cover(sizes), 0
    for member in _random_order(members, mask if by_kind else (), sizes, generator):
        gain = cover.gain(member)
        if 0 < gain <= target - count:
            chosen.append(member)
            cover.add(member)
            count += gain
    if not chosen or target - count >= smallest:
        raise ValueError(
            f"expected a pool that can cover {target:,} weights within one smallest component ({smallest:,}), got "
            f"{count:,} out of {len(members)} components: pass a larger pool or one with smaller components."
        )
    return frozenset(chosen)


def _same_kinds(mask: ComponentMask, sizes: ModelShape) -> list[Component]:
    """All components of the model that are of the mask's kinds."""
    kinds = {component.kind for component in mask}
    levels = (heads, mlps, layers, matrices, neurons)
    return sorted({c for level in levels for c in level(sizes) if c.kind in kinds})


def _random_order(
    members: list[Component], mask: Iterable[Component], sizes: ModelShape, generator: Random
) -> list[Component]:
    """Members in random order: first as many of each kind as the mask has, the largest kind first, then the rest."""
    shuffled = generator.sample(members, len(members))
    left = Counter(component.kind for component in mask)
    first, rest = [], []
    for member in shuffled:
        (first if left[member.kind] > 0 else rest).append(member)
        left[member.kind] -= 1
    weights = {member.kind: sizes.n_parameters([member]) for member in {m.kind: m for m in first}.values()}
    return sorted(first, key=lambda member: -weights[member.kind]) + rest
