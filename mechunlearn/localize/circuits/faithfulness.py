"""Faithfulness: does a circuit of components, or of edges, alone do what the model does?"""

import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from mechunlearn.arguments import check, check_functions, chosen_components
from mechunlearn.components import (
    Component,
    ComponentMask,
    Components,
    ComponentScores,
    EdgeMask,
    EdgeScores,
    ModelShape,
    heads_and_mlps,
)
from mechunlearn.components.edge import edges_where, mask_of
from mechunlearn.localize.circuits.curves import (
    MIB_SIZES,
    Circuit,
    Faithfulness,
    Given,
    Size,
    check_sizes,
    curve,
    measured,
    named,
)
from mechunlearn.localize.circuits.runs import circuit_values
from mechunlearn.localize.controls import random
from mechunlearn.localize.replacement import Replacement, replaced, resample
from mechunlearn.metrics import Metric, checked, described, logit_difference, name_of
from mechunlearn.model import Model, device_of, preserved, recording, shape
from mechunlearn.model.edge_runs import EdgeCircuits
from mechunlearn.model.edges import contributions, edges_of, source_sites, written_as
from mechunlearn.tasks.prompts import Prompts

Circuits: TypeAlias = ComponentScores | ComponentMask | Sequence[ComponentMask]
"""Scores, whose ranking is cut at several sizes; or a circuit, or several nested ones."""


def n_components(circuit: ComponentMask) -> int:
    """A circuit's size: how many components it has."""
    return len(circuit)


def n_weights(circuit: ComponentMask) -> int:
    """A circuit's size: how many weights it covers."""
    return circuit.n_parameters


def faithfulness(
    model: Model,
    prompts: Prompts,
    circuits: Circuits | Mapping[str, Circuits],
    *,
    metric: Metric = logit_difference,
    sizes: Sequence[float] = MIB_SIZES,
    size: Size = n_components,
    by: Callable[[Tensor], Tensor] = torch.abs,
    components: Components | None = None,
    replacement: Replacement = resample,
    random_circuits: int = 5,
    batch_size: int = 64,
) -> Faithfulness:
    r"""How much of the metric circuits keep when all else is replaced, over their size.

        faithfulness of C = (m(C) - m(nothing)) / (m(model) - m(nothing))

    m(C) is the mean over prompts of the metric when every component outside C is replaced at once, in one forward of
    the prompts (the embedding and the norms stay). CPR is the area under the curve over size, CMD the area between it
    and 1 (0 is best); `left` in the table is the same number for the model *without* C (completeness: 0 is best).

    - `circuits`: scores, or a circuit, or nested ones, or a dict of such; all share one corrupted run.
    - `sizes`: where rankings of scores are cut, as shares in [0, 1] of `size` of all components, `n_components`
      (default) or `n_weights`: the circuit is the longest start of the ranking that is not larger. What a curve
      is drawn over is the size that this circuit really has. Sizes 0 and 1 are always there, and cost nothing.
    - `by` ranks scores as in `ComponentScores.top`. MIB ranks by the signed score for CPR (`torch.neg`
      for noising scores, where needed components are negative) and by its size for CMD.
    - `components`: what is replaced if it is outside the circuit. Default: the components scored; heads and MLPs
      where only circuits are given.
    - `replacement`: `resample` (the corrupted run), `zero` or `mean_over(reference)`.
    - `random_circuits`: so many random rankings, cut at the same sizes, are in the table as "random 0", ...

    Cost: 2F, and for each circuit twice the part of F from the lowest replaced layer on. Circuits that are
    met twice are run once. ValueError for sizes out of range, circuits or scores of other components, no corrupted
    prompts where the replacement needs them, and a model that replacing everything does not change (undefined).

    Mueller et al. 2025, https://arxiv.org/abs/2504.13151; Wang et al. 2022, https://arxiv.org/abs/2211.00593;
    that the numbers depend on what replaces: Miller et al. 2024, https://arxiv.org/abs/2407.08734.
    """
    check_sizes(sizes, random_circuits)
    check_functions(metric=metric, size=size, by=by, replacement=replacement)
    sizes_of = shape(model)
    given = named(circuits)
    level = replaced_components(given, components, sizes_of)
    for seed in range(random_circuits):
        given[f"random {seed}"] = random(model, seed=seed, components=level)
    ends = ComponentMask.of([], sizes_of), ComponentMask.of(level, sizes_of)
    curves = {name: curve(_cut(one, sizes, size, by), *ends, size) for name, one in given.items()}
    options = {"metric": metric, "replacement": replacement, "batch_size": batch_size}
    settings = {"replacement": described(replacement), "size": name_of(size), "components": len(level)}
    settings |= {"prompts": len(prompts), "batch_size": batch_size}
    values_without = partial(circuit_values, model, prompts, sizes=sizes_of, **options)
    return measured(curves, size, values_without, name_of(metric), settings)


