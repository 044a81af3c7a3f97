"""Faithfulness: does a circuit of components, or of edges, alone do what the model does?"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeAlias, Unpack

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.arguments import check, check_functions, chosen_components
from mechunlearn.components import Component, ComponentMask, Components, ComponentScores, EdgeMask, EdgeScores
from mechunlearn.components.component import ModelShape, heads_and_mlps
from mechunlearn.components.edge import edges_where
from mechunlearn.identity import name_of
from mechunlearn.localize.circuits.curves import (
    MIB_SIZES,
    Circuit,
    CurveSource,
    Faithfulness,
    Ranking,
    Size,
    check_sizes,
    measured_faithfulness,
    named_curves,
    ordered_circuits,
)
from mechunlearn.localize.circuits.runs import circuit_values, edge_circuit_values
from mechunlearn.localize.controls import random
from mechunlearn.localize.options import ReplacingOptions, settings_of
from mechunlearn.localize.sites import resolution
from mechunlearn.model import Model, shape
from mechunlearn.model.edges import edges_of
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts

Circuits: TypeAlias = ComponentScores | ComponentMask | Sequence[ComponentMask]
"""Scores, whose ranking is cut at several sizes; or a circuit, or several nested ones."""


def n_components(circuit: ComponentMask) -> int:
    """A circuit's size: how many components it has."""
    return len(circuit)


def n_weights(circuit: ComponentMask) -> int:
    """A circuit's size: how many weights it covers."""
    return circuit.n_parameters


@with_options()
def faithfulness(
    model: Model,
    prompts: Prompts,
    circuits: Circuits | Mapping[str, Circuits],
    *,
    sizes: Sequence[float] = MIB_SIZES,
    size: Size = n_components,
    by: Callable[[Tensor], Tensor] = torch.abs,
    components: Components | None = None,
    random_circuits: int = 5,
    **options: Unpack[ReplacingOptions],
) -> Faithfulness:
    r"""How much of the metric circuits keep when all else is replaced, over their size.

        faithfulness of C = (m(C) - m(nothing)) / (m(model) - m(nothing))

    m(C) is the mean metric when all components outside C are replaced (not the embedding and the norms). CPR is
    the area under the curve over size, CMD the area between it and 1 (0 is best); `left` is the faithfulness of the
    model *without* C (0: C is complete).

    - `circuits`: scores, a circuit, nested ones, or a dict of such; all share one corrupted run.
    - `sizes`: shares in [0, 1] of the `size` of all components, `n_components` (default) or `n_weights`: rankings are
      cut to the longest start that is not larger. 0 and 1 are always there and cost nothing.
    - `by` ranks scores as in `ComponentScores.top`. MIB ranks by the signed score for CPR (`torch.neg` for noising
      scores, where needed components are negative) and by its size for CMD.
    - `components`: what is replaced outside the circuit: by default the components scored, or heads and MLPs.
    - `random_circuits`: the number of random rankings, cut at the same sizes and named "random 0", ...

    Cost: 2F, and for each different circuit twice the part of F from the lowest replaced layer on. ValueError for
    circuits or scores of other components, no corrupted prompts, and where replacing everything changes nothing.

    Mueller et al. 2025, https://arxiv.org/abs/2504.13151; Wang et al. 2022, https://arxiv.org/abs/2211.00593;
    that the numbers depend on what replaces: Miller et al. 2024, https://arxiv.org/abs/2407.08734.
    """
    check_sizes(sizes, random_circuits)
    check_functions(metric=options["metric"], size=size, by=by, replacement=options["replacement"])
    sizes_of = shape(model)
    sources = named_curves(circuits)
    level = replaced_components(sources, components, sizes_of)
    for seed in range(random_circuits):
        sources[f"random {seed}"] = random(model, seed=seed, components=level)
    ends = ComponentMask.of([], sizes_of), ComponentMask.of(level, sizes_of)
    curves = {name: ordered_circuits(_cut(source, sizes, size, by), *ends, size) for name, source in sources.items()}
    limit = resolution(model, prompts, options["metric"], options["compute_dtype"], options["batch_size"])
    settings = settings_of(options, prompts, size=name_of(size), components=len(level), **limit)
    values_without = partial(circuit_values, model, prompts, options=options)
    return measured_faithfulness(curves, size, values_without, name_of(options["metric"]), settings)


def replaced_components(
    curves: Mapping[str, CurveSource], components: Components | None, sizes: ModelShape
) -> tuple[Component, ...]:
    """The components that are replaced when they are outside the circuit."""
    scored = [source for source in curves.values() if isinstance(source, ComponentScores)]
    if components is None:
        components = scored[0].components if scored else heads_and_mlps
    level = tuple(dict.fromkeys(chosen_components(components, sizes)))
    for name, circuit in _members_of_curves(curves, sizes):
        if isinstance(circuit, EdgeMask | EdgeScores):
            raise ValueError(f"expected components, got edges in {name!r}: use edge_faithfulness.")
        other = set(circuit) ^ set(level) if isinstance(circuit, ComponentScores) else set(circuit) - set(level)
        if other:
            raise ValueError(
                f"expected circuits and scores of the {len(level)} components that are replaced, got {name!r}, which "
                f"differs in {', '.join(map(str, sorted(other)[:5]))}: pass components=... (such as "
                f"components.layers), or score the same components."
            )
    return level


def _members_of_curves(curves: Mapping[str, CurveSource], sizes: ModelShape) -> Iterator[tuple[str, Circuit | Ranking]]:
    """Every ranking and circuit with its curve's name; ValueError for one of another model."""
    for name, source in curves.items():
        for circuit in [source] if isinstance(source, ComponentScores | EdgeScores) else source:
            if circuit.shape != sizes:
                raise ValueError(
                    f"expected circuits of this model ({sizes}), got {name!r} of another one ({circuit.shape}): "
                    f"localize on the model that you test."
                )
            yield name, circuit


