"""AtP*: attribution patching without its two known blind spots, saturated softmaxes and cancelling effects."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.components import ComponentScores
from mechunlearn.localize import sites
from mechunlearn.localize.options import ComponentOptions
from mechunlearn.localize.replacement import activations_at
from mechunlearn.localize.sites import Places
from mechunlearn.metrics import Metric
from mechunlearn.model import Model, shape
from mechunlearn.model.hooks import attended_again, attention_calls, layer_of
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts


@with_options()
def atp_star(
    model: Model, prompts: Prompts, *, qk_fix: bool = True, grad_drop: bool = True, **options: Unpack[ComponentOptions]
) -> ComponentScores:
    r"""Attribution patching that does not linearise the softmax and does not let paths cancel.

    The effect of a component is I = sum over positions of (a(x') - a(x)) * d metric / d a(x), as in
    `attribution_patching`, but

    - `qk_fix`, for `W_Q` and `W_K` (`components=matrices`): the model's own attention gives the exact change of the
      pattern A,

          query:                 I = sum (A(q') - A(q)) * d metric / d A
          key, each position t:  I = sum over t of sum (A with column t of the scores from k' - A) * d metric / d A

      A KV head that several query heads share has one score, the sum over them. A head as a whole is its output z.
    - `grad_drop`: with I_l the estimate when no gradient flows through what layer l adds to the residual stream,

          score = mean over prompts of 1 / (n_layers - 1) * sum over l of |I_l|

      which is **never negative**. A component's own layer adds nothing. Without `grad_drop`: the signed mean of I.

    Unit: the metric's. Cost: 2F + 1B; the QK fix adds each layer's attention alone twice (in the layers with `W_Q` or
    `W_K`), GradDrop about n_layers / 2 backwards, since each starts at the dropped layer. (The paper counts
    2F + (L + 1)B.) Memory: that of `attribution_patching`, and the gradients twice.

    Kramár et al. 2024, https://arxiv.org/abs/2403.00745. ValueError for GradDrop on a model of one layer.
    """
    n_layers = shape(model).n_layers
    if grad_drop and n_layers < 2:
        raise ValueError("expected a model of two layers or more for grad_drop, got one: pass grad_drop=False.")

    def effects(patched: Prompts, other: Prompts, places: Places) -> Float[Tensor, "batch component"]:
        run = _run(model, patched, other, options["metric"], list(places), n_layers, qk_fix=qk_fix)
        if grad_drop:
            return _mean_over_dropped(run, places, n_layers)
        return sites.effect_columns(_estimates(run, run.slopes), places)

    own = {"qk_fix": qk_fix, "grad_drop": grad_drop}
    return sites.component_scores("atp_star", effects, model, prompts, options, **own)


@dataclass(frozen=True, eq=False)
class _Run:
    """A differentiated run of one batch, and what patching changes in it."""

    values: Mapping[str, Tensor]
    """Hook point -> value with its graph, where changes show and in the residual stream."""
    slopes: Mapping[str, Tensor]
    """The metric's gradient with respect to these values."""
    changes: Mapping[str, tuple[str, Tensor]]
    """Hook point of components -> the hook point where their change shows, and the change there."""
    keys: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    """Hook point of keys -> attention scores, the same with the other run's keys, and the values attended to."""
    real: Bool[Tensor, "batch pos"]


def _run(
    model: Model, patched: Prompts, other: Prompts, metric: Metric, names: list[str], n_layers: int, *, qk_fix: bool
) -> _Run:
    # With the QK fix, the change of a query or key is taken where it shows: in z, or in the attention scores.
    queries = [name for name in names if qk_fix and name.endswith("hook_q")]
    keys = [name for name in names if qk_fix and name.endswith("hook_k")]
    linear = [name for name in names if name not in queries + keys]
    inside = [_beside(name, part) for name in queries + keys for part in ("z", "v")]
    residuals = [_residual_after(layer, n_layers) for layer in range(n_layers)]
    source = activations_at(model, other, names)
    with attention_calls(model, {layer_of(name) for name in queries + keys}) as calls:
        recorded = [*linear, *inside, *residuals]
        values, base = sites.metric_and_activations(model, patched, metric, recorded, [sites.graph_start()])
    slopes = sites.gradients(values, base, metric, keep_graph=True)
    changes = {name: (name, source[name] - base[name].detach()) for name in linear}
    for name in queries:
        # A query moves its own row of the pattern only: with all of them changed at once, each z has its own's effect.
        z, other_query = _beside(name, "z"), sites.value_hook(name, source[name])
        after = attended_again(model, calls[layer_of(name)], [other_query], [z])[z]
        changes[name] = z, after - base[z].detach()
    key_scores = {}
    for name in keys:
        # A key moves one column of every row. All columns of the scores are computed at once; `_key_effects` puts them
        # into the softmax one at a time.
        scores, other_key = _beside(name, "attn_scores"), sites.value_hook(name, source[name])
        call = calls[layer_of(name)]
        before, after = (attended_again(model, call, hooks, [scores])[scores] for hooks in ([], [other_key]))
        key_scores[name] = before, after, base[_beside(name, "v")].detach()
    return _Run(base, slopes, changes, key_scores, patched.attention_mask)


def _mean_over_dropped(run: _Run, places: Places, n_layers: int) -> Float[Tensor, "batch component"]:
    """The estimates' sizes, averaged over the layer whose contribution lets no gradient through."""
    # A layer below a component has no part in its gradient: dropping one of these leaves the plain estimate, once for
    # each of them. A component's own layer, dropped, leaves it no gradient at all.
    layer_by_column = {column: layer_of(name) for name, units in places.items() for column in units}
    below = torch.tensor([layer_by_column[column] for column in range(len(layer_by_column))], device=run.real.device)
    total = below * sites.effect_columns(_estimates(run, run.slopes), places).abs()
    for dropped in range(1, n_layers):
        lower = {name: units for name, units in places.items() if layer_of(name) < dropped}
        names = [name for name in run.values if layer_of(name) < dropped and "hook_resid" not in name]
        if lower:
            # Gradients above the dropped layer are those of the whole model. The skip connection carries them past the
            # layer: the gradient at its output is that at its input. The backward pass goes on from there.
            above = run.slopes[_residual_after(dropped, n_layers)]
            into = run.values[_residual_after(dropped - 1, n_layers)]
            results = torch.autograd.grad(into, [run.values[name] for name in names], above, retain_graph=True)
            slopes = dict(zip(names, results, strict=True))
            total += sites.effect_columns(_estimates(run, slopes), lower, len(below)).abs()
    return total / (n_layers - 1)


def _estimates(run: _Run, slopes: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "batch _"]]:
    """Hook point of components -> estimate for each unit, where there is a gradient."""
    estimates = {
        name: sites.effects_at(change, slopes[shown], run.real)
        for name, (shown, change) in run.changes.items()
        if shown in slopes
    }
    for name, (before, after, values) in run.keys.items():
        if _beside(name, "z") in slopes:
            estimates[name] = _key_effects(before, after, values, slopes[_beside(name, "z")], run.real)
    return estimates


def _key_effects(
    before: Float[Tensor, "batch head_index pos pos"],
    after: Float[Tensor, "batch head_index pos pos"],
    values: Float[Tensor, "batch pos kv_head d_head"],
    slope: Float[Tensor, "batch pos head_index d_head"],
    real: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch kv_head"]:
    """Effect of each key on the pattern, by positions of the key one at a time: column t moves alone.

    With p the weight of column t, p' = sigmoid(its new score - logsumexp of the other columns), and the others keep
    their proportions, so the row's effect is (p' - p) * (its slope - the others' mean slope).
    """
    group = slope.shape[2] // values.shape[2]
    # d metric / d pattern: what the metric gains if a row of the pattern puts more weight on a column's value.
    slopes = torch.einsum("brhd,bthd->bhrt", slope.double(), values.double().repeat_interleave(group, 2))
    # Weights relative to each row's highest, as in any stable softmax; a row's sum without column t, for every t.
    highest = before.double().amax(-1, keepdim=True)
    weights = (before.double() - highest).exp()
    others = _sum_of_others(weights)
    alone = others == 0  # the first token attends only to itself: there is no other slope to average
    mean = _sum_of_others(weights * slopes) / others.masked_fill(alone, 1.0)
    # p' - p, with the changed score put into the softmax beside the unchanged others.
    moved = (after.double() - highest - others.log()).sigmoid() - weights / (weights + others)
    # Padding neither attends nor is attended to; query heads that share a KV head add up.
    seen = real[:, None, :, None] & real[:, None, None, :]
    effects = (moved * (slopes - mean)).masked_fill(~seen, 0.0).sum((-1, -2))
    return effects.unflatten(1, (-1, group)).sum(-1)


def _sum_of_others(terms: Float[Tensor, "*batch pos"]) -> Float[Tensor, "*batch pos"]:
    """For each term the sum of all others: added up from both ends, since subtracting it would cancel small ones."""
    from_left = torch.nn.functional.pad(terms.cumsum(-1)[..., :-1], (1, 0))
    from_right = torch.nn.functional.pad(terms.flip(-1).cumsum(-1)[..., :-1], (1, 0)).flip(-1)
    return from_left + from_right


def _beside(name: str, part: str) -> str:
    return f"blocks.{layer_of(name)}.attn.hook_{part}"


def _residual_after(layer: int, n_layers: int) -> str:
    last = layer == n_layers - 1
    return f"blocks.{layer}.hook_resid_post" if last else f"blocks.{layer + 1}.hook_resid_pre"