def replaced_components(
    curves: Mapping[str, Given], components: Components | None, sizes: ModelShape
) -> tuple[Component, ...]:
    """The components that are replaced when they are outside the circuit."""
    scored = [one for one in curves.values() if isinstance(one, ComponentScores)]
    if components is None:
        components = scored[0].components if scored else heads_and_mlps
    level = tuple(dict.fromkeys(chosen_components(components, sizes)))
    for name, one in curves.items():
        for given in [one] if isinstance(one, Mapping) else one:
            if isinstance(given, EdgeMask | EdgeScores):
                raise ValueError(f"expected components, got edges in {name!r}: use edge_faithfulness.")
            if given.shape != sizes:
                raise ValueError(
                    f"expected circuits of this model ({sizes}), got {name!r} of another one ({given.shape}): "
                    f"localize on the model that you test."
                )
            other = set(given) ^ set(level) if isinstance(given, ComponentScores) else set(given) - set(level)
            if other:
                raise ValueError(
                    f"expected circuits and scores of the {len(level)} components that are replaced, got {name!r}, "
                    f"which differs in {', '.join(map(str, sorted(other)[:5]))}: pass components=... (such as "
                    f"components.layers), or score the same components."
                )
    return level


def _cut(given: Given, sizes: Sequence[float], size: Size, by: Callable[[Tensor], Tensor]) -> Iterable[Circuit]:
    """The longest starts of a ranking that are not larger than the shares say; circuits as they are."""
    assert not isinstance(given, EdgeScores)  # replaced_components refuses them
    if not isinstance(given, ComponentScores):
        return given

    def size_of(k: int) -> int:
        return size(given.top(k=k, by=by)) if k else 0

    n = len(given)
    limits = [share * size_of(n) * (1 + 1e-9) for share in sizes]
    counts = [bisect_right(range(n + 1), limit, key=size_of) - 1 for limit in limits]
    return [given.top(k=k, by=by) for k in counts if k]


EdgeCircuit: TypeAlias = EdgeScores | EdgeMask | Sequence[EdgeMask]
"""Scores, whose ranking is cut at several sizes; or a circuit, or several nested ones."""


