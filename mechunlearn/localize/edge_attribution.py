"""Edge attribution: the effect of patching every edge, estimated by one gradient or by the mean of several."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.components import EdgeScores, ModelShape, destinations
from mechunlearn.components.edge import edge_mask
from mechunlearn.identity import name_of
from mechunlearn.localize import sites
from mechunlearn.localize.options import EdgeGradientOptions, settings_of
from mechunlearn.localize.replacement import activations_at
from mechunlearn.metrics import Metric, checked
from mechunlearn.model import Hook, Model, device_of, differentiable, shape
from mechunlearn.model.classes import element_size, free_memory
from mechunlearn.model.edge_runs import InputGradients
from mechunlearn.model.edges import (
    SourceOutputs,
    contributions,
    edges_of,
    head_readers,
    is_parallel,
    recording_inputs,
    recording_outputs,
)
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts


@with_options()
def edge_attribution_patching(model: Model, prompts: Prompts, **options: Unpack[EdgeGradientOptions]) -> EdgeScores:
    r"""A first-order estimate of patching every edge of the model, each alone.

    An edge is patched when destination v alone reads what source u adds in the run x' instead of x. With a_u what u
    adds to the residual stream and r_v the copy of the stream that v reads (before v's norm),

        score(u -> v) = mean over prompts of the sum over positions and d of
                        (a_u(x') - a_u(x)) * d metric / d r_v at x

    in the metric's unit.

    A source's scores sum over its destinations to its `attribution_patching` (`EdgeScores.nodes()`). In Gemma 2 a norm
    follows attention: there a head's difference is what the norm makes of it to first order, in the run x.

    Cost: 2F + 1B and matrix products that grow as sources x destinations x d_model. Memory: the backward pass of a
    batch (about 40 floats per layer, position and d_model in GPT-2), 32 MiB of sources' contributions, and the result.

    Syed et al. 2023, https://arxiv.org/abs/2310.10348. ValueError for an edge that the model does not have (in parallel
    blocks: from a head to its own layer's MLP), and for a model that is not the sum of its parts.
    """

    def factors(patched: Prompts, other: Prompts) -> list[tuple[SourceOutputs, InputGradients]]:
        gradients = InputGradients(model, patched.attention_mask)
        there = outputs_of_sources(model, other)
        here = add_run(gradients, model, patched, options["metric"])
        return [(there.minus(here, patched.attention_mask), gradients)]

    return edge_scores("edge_attribution_patching", factors, model, prompts, options)


@with_options()
def edge_integrated_gradients(
    model: Model, prompts: Prompts, *, steps: int = 5, **options: Unpack[EdgeGradientOptions]
) -> EdgeScores:
    r"""EAP-IG over inputs: `edge_attribution_patching` with the gradient averaged over points between the two inputs.

    With e(x) the residual stream that enters layer 0,

        score(u -> v) = mean over prompts of the sum over positions and d of
            (a_u(x') - a_u(x)) * mean over k of d metric / d r_v at the input e(x) + (k + 1/2) / steps * (e(x') - e(x))

    k = 0 ... steps - 1; everything after layer 0's input runs freely. Sign, unit, arguments and errors as in
    `edge_attribution_patching`. The midpoint rule makes "noising" and "denoising" differ in sign alone; the authors'
    code takes left end points (the corrupt end included, the clean one not), which tend to the same as steps grow.
    An edge whose gradient vanishes at both ends, as behind a saturated softmax, still gets its score. A source's scores
    sum over its destinations to its `integrated_gradients` (in Gemma 2, those of MLPs: heads pass a post-norm by the
    mean of its slopes in the two runs).

    Cost: 2F + steps * (F + B), and the products of `edge_attribution_patching` once. Memory: as there, and for each
    step one residual stream of every layer.

    Hanna et al. 2024, https://arxiv.org/abs/2403.17806. ValueError also for fewer than one step.
    """
    points, metric = sites.midpoints(steps), options["metric"]

    def factors(patched: Prompts, other: Prompts) -> list[tuple[SourceOutputs, InputGradients]]:
        here, there = outputs_of_sources(model, patched), outputs_of_sources(model, other)
        between = [torch.lerp(here.embed, there.embed, point) for point in points]
        gradients = _gradients_over(model, patched, metric, sites.EMBEDDING, between)
        return [(there.minus(here, patched.attention_mask, at=(here, there)), gradients)]

    return edge_scores("edge_integrated_gradients", factors, model, prompts, options, steps=steps, rule="midpoint")


@with_options()
def edge_integrated_gradients_of_activations(
    model: Model, prompts: Prompts, *, steps: int = 5, **options: Unpack[EdgeGradientOptions]
) -> EdgeScores:
    r"""EAP-IG over activations: the gradient averaged while one group of sources after the other is moved.

    The groups are the embedding, each layer's attention and each MLP, 2 * n_layers + 1 in all. In a run of the
    patched prompts the group's output is held at a(x) + (k + 1/2) / steps * (a(x') - a(x)), everything after it runs
    freely, and the gradients at *all* destinations are taken:

        score(u -> v) = mean over prompts of the sum over positions and d of
                        (a_u(x') - a_u(x)) * mean over groups and k of d metric / d r_v

    Averaging over all groups, also those that are not u, is what the authors' code does; it takes right end points
    (k + 1) / steps from the corrupt run, here midpoints. Sign, unit, arguments, memory and errors as in
    `edge_integrated_gradients`.

    Cost: 2F + steps * (2 * n_layers + 1) * (F + B).

    Hanna et al. 2024, https://arxiv.org/abs/2403.17806.
    """
    points, metric = sites.midpoints(steps), options["metric"]
    layers, parts = range(model.cfg.n_layers), ("hook_attn_out", "hook_mlp_out")
    names = [sites.EMBEDDING, *(f"blocks.{layer}.{part}" for layer in layers for part in parts)]

    def factors(patched: Prompts, other: Prompts) -> Iterator[tuple[SourceOutputs, InputGradients]]:
        runs = outputs_of_sources(model, patched), outputs_of_sources(model, other)
        difference = runs[1].minus(runs[0], patched.attention_mask, at=runs)
        here, there = activations_at(model, patched, names), activations_at(model, other, names)
        for name in names:
            between = [torch.lerp(here[name], there[name], point) for point in points]
            yield difference, _gradients_over(model, patched, metric, name, between)

    own = {"steps": steps, "rule": "midpoint"}
    return edge_scores("edge_integrated_gradients_of_activations", factors, model, prompts, options, **own)


@with_options()
def edge_clean_corrupted(model: Model, prompts: Prompts, **options: Unpack[EdgeGradientOptions]) -> EdgeScores:
    r"""Edge attribution with the mean of the gradients in the two runs: the trapezoid rule with one step.

        score(u -> v) = mean over prompts of the sum over positions and d of
                        (a_u(x') - a_u(x)) * (d metric / d r_v at x + d metric / d r_v at x') / 2

    Sign, unit, arguments, memory and errors as in `edge_attribution_patching`. Cost: 2F + 2B, and its products twice.

    Hanna et al. 2024, https://arxiv.org/abs/2403.17806 ("clean-corrupted").
    """

    def factors(patched: Prompts, other: Prompts) -> list[tuple[SourceOutputs, InputGradients]]:
        mask = patched.attention_mask
        ends = InputGradients(model, mask), InputGradients(model, mask)
        here, there = (add_run(g, model, run, options["metric"]) for g, run in zip(ends, (patched, other), strict=True))
        return [(there.minus(here, mask, at=(run,)), g) for run, g in zip((here, there), ends, strict=True)]

    return edge_scores("edge_clean_corrupted", factors, model, prompts, options)


Factors: TypeAlias = Callable[[Prompts, Prompts], Iterable[tuple[SourceOutputs, InputGradients]]]
"""(patched, other) -> pairs to multiply: the difference of the sources' outputs, and the destinations' gradients."""

_TEMPORARY = 32 * 2**20
"""Bytes of sources' contributions to the residual stream at once."""

_KEPT = 40
"""Activations that a backward pass keeps for each entry of all layers' residual streams."""

_CACHED = 64_000_000
"""Bytes of these activations at once on a CPU, where larger batches are not faster."""


def edge_scores(
    method: str, factors: Factors, model: Model, prompts: Prompts, options: EdgeGradientOptions, **settings: Any
) -> EdgeScores:
    """The mean over prompts, and over pairs of factors, of the factors' products, for every edge."""
    prompts.check_length(model)
    sizes, chosen, metric = shape(model), edges_of(model, options["edges"]), options["metric"]
    batch_size = options["batch_size"]
    if batch_size is None:
        of_prompt = _KEPT * prompts.tokens.shape[1] * sizes.n_layers * sizes.d_model * element_size(model)
        batch_size = max(1, (free_memory(device_of(model)) // 4 or _CACHED) // of_prompt)
    batches = sites.run_pairs(model, prompts, metric, options["direction"], batch_size)
    rows, total = [], torch.zeros(chosen.shape, dtype=torch.float64)
    with differentiable(model):
        for patched, other in batches:
            products = [_products(model, *pair) for pair in factors(patched, other)]
            scores = (sum(products[1:], products[0]) / len(products)).cpu().masked_fill(~chosen, 0.0)
            total += scores.double().sum(0)
            rows += [scores] if options["per_prompt"] else []
    everything = options["edges"] is None  # single edges may well carry nothing
    if everything and not bool(total.any()) and any(_differ(model, *pair, metric) for pair in batches):
        raise ValueError(
            f"expected {method} to see an effect of some edge, got exactly 0 for all {int(chosen.sum())}, although "
            f"{name_of(metric)} differs between the two runs: no gradient reaches them (a saturated metric has none); "
            f"use logit_difference, a wider dtype, or edge_patching."
        )
    settings = settings_of(options, prompts, **settings, batch_size=batch_size)
    values = torch.cat(rows) if rows else None
    return EdgeScores(total / len(prompts), chosen, sizes, method, name_of(metric), settings, values)


@torch.no_grad()
def _differ(model: Model, patched: Prompts, other: Prompts, metric: Metric) -> bool:
    before, after = (checked(metric, run.logits(model), run) for run in (patched, other))
    return bool(((after - before).abs() > 1e-3 * before.abs().max()).any())


@torch.no_grad()
def outputs_of_sources(model: Model, prompts: Prompts) -> SourceOutputs:
    """What the sources write in a run of the prompts. Cost: 1F."""
    with recording_outputs(model) as outputs:
        prompts.logits(model)
    return outputs()


def add_run(
    gradients: InputGradients, model: Model, prompts: Prompts, metric: Metric, hooks: Iterable[Hook] = ()
) -> SourceOutputs:
    """Add the gradients of a run with these hooks, and give what its sources write. Cost: 1F + 1B."""
    with recording_outputs(model) as outputs, recording_inputs(model) as inputs:
        values, _ = sites.metric_and_activations(model, prompts, metric, [], [*hooks, sites.graph_start()])
    slopes = torch.autograd.grad(values.sum(), inputs[0].tensors(), allow_unused=True)
    if slopes[-1] is None:
        raise ValueError(
            f"expected a metric that depends on the logits, but {name_of(metric)} has no gradient there: it must be "
            f"computed from the logits that it is given."
        )
    gradients.add(inputs[0], slopes)
    return outputs()


def _gradients_over(model: Model, prompts: Prompts, metric: Metric, name: str, values: list[Tensor]) -> InputGradients:
    """The gradients summed over runs, in each of which the hook point has one of these values."""
    gradients = InputGradients(model, prompts.attention_mask)
    for value in values:
        add_run(gradients, model, prompts, metric, [sites.value_hook(name, value)])
    return gradients


def _products(
    model: Model, difference: SourceOutputs, gradients: InputGradients
) -> Float[Tensor, "batch source destination"]:
    """Dot products of differences and gradients, summed over positions and d_model."""
    # A tensor [batch, pos, source, d_model] would be too large: what sources add is made for a piece of the batch at a
    # time, and multiplied there with the gradients of one layer's destinations after the other's.
    sizes, parallel = gradients.sizes, is_parallel(model)
    batch, places, width = difference.embed.shape
    n_sources = 1 + sizes.n_layers * (sizes.n_heads + 1)
    scores = difference.embed.new_zeros(batch, n_sources, len(destinations(sizes)))
    for rows, positions in _pieces(batch, places, n_sources * width * scores.element_size()):
        sources = contributions(model, difference.at(rows, positions))
        for columns, count, readers in _readers(gradients, sizes, rows, positions, parallel):
            # A destination reads the first `count` sources, those below it. Later ones are left at zero.
            below, read = sources[:count].flatten(2).transpose(0, 1), readers.flatten(2).permute(1, 2, 0)
            scores[rows, :count, columns] += torch.bmm(below, read)
    return scores


def _pieces(batch: int, places: int, size: int) -> Iterable[tuple[slice, slice]]:
    """Several prompts, or a part of one's positions, that fit; `size`: the bytes of one position of one prompt."""
    n_rows, n_places = max(1, _TEMPORARY // (size * places)), max(1, _TEMPORARY // size)
    for row in range(0, batch, n_rows):
        for place in range(0, places, n_places):
            yield slice(row, min(row + n_rows, batch)), slice(place, min(place + n_places, places))


def _readers(
    gradients: InputGradients, sizes: ModelShape, rows: slice, places: slice, parallel: bool
) -> Iterable[tuple[Int[Tensor, "destination"], int, Float[Tensor, "destination batch pos d_model"]]]:
    """Layer after layer: columns of the scores, how many of the sources they read, and the gradients at them."""
    column = {destination: place for place, destination in enumerate(destinations(sizes))}
    counts = edge_mask(sizes, parallel=parallel).sum(0).tolist()
    for layer in range(sizes.n_layers):
        columns = [column[reader] for reader in head_readers(layer, sizes)]
        yield torch.tensor(columns), counts[columns[0]], gradients.at_heads(layer, rows, places)
        mlp = max(columns) + 1
        yield torch.tensor([mlp]), counts[mlp], gradients.at_mlp(layer, rows, places)
    yield torch.tensor([len(counts) - 1]), counts[-1], gradients.at_logits(rows, places)
