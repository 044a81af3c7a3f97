"""Components, which are named sets of weight slices, and the shape of a model, which says what slices it has."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import total_ordering
from typing import TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

ATTENTION_MATRICES = ("W_Q", "W_K", "W_V", "W_O")
MLP_MATRICES = ("W_in", "W_gate", "W_out")
MATRICES = ATTENTION_MATRICES + MLP_MATRICES

_PARTS = ("ATTN", "H", "MLP", "N")
_INT = r"(0|[1-9]\d*)"
_LABEL = re.compile(rf"L{_INT}(?:(ATTN)|H{_INT}(?:\.(W_[QKVO]))?|(MLP)(?:\.(W_in|W_gate|W_out))?|N{_INT})", re.ASCII)


@total_ordering
@dataclass(frozen=True)
class Component:
    """One addressable part of a transformer.

    | label | what it covers |
    |---|---|
    | `L5ATTN` | all of `W_Q W_K W_V W_O` of layer 5 |
    | `L5H3` | the four slices of query head 3 |
    | `L5H3.W_Q` | one slice of one head |
    | `L8MLP` | `W_in`, `W_out` and, in gated MLPs, `W_gate` |
    | `L8MLP.W_out` | one matrix |
    | `L8N40` | neuron 40: its column of `W_in` (and `W_gate`) and its row of `W_out` |

    `str(component)` and `Component.parse` are inverses. Biases and norms belong to no component and are never edited.

    Grouped KV heads: `H` always counts *query* heads. With `g = n_heads / n_kv_heads`, query heads
    `g*j ... g*j + g - 1` read the same key and value head `j`, so their `W_K` (and `W_V`) labels name
    the same entries: in a model with 4 query and 2 KV heads, `L5H2.W_K` and `L5H3.W_K` are one slice,
    and `L5H2` and `L5H3` overlap in it. Masks count shared entries once, and `matrices(shape)` lists
    them once, under the lowest query head that reads them.
    """

    layer: int
    part: str
    """`"ATTN"`, `"H"`, `"MLP"` or `"N"`."""
    index: int | None = None
    """Query head for `H`, neuron for `N`."""
    matrix: str | None = None
    """One matrix of a head or an MLP; None for all of them."""

    def __post_init__(self) -> None:
        if _LABEL.fullmatch(str(self)) is None:
            raise ValueError(
                f"expected a component with a label such as L5H3, L5H3.W_Q, L5ATTN, L8MLP, L8MLP.W_in or L8N40, got "
                f"layer={self.layer}, part={self.part!r}, index={self.index}, matrix={self.matrix!r}: heads and "
                f"neurons need an index from 0, only heads and MLPs have matrices."
            )

    @classmethod
    def parse(cls, label: str) -> "Component":
        """The component of that label; ValueError for anything else."""
        match = _LABEL.fullmatch(label)
        if match is None:
            raise ValueError(
                f"expected a component label such as L5H3, L5H3.W_Q, L5ATTN, L8MLP, L8MLP.W_in or L8N40, "
                f"got {label!r}: write the layer, then the part."
            )
        layer, attn, head, head_matrix, mlp, mlp_matrix, neuron = match.groups()
        if attn:
            return cls(int(layer), "ATTN")
        if head:
            return cls(int(layer), "H", int(head), head_matrix)
        if mlp:
            return cls(int(layer), "MLP", None, mlp_matrix)
        return cls(int(layer), "N", int(neuron))

    def __str__(self) -> str:
        index = "" if self.index is None else self.index
        return f"L{self.layer}{self.part}{index}" + (f".{self.matrix}" if self.matrix else "")

    __repr__ = __str__

    def __lt__(self, other: "Component") -> bool:
        return self._order < other._order

    @property
    def kind(self) -> tuple[str, str | None]:
        """Part and matrix, whatever the layer and index: two MLPs, or two heads' `W_Q`, are of one kind."""
        return self.part, self.matrix

    @property
    def _order(self) -> tuple[int, int, int, int]:
        matrix = -1 if self.matrix is None else MATRICES.index(self.matrix)
        return self.layer, _PARTS.index(self.part), -1 if self.index is None else self.index, matrix


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that decide which components it has and how many weights each covers.

    Attention weights divide into heads of `d_head * d_model` entries, MLP weights into neurons of
    `d_model` entries: these *units* are the smallest slices that a component can name.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    gated: bool

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices of one layer."""
        return tuple(name for name in MATRICES if self.gated or name != "W_gate")

    def units(self, matrix: str) -> int:
        """Units of one layer's `matrix`: query heads, KV heads or neurons."""
        if matrix in MLP_MATRICES:
            return self.d_mlp
        return self.n_kv_heads if matrix in ("W_K", "W_V") else self.n_heads

    def unit_parameters(self, matrix: str) -> int:
        """Number of weights of one unit of `matrix`."""
        return self.d_model * (1 if matrix in MLP_MATRICES else self.d_head)

    def units_of(self, component: Component) -> dict[str, slice]:
        """Matrix -> the units of it that the component covers."""
        self._check(component)
        group = ATTENTION_MATRICES if component.part in ("ATTN", "H") else MLP_MATRICES
        chosen = [m for m in group if m in self.matrices and component.matrix in (None, m)]
        if component.index is None:
            return {m: slice(None) for m in chosen}
        kv_head = component.index * self.n_kv_heads // self.n_heads
        units = {m: kv_head if m in ("W_K", "W_V") else component.index for m in chosen}
        return {m: slice(unit, unit + 1) for m, unit in units.items()}

    def entries(self, components: Iterable[Component]) -> dict[tuple[int, str], Bool[Tensor, "unit"]]:
        """(layer, matrix) -> which of its units the components cover together."""
        cover = Cover(self)
        for component in components:
            cover.add(component)
        return cover.units

    def n_parameters(self, components: Iterable[Component]) -> int:
        """Number of weights that the components cover together, shared ones counted once."""
        return sum(int(units.sum()) * self.unit_parameters(m) for (_, m), units in self.entries(components).items())

    def _check(self, component: Component) -> None:
        limit = {"H": self.n_heads, "N": self.d_mlp}.get(component.part)
        inside = component.layer < self.n_layers and (limit is None or (component.index or 0) < limit)
        if not inside or (component.matrix == "W_gate" and not self.gated):
            raise ValueError(
                f"expected a component of a model with {self.n_layers} layers, {self.n_heads} heads, "
                f"{self.d_mlp} neurons per layer and {'a' if self.gated else 'no'} W_gate, got {component}: "
                f"was the mask or score made for another model?"
            )


