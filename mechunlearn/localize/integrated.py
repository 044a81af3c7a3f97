"""Integrated gradients: attribution patching with the gradient averaged on the way from one run to the other."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.arguments import chosen_components
from mechunlearn.components import Components, ComponentScores, heads_and_mlps
from mechunlearn.localize.sites import (
    Direction,
    differentiated,
    effects_at,
    gathered,
    given,
    gradients,
    pairs,
    places_of,
    recorded,
    scored,
)
from mechunlearn.metrics import Metric, checked, logit_difference
from mechunlearn.model import Model, differentiable, recording, shape
from mechunlearn.model.running import running_from
from mechunlearn.tasks.prompts import Prompts

_EMBEDDING = "blocks.0.hook_resid_pre"


def integrated_gradients(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Direction = "noising",
    steps: int = 5,
    components: Components = heads_and_mlps,
    batch_size: int = 64,
) -> ComponentScores:
    r"""Differences of activations times gradients averaged over inputs between the two runs.

    With e(x) the input of the first layer (token embeddings; positions are the same on both sides), a a component's
    output, x the run that is patched and x' the run that the patch is from,

        score = mean over prompts of the sum over positions and d of
                (a(x') - a(x)) * mean over k of d metric / d a at the input e(x) + (k + 1/2) / steps * (e(x') - e(x)),

    k = 0 ... steps - 1, in the metric's unit; everything after the first layer's input runs freely. A component that
    the answer needs scores negative for "noising", positive for "denoising": the two differ in sign alone.

    Midpoints rather than the left end points that EAP-IG takes: the error falls with steps^2, and neither run counts
    more. `settings["explained"]` is the same sum for e itself, which tends to `settings["difference"]`, the
    mean of metric(x') - metric(x), as steps grow: where they disagree, take more steps. Scores of components need
    not sum to anything. Takes part where gradients vanish at both ends, as behind a saturated softmax.

    Cost: 2F + steps * (F + B) per batch. Memory: as `attribution_patching`, and the gradients once more.

    Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365; Hanna et al. 2024, https://arxiv.org/abs/2403.17806.
    ValueError without corrupted prompts and for fewer than one step.
    """
    sizes = shape(model)
    chosen = chosen_components(components, sizes)
    places = places_of(chosen, sizes)
    points = _midpoints(steps)
    rows, explained, differences = [], [], []
    batches = pairs(model, prompts, metric, direction, batch_size)
    with differentiable(model):
        for patched, other in batches:
            before, base = _measured(model, patched, metric, [*places, _EMBEDDING])
            after, source = _measured(model, other, metric, [*places, _EMBEDDING])
            slopes = _slopes_between(model, patched, metric, places, base[_EMBEDDING], source[_EMBEDDING], points)
            real = patched.attention_mask
            effects = {name: effects_at(source[name] - base[name], slopes[name], real) for name in base}
            rows.append(gathered(effects, places, len(chosen)))
            explained.append(effects[_EMBEDDING].sum(1))
            differences.append(after - before)
    settings = {"direction": direction, "steps": steps, "rule": "midpoint", "batch_size": batch_size}
    settings |= {"explained": float(torch.cat(explained).mean()), "difference": float(torch.cat(differences).mean())}
    return scored(integrated_gradients, chosen, rows, sizes, metric, settings)


def integrated_gradients_of_activations(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Direction = "noising",
    steps: int = 5,
    components: Components = heads_and_mlps,
    batch_size: int = 64,
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

    The average over activations in Hanna et al. 2024, https://arxiv.org/abs/2403.17806, for nodes. ValueError
    without corrupted prompts and for fewer than one step.
    """
    sizes = shape(model)
    chosen = chosen_components(components, sizes)
    places = places_of(chosen, sizes)
    points = _midpoints(steps)
    rows = []
    batches = pairs(model, prompts, metric, direction, batch_size)
    with differentiable(model):
        for patched, other in batches:
            base = recorded(model, patched, [*places, *(_entering(name) for name in places)])
            source = recorded(model, other, places)
            effects = {}
            for name in places:
                slope = _slope_at(model, patched, metric, name, base, source[name], points)
                effects[name] = effects_at(source[name] - base[name], slope, patched.attention_mask)
            rows.append(gathered(effects, places, len(chosen)))
    settings = {"direction": direction, "steps": steps, "rule": "midpoint", "batch_size": batch_size}
    return scored(integrated_gradients_of_activations, chosen, rows, sizes, metric, settings)


def _midpoints(steps: int) -> list[float]:
    if steps < 1:
        raise ValueError(f"expected at least one step, got {steps}: 5 are usual, more are more exact.")
    return [(k + 0.5) / steps for k in range(steps)]


@torch.no_grad()
def _measured(
    model: Model, prompts: Prompts, metric: Metric, names: Iterable[str]
) -> tuple[Float[Tensor, "batch"], dict[str, Tensor]]:
    with recording(model, names) as found:
        values = checked(metric, prompts.logits(model), prompts)
    return values, found


def _slopes_between(
    model: Model,
    prompts: Prompts,
    metric: Metric,
    names: Iterable[str],
    start: Float[Tensor, "batch pos d_model"],
    end: Float[Tensor, "batch pos d_model"],
    points: list[float],
) -> dict[str, Tensor]:
    """The mean gradient at each hook point, and at the first layer's input, over inputs between the two."""
    means: dict[str, Tensor] = {}
    for point in points:
        entering = torch.lerp(start, end, point).requires_grad_(True)
        values, found = differentiated(model, prompts, metric, names, [given(_EMBEDDING, entering)])
        for name, slope in gradients(values, found | {_EMBEDDING: entering}, metric).items():
            share = slope.to(torch.promote_types(slope.dtype, torch.float32)) / len(points)
            means[name] = means[name] + share if name in means else share
    return means


def _slope_at(
    model: Model,
    prompts: Prompts,
    metric: Metric,
    name: str,
    base: dict[str, Tensor],
    end: Tensor,
    points: list[float],
) -> Tensor:
    """The mean gradient at one hook point over its values between the two runs; the layers below do not run."""
    layer = int(name.split(".")[1])
    total = torch.zeros_like(end, dtype=torch.promote_types(end.dtype, torch.float32))
    for point in points:
        between = torch.lerp(base[name], end, point).requires_grad_(True)
        with running_from(model, layer, base[_entering(name)]):
            values, _ = differentiated(model, prompts, metric, [], [given(name, between)])
        total += gradients(values, {name: between}, metric)[name]
    return total / len(points)


def _entering(name: str) -> str:
    """Where the residual stream enters the hook point's layer."""
    return f"blocks.{name.split('.')[1]}.hook_resid_pre"
