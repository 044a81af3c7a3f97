"""Attribution patching: the effect of patching every component, estimated by one gradient."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import Component, Components, ComponentScores, ModelShape, heads_and_mlps, resolve
from mechunlearn.metrics import Metric, checked, logit_difference, name_of
from mechunlearn.model import Model, device_of, differentiable, recording, shape, site
from mechunlearn.tasks.prompts import Prompts


def attribution_patching(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Literal["noising", "denoising"] = "noising",
    components: Components = heads_and_mlps,
    batch_size: int = 64,
) -> ComponentScores:
    r"""A first-order estimate of activation patching, for every component at once.

    With a(x) a component's output, x the run that is patched and x' the run that the patch is from,

        score = mean over prompts of the sum over positions and d of
                (a(x') - a(x)) * d metric / d a(x)

    which approximates metric(x with a replaced by a(x')) - metric(x), in the metric's unit.

    - `"noising"`: x is clean, x' corrupt. A component that the answer needs scores *negative*.
    - `"denoising"`: x is corrupt, x' clean. A component that carries the answer scores *positive*.

    `components`: `heads_and_mlps` (default), `layers`, `matrices`, `neurons`, or any components. The
    output of a head and of its W_O is what the head adds to the residual stream; of W_Q, W_K, W_V the
    query, key or value; of W_in and W_gate the pre-activations; of a neuron its activation. A KV head
    that several query heads share has one score.

    Cost: 2 forwards + 1 backward (of activations only) per batch, however many components.
    Memory: one batch's activations for the backward pass, and those of the sites twice. The model is left as it was.

    Nanda 2023, https://www.neelnanda.io/mechanistic-interpretability/attribution-patching;
    Syed et al. 2023, https://arxiv.org/abs/2310.10348. ValueError without corrupted prompts.
    """
    if direction not in ("noising", "denoising"):
        raise ValueError(f'expected direction "noising" or "denoising", got {direction!r}.')
    sizes = shape(model)
    chosen = resolve(components, sizes)
    clean = prompts.to(device_of(model))
    corrupt = clean.corrupted()
    patched, other = (clean, corrupt) if direction == "noising" else (corrupt, clean)
    places = _places(chosen, sizes)
    rows = []
    with differentiable(model):
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            effects = _effects(model, patched[batch], other[batch], metric, list(places))
            rows.append(_gathered(effects, places, len(chosen)))
    per_prompt = torch.cat(rows).cpu().double()
    settings = {"direction": direction, "prompts": len(prompts), "batch_size": batch_size}
    name = name_of(metric)
    return ComponentScores(chosen, per_prompt.mean(0), sizes, "attribution_patching", name, settings, per_prompt)


Places = dict[str, dict[int, int | None]]
"""Hook point -> column of the scores -> head or neuron there, None for all of the activation."""


def _places(components: tuple[Component, ...], sizes: ModelShape) -> Places:
    places: Places = {}
    for column, component in enumerate(components):
        unit = component.index
        if component.part == "H" and unit is not None:
            unit = unit * sizes.units(component.matrix or "W_O") // sizes.n_heads
        places.setdefault(site(component, sizes), {})[column] = unit
    return places


def _effects(
    model: Model, patched: Prompts, other: Prompts, metric: Metric, sites: list[str]
) -> dict[str, Float[Tensor, "batch _"]]:
    """Site -> gradient times difference, summed over positions and, for heads, over d_head."""
    with torch.no_grad(), recording(model, sites) as source:
        other.logits(model)
    with recording(model, sites) as base:
        values = checked(metric, patched.logits(model, hooks=[_gradients_from_here()]), patched)
    if not values.requires_grad:
        raise ValueError(
            f"expected a metric with a gradient, got one without from {name_of(metric)}: an argmax or a detached "
            f"tensor has none; use logit_difference or answer_log_probability."
        )
    gradients = torch.autograd.grad(values.sum(), [base[name] for name in sites], allow_unused=True)
    effects = {}
    for name, gradient in zip(sites, gradients, strict=True):
        if gradient is None:
            raise ValueError(
                f"expected a metric that depends on {name}, but {name_of(metric)} has no gradient there: it must be "
                f"computed from the logits that it is given."
            )
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        product = (source[name] - base[name].detach()).to(dtype) * gradient.to(dtype)
        real = patched.attention_mask.view(*patched.attention_mask.shape, *[1] * (product.ndim - 2))
        product = product.masked_fill(~real, 0.0).sum(1)
        effects[name] = product.sum(-1) if product.ndim == 3 else product
    return effects


def _gradients_from_here() -> tuple[str, Callable[..., Tensor]]:
    """Weights are frozen, so the first layer's input is what makes autograd record."""

    def require(residual: Tensor, hook: object) -> Tensor:
        return residual.detach().clone().requires_grad_(True)

    return "blocks.0.hook_resid_pre", require


def _gathered(
    effects: dict[str, Float[Tensor, "batch _"]], places: Places, count: int
) -> Float[Tensor, "batch component"]:
    scores = next(iter(effects.values())).new_empty(len(next(iter(effects.values()))), count)
    for name, units in places.items():
        whole = [column for column, unit in units.items() if unit is None]
        single = {column: unit for column, unit in units.items() if unit is not None}
        scores[:, whole] = effects[name].sum(1, keepdim=True)
        scores[:, list(single)] = effects[name][:, list(single.values())]
    return scores
