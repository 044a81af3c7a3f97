"""Circuits of growing size: rankings cut at several places, and what is measured of each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mechunlearn.components import ComponentMask, ComponentScores, EdgeMask, EdgeScores
from mechunlearn.localize.circuit_curves import Faithfulness

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares at which the Mechanistic Interpretability Benchmark cuts circuits."""

Ranking: TypeAlias = ComponentScores | EdgeScores
Circuit: TypeAlias = ComponentMask | EdgeMask
Given: TypeAlias = Ranking | Sequence[Circuit]
"""One curve: scores whose ranking is to be cut, or circuits."""
Size: TypeAlias = Callable[[Any], int]
"""How large a circuit is."""


def check_sizes(sizes: Sequence[float], random_circuits: int) -> None:
    """ValueError for sizes that are no shares, and for less than no random circuits."""
    outside = [size for size in sizes if not 0 <= size <= 1]
    if outside or not sizes:
        raise ValueError(
            f"expected sizes in [0, 1], shares of all components (at least one), got {outside or 'none'}: divide a "
            f"number of components by how many there are."
        )
    if random_circuits < 0:
        raise ValueError(f"expected a number of random circuits, 0 or more, got {random_circuits}.")


def named(circuits: Any) -> dict[str, Given]:
    """What was given (scores, a circuit, several, or a dict of such), under names."""
    if isinstance(circuits, ComponentScores | EdgeScores):
        circuits = {circuits.method: circuits}
    elif not isinstance(circuits, Mapping):
        circuits = {"circuit": circuits}
    if not circuits or any(name.startswith("random ") for name in circuits):
        raise ValueError(
            f'expected at least one circuit or scores, under a name that does not start with "random " (the '
            f"baseline's), got {list(circuits) or 'none'}: name them otherwise."
        )
    return {name: [one] if isinstance(one, ComponentMask | EdgeMask) else one for name, one in circuits.items()}


def curve(circuits: Iterable[Circuit], nothing: Circuit, everything: Circuit, size: Size) -> list[Circuit]:
    """Circuits in order of size, nothing and everything among them."""
    return sorted(dict.fromkeys([nothing, *circuits, everything]), key=lambda circuit: (size(circuit), len(circuit)))


def measured(
    curves: Mapping[str, Sequence[Any]],
    size: Size,
    values_without: Callable[[list[frozenset[Any]]], tuple[Tensor, Tensor]],
    metric: str,
    settings: Mapping[str, Any],
) -> Faithfulness:
    """Circuits by themselves and taken out; equal ones are run once, and the whole model is never run again.

    `values_without` gives the metric of the whole model, and of the model with each of these sets replaced.
    """
    names = tuple(name for name, circuits in curves.items() for _ in circuits)
    circuits = tuple(circuit for circuits in curves.values() for circuit in circuits)
    inside = [_members(circuit) for circuit in circuits]
    everything = inside[-1]
    outside = [everything - circuit for circuit in inside]
    replaced = [chosen for chosen in dict.fromkeys([everything, *outside, *inside]) if chosen]
    whole, values = values_without(list(replaced))
    values = torch.cat([values, whole[:, None]], 1)
    column = {chosen: place for place, chosen in enumerate(replaced)} | {frozenset(): len(replaced)}
    share = torch.tensor([size(circuit) / size(circuits[-1]) for circuit in circuits], dtype=torch.float64)
    alone, without = (values[:, [column[chosen] for chosen in each]] for each in (outside, inside))
    return Faithfulness(names, circuits, share, alone, without, whole, values[:, 0], metric, settings)


def _members(circuit: Any) -> frozenset[Any]:
    return circuit.edges if isinstance(circuit, EdgeMask) else circuit.components