def _cut(source: CurveSource, sizes: Sequence[float], size: Size, by: Callable[[Tensor], Tensor]) -> Iterable[Circuit]:
    """The longest starts of a ranking that are not larger than the shares say; circuits as they are."""
    assert not isinstance(source, EdgeScores)  # replaced_components refuses them
    if not isinstance(source, ComponentScores):
        return source

    def size_of(k: int) -> int:
        return size(source.top(k=k, by=by)) if k else 0

    # Size grows with k, so the cut is found by bisection; the margin keeps a share that is exact in decimals from being
    # cut one short by rounding.
    n = len(source)
    limits = [share * size_of(n) * (1 + 1e-9) for share in sizes]
    counts = [bisect_right(range(n + 1), limit, key=size_of) - 1 for limit in limits]
    return [source.top(k=k, by=by) for k in counts if k]


EdgeCircuit: TypeAlias = EdgeScores | EdgeMask | Sequence[EdgeMask]
"""Scores, whose ranking is cut at several sizes; or a circuit, or several nested ones."""


@with_options(batch_size=16)
def edge_faithfulness(
    model: Model,
    prompts: Prompts,
    circuits: EdgeCircuit | Mapping[str, EdgeCircuit],
    *,
    sizes: Sequence[float] = MIB_SIZES,
    by: Callable[[Tensor], Tensor] = torch.abs,
    random_circuits: int = 3,
    **options: Unpack[ReplacingOptions],
) -> Faithfulness:
    r"""`faithfulness` of circuits of edges: in m(C), an edge outside C carries the corrupt run, or another replacement.

    A destination v reads

        r + sum over edges u -> v outside C of (a'_u - a_u)

    where r is the residual stream of the circuit's own run, a_u what the source u adds to it there and a'_u what u adds
    with the output of the `replacement`. In m(nothing) the outputs of all sources are replaced.

    - "embed" is what enters layer 0: embeddings of tokens and, in GPT-2, positions. It is a source too: with `zero`,
      destinations outside the circuit see neither.
    - As MIB prunes: a head or MLP that no edge of the circuit enters writes its replacement.
    - Edges are those of `edge_attribution_patching`. In Gemma 2 a norm follows attention: there v reads what the norm
      makes of the layer's heads, those with a removed edge to v replaced; one such edge has its `edge_patching` effect.
    - `sizes` are shares of the number of edges scored (without scores, of all edges). Edges without a score always
      carry the circuit's own run.
    - Edges on no path from the embedding to the logits count in a circuit's size too.

    Cost: 2F, and for each circuit two forwards in which every destination's input is computed anew; memory: what the
    sources add to the residual stream in each row. ValueError as for `faithfulness`, and for missing edges.

    Mueller et al. 2025, https://arxiv.org/abs/2504.13151; Hanna et al. 2024, https://arxiv.org/abs/2403.17806.
    """
    check_sizes(sizes, random_circuits)
    metric = options["metric"]
    check("noising", options["batch_size"], metric=metric, by=by, replacement=options["replacement"])
    sources = named_curves(circuits)
    level = replaced_edges(model, sources)
    shape_ = shape(model)
    for seed in range(random_circuits):
        values = torch.rand(level.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        sources[f"random {seed}"] = EdgeScores(values * level, level, shape_, "random", "", {"seed": seed})
    ends = EdgeMask.of([], shape_), EdgeMask(frozenset(edges_where(level, shape_)), shape_)
    curves = {name: ordered_circuits(_cut_edges(source, sizes, by), *ends, len) for name, source in sources.items()}
    limit = resolution(model, prompts, options["metric"], options["compute_dtype"], options["batch_size"])
    settings = settings_of(options, prompts, size="edges", edges=int(level.sum()), **limit)
    values_without = partial(edge_circuit_values, model, prompts, options=options)
    return measured_faithfulness(curves, len, values_without, name_of(metric), settings)


def replaced_edges(model: Model, curves: Mapping[str, CurveSource]) -> Bool[Tensor, "source destination"]:
    """The edges that carry a replacement when they are outside the circuit."""
    sizes, existing = shape(model), edges_of(model)
    scored = [source.scored for source in curves.values() if isinstance(source, EdgeScores)]
    level = scored[0] if scored else existing
    for name, circuit in _members_of_curves(curves, sizes):
        if isinstance(circuit, ComponentMask | ComponentScores):
            raise ValueError(f"expected edges, got components in {name!r}: use faithfulness.")
        other = circuit.scored ^ level if isinstance(circuit, EdgeScores) else circuit.tensor & ~level
        if bool((other | (level & ~existing)).any()):
            raise ValueError(
                f"expected circuits and scores of the same {int((level & existing).sum())} edges of this model, got "
                f"{name!r}, which differs in {int(other.sum())} of them or has edges that parallel blocks lack: score "
                f"the same edges of this model."
            )
    return level


def _cut_edges(source: CurveSource, sizes: Sequence[float], by: Callable[[Tensor], Tensor]) -> Iterable[Circuit]:
    """Starts of a ranking that are not longer than the shares say; circuits as they are."""
    assert not isinstance(source, ComponentScores)  # replaced_edges refuses them
    if not isinstance(source, EdgeScores):
        return source
    counts = [int(share * len(source) * (1 + 1e-9)) for share in sizes]
    return [source.top(k=k, by=by) for k in counts if k]