def edge_faithfulness(
    model: Model,
    prompts: Prompts,
    circuits: EdgeCircuit | Mapping[str, EdgeCircuit],
    *,
    metric: Metric = logit_difference,
    sizes: Sequence[float] = MIB_SIZES,
    by: Callable[[Tensor], Tensor] = torch.abs,
    replacement: Replacement = resample,
    random_circuits: int = 3,
    batch_size: int = 16,
) -> Faithfulness:
    r"""`faithfulness` of circuits of edges: in m(C), an edge outside C carries the corrupt run, or another replacement.

    A destination v reads r + sum over edges u -> v outside C of (a'_u - a_u), where r is the residual stream of the
    circuit's own run, a_u what the source u adds to it there and a'_u what it adds with the output that `replacement`
    gives it: that of the corrupt run (`resample`), `zero`, `mean_over(reference)`. The embedding is a source too: with
    `zero`, readers outside the circuit see no tokens. m(nothing) is the metric with the outputs of all sources
    replaced; with `resample`, that of the corrupt run.

    Edges and what a head adds in Gemma 2: as for `edge_attribution_patching`; a'_u has the post-norm's scale for the
    replaced outputs of all of the layer's heads. `sizes` are shares of the number of edges scored (of all edges, where
    only circuits are given), and edges without a score always carry the circuit's own run.

    Edges that lie on no path from the embedding to the logits carry what they would without being in the circuit:
    nothing needs to be pruned, but they count in its size.

    Cost: 2F, and for each circuit two forwards in which every reader's input is made anew. `batch_size` counts rows;
    memory: what the sources add to the residual stream in each row. ValueError as for `faithfulness`, and for edges
    that the model does not have.

    Mueller et al. 2025, https://arxiv.org/abs/2504.13151; Hanna et al. 2024, https://arxiv.org/abs/2403.17806.
    """
    check_sizes(sizes, random_circuits)
    check("noising", batch_size, metric=metric, by=by, replacement=replacement)
    given = named(circuits)
    level = replaced_edges(model, given)
    shape_ = shape(model)
    for seed in range(random_circuits):
        values = torch.rand(level.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        given[f"random {seed}"] = EdgeScores(values * level, level, shape_, "random", "", {"seed": seed})
    ends = EdgeMask.of([], shape_), EdgeMask(frozenset(edges_where(level, shape_)), shape_)
    curves = {name: curve(_cut_edges(one, sizes, by), *ends, len) for name, one in given.items()}
    settings = {"replacement": described(replacement), "size": "edges", "edges": int(level.sum())}
    settings |= {"prompts": len(prompts), "batch_size": batch_size}
    options = {"metric": metric, "replacement": replacement, "batch_size": batch_size}
    values_without = partial(edge_circuit_values, model, prompts, **options)
    return measured(curves, len, values_without, name_of(metric), settings)


def replaced_edges(model: Model, curves: Mapping[str, Given]) -> Bool[Tensor, "source destination"]:
    """The edges that carry a replacement when they are outside the circuit."""
    sizes, real = shape(model), edges_of(model)
    scored = [one.scored for one in curves.values() if isinstance(one, EdgeScores)]
    level = scored[0] if scored else real
    for name, one in curves.items():
        for given in [one] if isinstance(one, Mapping) else one:
            if isinstance(given, ComponentMask | ComponentScores):
                raise ValueError(f"expected edges, got components in {name!r}: use faithfulness.")
            if given.shape != sizes:
                raise ValueError(
                    f"expected circuits of this model ({sizes}), got {name!r} of another one ({given.shape}): "
                    f"localize on the model that you test."
                )
            other = given.scored ^ level if isinstance(given, EdgeScores) else given.tensor & ~level
            if bool((other | (level & ~real)).any()):
                raise ValueError(
                    f"expected circuits and scores of the same {int((level & real).sum())} edges of this model, got "
                    f"{name!r}, which differs in {int(other.sum())} of them or has edges that parallel blocks lack: "
                    f"score the same edges of this model."
                )
    return level


def _cut_edges(given: Given, sizes: Sequence[float], by: Callable[[Tensor], Tensor]) -> Iterable[Circuit]:
    """Starts of a ranking that are not longer than the shares say; circuits as they are."""
    assert not isinstance(given, ComponentScores)  # replaced_edges refuses them
    if not isinstance(given, EdgeScores):
        return given
    counts = [int(share * len(given) * (1 + 1e-9)) for share in sizes]
    return [given.top(k=k, by=by) for k in counts if k]


def edge_circuit_values(
    model: Model,
    prompts: Prompts,
    removed: Sequence[frozenset[Any]],
    *,
    metric: Metric,
    replacement: Replacement,
    batch_size: int,
) -> tuple[Float[Tensor, "prompt"], Float[Tensor, "prompt circuit"]]:
    """The metric of the whole model, and of the model with each of these sets of edges replaced."""
    sizes = shape(model)
    masks = torch.stack([mask_of(edges, sizes) for edges in removed]).to(device_of(model))
    whole, values = [], []
    with preserved(model), torch.no_grad():
        circuits = EdgeCircuits(model)
        for batch in tqdm(prompts.to(device_of(model)).batches(batch_size), "edge circuits", leave=False, disable=None):
            with recording(model, source_sites(sizes)) as own:
                whole.append(checked(metric, batch.logits(model), batch).double())
            other = contributions(model, written_as(model, replaced(replacement, model, batch, own)))
            found = whole[-1].new_zeros(len(batch), len(masks))
            every = torch.cartesian_prod(*(torch.arange(n, device=found.device) for n in (len(masks), len(batch))))
            for circuit, row in (part.unbind(1) for part in every.split(operator.index(batch_size))):
                copies = batch.rows(row)
                inputs = copies.tokens, copies.attention_mask, copies.positions
                logits = circuits.logits(*inputs, other[:, row], masks[circuit])
                found[row, circuit] = checked(metric, logits, copies).double()
            values.append(found)
    return torch.cat(whole).cpu(), torch.cat(values).cpu()