Components: TypeAlias = Callable[[ModelShape], Iterable[Component]] | Iterable[Component | str]
"""Which components: a level (`heads`, `mlps`, ...: a function of the shape), components, or their labels."""


def resolve(components: Components, shape: ModelShape) -> tuple[Component, ...]:
    """The components of a level, or of a list of components and labels; ValueError for one outside the shape."""
    listed = components(shape) if callable(components) else components
    resolved = tuple(Component.parse(c) if isinstance(c, str) else c for c in listed)
    for component in resolved:
        shape.units_of(component)
    return resolved


class Cover:
    """Weights covered so far, as components are added one by one."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.units: dict[tuple[int, str], Tensor] = {}

    def gain(self, component: Component) -> int:
        """How many weights the component would add."""
        added = 0
        for matrix, units in self.shape.units_of(component).items():
            covered = self.units.get((component.layer, matrix), self._empty(matrix))
            added += int((~covered[units]).sum()) * self.shape.unit_parameters(matrix)
        return added

    def add(self, component: Component) -> None:
        """Cover the component's weights."""
        for matrix, units in self.shape.units_of(component).items():
            self.units.setdefault((component.layer, matrix), self._empty(matrix))[units] = True

    def _empty(self, matrix: str) -> Bool[Tensor, "unit"]:
        return torch.zeros(self.shape.units(matrix), dtype=torch.bool)


def heads(shape: ModelShape) -> list[Component]:
    """Every query head, in layer order."""
    return [Component(layer, "H", h) for layer in range(shape.n_layers) for h in range(shape.n_heads)]


def mlps(shape: ModelShape) -> list[Component]:
    """Every MLP, in layer order."""
    return [Component(layer, "MLP") for layer in range(shape.n_layers)]


def heads_and_mlps(shape: ModelShape) -> list[Component]:
    """Every head and every MLP, in layer order: the usual granularity of circuit discovery."""
    return sorted(heads(shape) + mlps(shape))


def layers(shape: ModelShape) -> list[Component]:
    """Every attention layer and every MLP: the units that the paper trains."""
    return [Component(layer, part) for layer in range(shape.n_layers) for part in ("ATTN", "MLP")]


def matrices(shape: ModelShape) -> list[Component]:
    """Every head's slices and every MLP matrix: a partition of all attention and MLP weights."""
    slices = []
    for layer in range(shape.n_layers):
        for matrix in shape.matrices:
            if matrix in MLP_MATRICES:
                slices.append(Component(layer, "MLP", None, matrix))
            else:
                group = shape.n_heads // shape.units(matrix)
                slices += [Component(layer, "H", h, matrix) for h in range(0, shape.n_heads, group)]
    return sorted(slices)


def neurons(shape: ModelShape) -> list[Component]:
    """Every MLP neuron, in layer order: many."""
    return [Component(layer, "N", n) for layer in range(shape.n_layers) for n in range(shape.d_mlp)]
