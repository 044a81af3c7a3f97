"""AtP*: attribution patching without its two known blind spots, saturated softmaxes and cancelling effects."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.arguments import chosen_components
from mechunlearn.components import Component, Components, ComponentScores, heads_and_mlps
from mechunlearn.localize.sites import (
    Direction,
    Places,
    differentiated,
    effects_at,
    gathered,
    given,
    gradients,
    gradients_from_here,
    pairs,
    places_of,
    recorded,
    scored,
)
from mechunlearn.metrics import Metric, logit_difference
from mechunlearn.model import Model, differentiable, shape
from mechunlearn.model.hooks import attended_again, attention_calls
from mechunlearn.tasks.prompts import Prompts


def atp_star(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Direction = "noising",
    components: Components = heads_and_mlps,
    qk_fix: bool = True,
    grad_drop: bool = True,
    batch_size: int = 64,
) -> ComponentScores:
    r"""Attribution patching that does not linearise the softmax and does not let paths cancel.

    With x the run that is patched and x' the run that the patch is from (see `attribution_patching`), the
    effect of a component is estimated as I = sum over positions of (a(x') - a(x)) * d metric / d a(x), but

    - `qk_fix`, for `W_Q` and `W_K`: the change of the attention pattern A is computed exactly,

          query:                 I = sum (A(q') - A(q)) * d metric / d A
          key, each position t:  I = sum over t of sum (A with column t of the scores from k' - A) * d metric / d A

      by the model's own attention (rotary, soft caps, windows, QK norms). A KV head that several query heads
      share has one score, the sum over them. A head as a whole is, as in `attribution_patching`, its output z:
      what its query or its key does is scored by `L5H3.W_Q` and `L5H3.W_K` (`components=matrices`).
    - `grad_drop`: with I_l the estimate when no gradient flows through what layer l adds to the residual stream,

          score = mean over prompts of 1 / (n_layers - 1) * sum over l of |I_l|

      which is **never negative**: it says how much, not in which direction. A component's own layer
      contributes nothing to the sum. Without `grad_drop` the score is the mean of I, with its sign
      ("noising": a component that the answer needs scores negative); `mean_absolute` gives the mean of |I|.

    Unit: the metric's. Cost: 2 forwards + 1 backward per batch; the QK fix adds each layer's attention alone
    twice (in the layers with `W_Q` or `W_K`), GradDrop about n_layers / 2 backwards: gradients above a dropped
    layer are those of the first one, so the backward pass starts at that layer. (The paper counts 2F + (L + 1)B.)
    Memory: `attribution_patching`'s, and the gradients twice.

    Kramár et al. 2024, https://arxiv.org/abs/2403.00745. ValueError without corrupted prompts, and for GradDrop on
    a model of one layer.
    """
    sizes = shape(model)
    n_layers = sizes.n_layers
    if grad_drop and n_layers < 2:
        raise ValueError("expected a model of two layers or more for grad_drop, got one: pass grad_drop=False.")
    chosen = chosen_components(components, sizes)
    places = places_of(chosen, sizes)
    rows = []
    batches = pairs(model, prompts, metric, direction, batch_size)
    with differentiable(model):
        for patched, other in batches:
            run = _run(model, patched, other, metric, list(places), n_layers, qk_fix=qk_fix)
            if grad_drop:
                rows.append(_dropping(run, places, chosen, n_layers))
            else:
                rows.append(gathered(_effects(run, run.slopes), places, len(chosen)))
    settings = {"direction": direction, "qk_fix": qk_fix, "grad_drop": grad_drop, "batch_size": batch_size}
    return scored(atp_star, chosen, rows, sizes, metric, settings)


@dataclass(frozen=True, eq=False)
class _Run:
    """A differentiated run of one batch, and what patching changes in it."""

    values: Mapping[str, Tensor]
    """At the hook points where changes show and in the residual stream, with their graph."""
    slopes: Mapping[str, Tensor]
    """The metric's gradient with respect to them."""
    changes: Mapping[str, tuple[str, Tensor]]
    """A component's hook point -> the one where its change shows, and the change there."""
    keys: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    """A hook point of keys -> attention scores, those with the other run's keys, the values attended to."""
    real: Bool[Tensor, "batch pos"]


def _run(
    model: Model, patched: Prompts, other: Prompts, metric: Metric, names: list[str], n_layers: int, *, qk_fix: bool
) -> _Run:
    queries = [name for name in names if qk_fix and name.endswith("hook_q")]
    keys = [name for name in names if qk_fix and name.endswith("hook_k")]
    linear = [name for name in names if name not in queries + keys]
    inside = [_beside(name, part) for name in queries + keys for part in ("z", "v")]
    residuals = [_residual_after(layer, n_layers) for layer in range(n_layers)]
    source = recorded(model, other, names)
    with attention_calls(model, {_layer(name) for name in queries + keys}) as calls:
        values, base = differentiated(model, patched, metric, [*linear, *inside, *residuals], [gradients_from_here()])
    slopes = gradients(values, base, metric, keep_graph=True)
    changes = {name: (name, source[name] - base[name].detach()) for name in linear}
    for name in queries:
        z, moved = _beside(name, "z"), given(name, source[name])
        after = attended_again(model, calls[_layer(name)], [moved], [z])[z]
        changes[name] = z, after - base[z].detach()
    found = {}
    for name in keys:
        at, moved = _beside(name, "attn_scores"), given(name, source[name])
        before, after = (attended_again(model, calls[_layer(name)], hooks, [at])[at] for hooks in ([], [moved]))
        found[name] = before, after, base[_beside(name, "v")].detach()
    return _Run(base, slopes, changes, found, patched.attention_mask)


def _dropping(
    run: _Run, places: Places, chosen: tuple[Component, ...], n_layers: int
) -> Float[Tensor, "batch component"]:
    """The estimates' sizes, averaged over which layer's contribution lets no gradient through.

    A layer below a component has no part in its gradient; its own layer leaves it none.
    """
    below = torch.tensor([component.layer for component in chosen], device=run.real.device)
    total = below * gathered(_effects(run, run.slopes), places, len(chosen)).abs()
    for dropped in range(1, n_layers):
        within = {name: units for name, units in places.items() if _layer(name) < dropped}
        names = [name for name in run.values if _layer(name) < dropped and not _is_residual(name)]
        if within:
            # What reaches the layer's output reaches its input unchanged, past the layer.
            above = run.slopes[_residual_after(dropped, n_layers)]
            into = run.values[_residual_after(dropped - 1, n_layers)]
            found = torch.autograd.grad(into, [run.values[name] for name in names], above, retain_graph=True)
            slopes = dict(zip(names, found, strict=True))
            total += gathered(_effects(run, slopes), within, len(chosen)).abs()
    return total / (n_layers - 1)


def _effects(run: _Run, slopes: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "batch _"]]:
    """Hook point of components -> estimate for each unit, where there is a gradient."""
    found = {
        name: effects_at(change, slopes[shown], run.real)
        for name, (shown, change) in run.changes.items()
        if shown in slopes
    }
    for name, (before, after, values) in run.keys.items():
        if _beside(name, "z") in slopes:
            found[name] = _key_effects(before, after, values, slopes[_beside(name, "z")], run.real)
    return found


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
    slopes = torch.einsum("brhd,bthd->bhrt", slope.double(), values.double().repeat_interleave(group, 2))
    highest = before.double().amax(-1, keepdim=True)
    weights = (before.double() - highest).exp()
    others = _sum_of_others(weights)
    alone = others == 0  # the first token sees only itself
    mean = _sum_of_others(weights * slopes) / others.masked_fill(alone, 1.0)
    moved = (after.double() - highest - others.log()).sigmoid() - weights / (weights + others)
    seen = real[:, None, :, None] & real[:, None, None, :]
    effects = (moved * (slopes - mean)).masked_fill(~seen, 0.0).sum((-1, -2))
    return effects.unflatten(1, (-1, group)).sum(-1)


def _sum_of_others(terms: Float[Tensor, "*batch pos"]) -> Float[Tensor, "*batch pos"]:
    """The sum without each term: from both ends, because subtracting would lose what is small beside it."""
    from_left = torch.nn.functional.pad(terms.cumsum(-1)[..., :-1], (1, 0))
    from_right = torch.nn.functional.pad(terms.flip(-1).cumsum(-1)[..., :-1], (1, 0)).flip(-1)
    return from_left + from_right


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def _beside(name: str, part: str) -> str:
    """Another hook point of the same attention."""
    return f"blocks.{_layer(name)}.attn.hook_{part}"


def _residual_after(layer: int, n_layers: int) -> str:
    last = layer == n_layers - 1
    return f"blocks.{layer}.hook_resid_post" if last else f"blocks.{layer + 1}.hook_resid_pre"


def _is_residual(name: str) -> bool:
    return "hook_resid" in name
