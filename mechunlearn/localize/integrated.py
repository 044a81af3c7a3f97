"""Integrated gradients: attribution patching with the gradient averaged on the way from one run to the other."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import ComponentScores
from mechunlearn.localize import sites
from mechunlearn.localize.options import ComponentOptions
from mechunlearn.localize.replacement import activations_at
from mechunlearn.localize.sites import Places
from mechunlearn.metrics import Metric, checked
from mechunlearn.model import Model, recording
from mechunlearn.model.hooks import layer_of
from mechunlearn.model.running import running_from
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts

_EMBEDDING = "blocks.0.hook_resid_pre"
"""The input of the first layer, which all other activations follow from."""


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
        before, base = _measured(model, patched, metric, [*places, _EMBEDDING])
        after, source = _measured(model, other, metric, [*places, _EMBEDDING])
        between = [torch.lerp(base[_EMBEDDING], source[_EMBEDDING], point) for point in points]
        slopes = _slopes_between(model, patched, metric, places, between)
        real = patched.attention_mask
        by_name = {name: sites.effects_at(source[name] - base[name], slopes[name], real) for name in base}
        # The embedding is all that differs at first: its own score, complete, is the whole change of the metric.
        explained.append(by_name[_EMBEDDING].sum(1))
        differences.append(after - before)
        return sites.effect_columns(by_name, places)

    own = {"steps": steps, "rule": "midpoint"}
    scores = sites.component_scores(integrated_gradients, effects, model, prompts, options, **own)
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
    return sites.component_scores(integrated_gradients_of_activations, effects, model, prompts, options, **own)


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
        hook = sites.value_hook(_EMBEDDING, entering)
        values, base = sites.metric_and_activations(model, prompts, metric, names, [hook])
        for name, slope in sites.gradients(values, base | {_EMBEDDING: entering}, metric).items():
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
