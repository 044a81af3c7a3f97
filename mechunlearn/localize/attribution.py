"""Attribution patching: the effect of patching every component, estimated by one gradient, or the mean of several."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.arguments import chosen_components
from mechunlearn.components import ComponentScores
from mechunlearn.localize import sites
from mechunlearn.localize.options import ComponentOptions
from mechunlearn.localize.replacement import activations_at
from mechunlearn.localize.sites import Places
from mechunlearn.metrics import Metric, checked
from mechunlearn.model import Hook, Model, differentiable, recording, shape
from mechunlearn.model.admission import check_unforked
from mechunlearn.model.hooks import layer_of
from mechunlearn.model.relevance import relevance_rules
from mechunlearn.model.running import running_from
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts


@with_options()
def attribution_patching(model: Model, prompts: Prompts, **options: Unpack[ComponentOptions]) -> ComponentScores:
    r"""A first-order estimate of activation patching, for every component at once.

    With a(x) a component's output, x the run that is patched and x' the run that the patch is from,

        score = mean over prompts of the sum over positions and d of
                (a(x') - a(x)) * d metric / d a(x)

    which approximates metric(x with a replaced by a(x')) - metric(x), in the metric's unit.

    The outputs of components are:

    - of a head and its W_O, what the head adds to the residual stream; of an MLP and its W_out likewise;
    - of W_Q, W_K, W_V the query, key or value (a KV head that several query heads share has one score);
    - of W_in and W_gate the pre-activations; of a neuron its activation.

    Cost: 2F + 1B (of activations only), however many components. Memory: one batch's activations for the backward pass,
    and those of the components twice. The model is left as it was.

    Nanda 2023, https://www.neelnanda.io/mechanistic-interpretability/attribution-patching;
    Syed et al. 2023, https://arxiv.org/abs/2310.10348. ValueError without corrupted prompts.
    """
    effects = partial(first_order_effects, model, options["metric"])
    return sites.component_scores("attribution_patching", effects, model, prompts, options)


def first_order_effects(
    model: Model, metric: Metric, patched: Prompts, other: Prompts, places: Places, hooks: Iterable[Hook] = ()
) -> Float[Tensor, "batch component"]:
    """Gradient times difference, summed over positions and, for heads, over d_head.

    `hooks` act on the patched run alone, after its values are recorded.
    """
    source = activations_at(model, other, places)
    values, base = sites.metric_and_activations(model, patched, metric, places, [sites.graph_start(), *hooks])
    slopes = sites.gradients(values, base, metric)
    real = patched.attention_mask
    effects = {name: sites.effects_at(source[name] - base[name].detach(), slopes[name], real) for name in places}
    return sites.effect_columns(effects, places)


@with_options()
def relp(model: Model, prompts: Prompts, **options: Unpack[ComponentOptions]) -> ComponentScores:
    r"""Relevance patching: `attribution_patching` with steadier slopes.

    With a(x) a component's output, x the run that is patched and x' the run that the patch is from,

        score = mean over prompts of the sum over positions and d of (a(x') - a(x)) * r(x)

    in the metric's unit. r is d metric / d a in a network that agrees with the model on x and is linear around it:

    - LN rule: norms divide by the scale that they have on x;
    - AH rule: attention patterns are those of x;
    - identity rule: act(h) = h * (act(h) / h on x);
    - half rule: a gated MLP's act(gate) * up passes half of the gradient to each factor.

    The score has what a component does through values and MLPs, not what it does by changing where heads attend:
    queries and keys have no relevance, so `W_Q` and `W_K` are refused. The soft cap of Gemma 2's logits, for which the
    paper has no rule, is differentiated. Cost and memory are those of `attribution_patching`.

    Rezaei Jafari et al. 2025, https://arxiv.org/abs/2508.21258. Norms have to be LayerNorms or RMSNorms.
    """
    check_unforked(model)
    options["components"] = chosen = chosen_components(options["components"], shape(model))
    without = [str(component) for component in chosen if component.matrix in ("W_Q", "W_K")]
    if without:
        raise ValueError(
            f"expected components with relevance, got {', '.join(without[:3])}: attention patterns are held fixed, so "
            f"queries and keys have none; leave them out, or use atp_star or attribution_patching."
        )
    with differentiable(model), relevance_rules(model) as rules:
        effects = partial(first_order_effects, model, options["metric"], hooks=rules)
        return sites.component_scores("relp", effects, model, prompts, options)


@with_options()
def integrated_gradients(
    model: Model, prompts: Prompts, *, steps: int = 5, **options: Unpack[ComponentOptions]
) -> ComponentScores:
    r"""Differences of activations times gradients averaged over inputs between the two runs.

    With e(x) the input of the first layer (token embeddings; positions are the same on both sides), a a component's
    output, x the run that is patched and x' the run that the patch is from,

        score = mean over prompts of the sum over positions and d of
                (a(x') - a(x)) * mean over k of d metric / d a at the input e(x) + (k + 1/2) / steps * (e(x') - e(x)),

    k = 0 ... steps - 1, in the metric's unit; everything after the first layer's input runs freely. "noising" and
    "denoising" differ in sign alone.

    Points are midpoints, not the left end points of EAP-IG: the error falls with steps^2, and neither run counts more.
    `settings["explained"]` is the same sum for e itself. It tends to `settings["difference"]`, the mean of
    metric(x') - metric(x), as steps grow: where they disagree, take more steps. Scores of components need not sum to
    anything. A component whose gradient vanishes at both ends, as behind a saturated softmax, still gets its score.

    Cost: 2F + steps * (F + B) per batch. Memory: as `attribution_patching`, and the gradients once more.

    Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365; Hanna et al. 2024, https://arxiv.org/abs/2403.17806.
    """
    points, metric = sites.midpoints(steps), options["metric"]
    explained, differences = [], []

    def effects(patched: Prompts, other: Prompts, places: Places) -> Float[Tensor, "batch component"]:
        before, base = _measured(model, patched, metric, [*places, sites.EMBEDDING])
        after, source = _measured(model, other, metric, [*places, sites.EMBEDDING])
        between = [torch.lerp(base[sites.EMBEDDING], source[sites.EMBEDDING], point) for point in points]
        slopes = _slopes_between(model, patched, metric, places, between)
        real = patched.attention_mask
        by_name = {name: sites.effects_at(source[name] - base[name], slopes[name], real) for name in base}
        # The embedding is all that differs at first: its own score, complete, is the whole change of the metric.
        explained.append(by_name[sites.EMBEDDING].sum(1))
        differences.append(after - before)
        return sites.effect_columns(by_name, places)

    own = {"steps": steps, "rule": "midpoint"}
    scores = sites.component_scores("integrated_gradients", effects, model, prompts, options, **own)
    check = {"explained": float(torch.cat(explained).mean()), "difference": float(torch.cat(differences).mean())}
    return replace(scores, settings={**scores.settings, **check})


@with_options()
def integrated_gradients_of_activations(
    model: Model, prompts: Prompts, *, steps: int = 5, **options: Unpack[ComponentOptions]
) -> ComponentScores:
    r"""Differences of activations times gradients averaged while that activation, and nothing else, is moved.

    As `integrated_gradients`, but the midpoints lie between a(x) and a(x') at one hook point at a time, in the run
    x, and what follows runs freely:

        score = mean over prompts of the sum over positions and d of
                (a(x') - a(x)) * mean over k of d metric / d a at a = a(x) + (k + 1/2) / steps * (a(x') - a(x))

    A hook point holds all heads (queries, keys, values, outputs) or all neurons of a layer, or one MLP's or one
    attention layer's output. As steps grow, its scores tend to sum to the exact effect of patching all of it:
    the score of an MLP or an attention layer tends to activation patching, heads share their layer's effect.

    Cost: 2F + steps * (F + B) for each hook point, of the layers from there on: more than `integrated_gradients` by
    the number of hook points. Memory: one hook point's gradient, and the residual stream of every layer.

    The average over activations in Hanna et al. 2024, https://arxiv.org/abs/2403.17806, for nodes.
    """
    points, metric = sites.midpoints(steps), options["metric"]

    def effects(patched: Prompts, other: Prompts, places: Places) -> Float[Tensor, "batch component"]:
        base = activations_at(model, patched, [*places, *(_entering(name) for name in places)])
        source = activations_at(model, other, places)
        by_name = {}
        for name in places:
            slope = _slope_at(model, patched, metric, name, base, source[name], points)
            by_name[name] = sites.effects_at(source[name] - base[name], slope, patched.attention_mask)
        return sites.effect_columns(by_name, places)

    own = {"steps": steps, "rule": "midpoint"}
    return sites.component_scores("integrated_gradients_of_activations", effects, model, prompts, options, **own)


@torch.no_grad()
def _measured(
    model: Model, prompts: Prompts, metric: Metric, names: Iterable[str]
) -> tuple[Float[Tensor, "batch"], dict[str, Tensor]]:
    with recording(model, names) as activations:
        values = checked(metric, prompts.logits(model), prompts)
    return values, activations


def _slopes_between(
    model: Model, prompts: Prompts, metric: Metric, names: Iterable[str], inputs: list[Tensor]
) -> dict[str, Tensor]:
    """The mean gradient at each hook point, and at the first layer's input, over these inputs of the first layer."""
    means: dict[str, Tensor] = {}
    for entering in inputs:
        entering.requires_grad_(True)
        hook = sites.value_hook(sites.EMBEDDING, entering)
        values, base = sites.metric_and_activations(model, prompts, metric, names, [hook])
        for name, slope in sites.gradients(values, base | {sites.EMBEDDING: entering}, metric).items():
            # Summed up one point at a time, in float32 at least: no more than two sets of gradients are in memory.
            share = slope.to(torch.promote_types(slope.dtype, torch.float32)) / len(inputs)
            means[name] = means[name] + share if name in means else share
    return means


def _slope_at(
    model: Model, prompts: Prompts, metric: Metric, name: str, base: dict[str, Tensor], end: Tensor, points: list[float]
) -> Tensor:
    """The mean gradient at one hook point over its values between the two runs; the layers below do not run."""
    total = torch.zeros_like(end, dtype=torch.promote_types(end.dtype, torch.float32))
    for point in points:
        between = torch.lerp(base[name], end, point).requires_grad_(True)
        with running_from(model, layer_of(name), base[_entering(name)]):
            values, _ = sites.metric_and_activations(model, prompts, metric, [], [sites.value_hook(name, between)])
        total += sites.gradients(values, {name: between}, metric)[name]
    return total / len(points)


def _entering(name: str) -> str:
    return f"blocks.{layer_of(name)}.hook_resid_pre"
