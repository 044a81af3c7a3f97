"""Edge attribution with the gradient averaged over runs between the two: EAP-IG and its relatives."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mechunlearn.components import Edge, EdgeScores
from mechunlearn.localize.edge_gradients import add_run, edge_scores, written
from mechunlearn.localize.sites import Direction, given, recorded
from mechunlearn.metrics import Metric, logit_difference
from mechunlearn.model import Hook, Model
from mechunlearn.model.input_gradients import InputGradients
from mechunlearn.model.residual_sources import Written
from mechunlearn.tasks.prompts import Prompts

_EMBEDDING = "blocks.0.hook_resid_pre"


def edge_integrated_gradients(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Direction = "noising",
    steps: int = 5,
    edges: Iterable[Edge | str] | None = None,
    batch_size: int | None = None,
    per_prompt: bool = True,
) -> EdgeScores:
    r"""EAP-IG over inputs: `edge_attribution_patching` with the gradient averaged on the way between the two inputs.

    With e(x) the residual stream that enters layer 0,

        score(u -> v) = mean over prompts of the sum over positions and d of
            (a_u(x') - a_u(x)) * mean over k of d metric / d r_v at the input e(x) + (k + 1/2) / steps * (e(x') - e(x))

    k = 0 ... steps - 1; everything after layer 0's input runs freely. Sign, unit, arguments and errors as in
    `edge_attribution_patching`. The midpoint rule makes "noising" and "denoising" differ in sign alone; the authors'
    code takes left end points (the corrupt end included, the clean one not), which tend to the same as steps grow.
    Takes part where the gradient vanishes at both ends, as behind a saturated softmax. Over all its destinations a
    source's scores sum to its `integrated_gradients` (in Gemma 2: those of MLPs and attention layers).

    Cost: 2F + steps * (F + B) per batch; the products of EAP once, whatever the steps. Memory: as EAP, and per step
    one residual stream of every layer.

    Hanna et al. 2024, https://arxiv.org/abs/2403.17806. ValueError also for fewer than one step.
    """
    points = _midpoints(steps)

    def parts(patched: Prompts, other: Prompts) -> list[tuple[Written, InputGradients]]:
        here, there = written(model, patched), written(model, other)
        between = _between(_EMBEDDING, here.embed, there.embed, points)
        return [(there.minus(here, patched.attention_mask), _gradients(model, patched, metric, between))]

    options = direction, edges, batch_size, per_prompt
    settings = {"steps": steps, "rule": "midpoint"}
    return edge_scores(edge_integrated_gradients, parts, model, prompts, metric, *options, settings)


def edge_integrated_gradients_of_activations(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Direction = "noising",
    steps: int = 5,
    edges: Iterable[Edge | str] | None = None,
    batch_size: int | None = None,
    per_prompt: bool = True,
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

    Cost: 2F + steps * (2 * n_layers + 1) * (F + B) per batch.

    Hanna et al. 2024, https://arxiv.org/abs/2403.17806.
    """
    points = _midpoints(steps)
    layers = range(model.cfg.n_layers)
    names = [_EMBEDDING, *(f"blocks.{layer}.{name}" for layer in layers for name in ("hook_attn_out", "hook_mlp_out"))]

    def parts(patched: Prompts, other: Prompts) -> Iterator[tuple[Written, InputGradients]]:
        difference = written(model, other).minus(written(model, patched), patched.attention_mask)
        here, there = recorded(model, patched, names), recorded(model, other, names)
        for name in names:
            between = _between(name, here[name], there[name], points)
            yield difference, _gradients(model, patched, metric, between)

    options = direction, edges, batch_size, per_prompt
    settings = {"steps": steps, "rule": "midpoint"}
    return edge_scores(edge_integrated_gradients_of_activations, parts, model, prompts, metric, *options, settings)


def edge_clean_corrupted(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Direction = "noising",
    edges: Iterable[Edge | str] | None = None,
    batch_size: int | None = None,
    per_prompt: bool = True,
) -> EdgeScores:
    r"""Edge attribution with the mean of the gradients in the two runs: the trapezoid rule with one step.

        score(u -> v) = mean over prompts of the sum over positions and d of
                        (a_u(x') - a_u(x)) * (d metric / d r_v at x + d metric / d r_v at x') / 2

    Sign, unit, arguments, memory and errors as in `edge_attribution_patching`. Cost: 2F + 2B per batch.

    Hanna et al. 2024, https://arxiv.org/abs/2403.17806 ("clean-corrupted").
    """

    def parts(patched: Prompts, other: Prompts) -> list[tuple[Written, InputGradients]]:
        gradients = InputGradients(model, patched.attention_mask)
        here = add_run(gradients, model, patched, metric)
        there = add_run(gradients, model, other, metric)
        return [(there.minus(here, patched.attention_mask), gradients)]

    options = direction, edges, batch_size, per_prompt
    return edge_scores(edge_clean_corrupted, parts, model, prompts, metric, *options)


def _gradients(model: Model, prompts: Prompts, metric: Metric, hooks: Iterable[Hook]) -> InputGradients:
    """Averaged over runs, each with one of the hooks."""
    gradients = InputGradients(model, prompts.attention_mask)
    for hook in hooks:
        add_run(gradients, model, prompts, metric, [hook])
    return gradients


def _between(name: str, here: Tensor, there: Tensor, points: list[float]) -> Iterator[Hook]:
    """For each point, a hook that puts a value on the way from here to there."""
    for point in points:
        yield given(name, torch.lerp(here, there, point))


def _midpoints(steps: int) -> list[float]:
    if steps < 1:
        raise ValueError(f"expected at least one step, got {steps}: 5 are usual, more are more exact.")
    return [(k + 0.5) / steps for k in range(steps)]
