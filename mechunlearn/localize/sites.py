"""What the gradient methods share: batches of two runs, gradients at components' outputs, and scores made of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.arguments import check
from mechunlearn.components import Component, ComponentScores, ModelShape
from mechunlearn.identity import name_of
from mechunlearn.metrics import Metric, checked
from mechunlearn.model import Hook, Model, device_of, recording, site
from mechunlearn.tasks.prompts import Prompts

Direction: TypeAlias = Literal["noising", "denoising"]
"""Which run is patched: the clean one (with activations of the corrupt run), or the corrupt one."""

Places: TypeAlias = dict[str, dict[int, int | None]]
"""Hook point -> column of the scores -> head or neuron there, None for all of the activation."""


def pairs(
    model: Model, prompts: Prompts, metric: Metric, direction: Direction, batch_size: int
) -> list[tuple[Prompts, Prompts]]:
    """Batches of (the run that is patched, the run that the patch is from), on the model's device."""
    check(direction, batch_size, metric=metric)
    clean = prompts.to(device_of(model))
    corrupt = clean.corrupted()
    patched, other = (clean, corrupt) if direction == "noising" else (corrupt, clean)
    return list(zip(patched.batches(batch_size), other.batches(batch_size), strict=True))


def places_of(components: Iterable[Component], sizes: ModelShape) -> Places:
    """Where each component's output is: a hook point, and the head or neuron there."""
    places: Places = {}
    for column, component in enumerate(components):
        unit = component.index
        if component.part == "H" and unit is not None:
            unit = unit * sizes.units(component.matrix or "W_O") // sizes.n_heads
        places.setdefault(site(component, sizes), {})[column] = unit
    return places


@torch.no_grad()
def recorded(model: Model, prompts: Prompts, names: Iterable[str]) -> dict[str, Tensor]:
    """The values at the hook points `names` in one forward pass."""
    with recording(model, names) as found:
        prompts.logits(model)
    return found


def differentiated(
    model: Model, prompts: Prompts, metric: Metric, names: Iterable[str], hooks: Iterable[Hook]
) -> tuple[Float[Tensor, "batch"], dict[str, Tensor]]:
    """The metric, and the values at the hook points that it can be differentiated by.

    Weights are frozen: one of the `hooks` has to return a tensor that requires a gradient.
    """
    with recording(model, names) as found:
        values = checked(metric, prompts.logits(model, hooks=list(hooks)), prompts)
    if not values.requires_grad:
        raise ValueError(
            f"expected a metric with a gradient, got one without from {name_of(metric)}: an argmax or a detached "
            f"tensor has none; use logit_difference or answer_log_probability."
        )
    return values, found


def gradients(
    values: Tensor, found: Mapping[str, Tensor], metric: Metric, *, keep_graph: bool = False
) -> dict[str, Tensor]:
    """d sum of the metric / d each of the values found; ValueError where it does not depend on them."""
    results = torch.autograd.grad(values.sum(), list(found.values()), retain_graph=keep_graph, allow_unused=True)
    gradients = {name: result for name, result in zip(found, results, strict=True) if result is not None}
    for name in found:
        if name not in gradients:
            raise ValueError(
                f"expected a metric that depends on {name}, but {name_of(metric)} has no gradient there: it must be "
                f"computed from the logits that it is given."
            )
    return gradients


def gradients_from_here() -> Hook:
    """Weights are frozen, so the first layer's input is what makes autograd record."""

    def require(residual: Tensor, hook: object) -> Tensor:
        return residual.detach().clone().requires_grad_(True)

    return "blocks.0.hook_resid_pre", require


def given(name: str, value: Tensor) -> Hook:
    """A hook that puts `value` there, whatever came."""

    def give(own: Tensor, hook: object) -> Tensor:
        return value

    return name, give


def effects_at(
    change: Float[Tensor, "batch pos *unit"],
    gradient: Float[Tensor, "batch pos *unit"],
    real: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch _"]:
    """Gradient times change, summed over the real positions and, for heads, over d_head."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    product = change.to(dtype) * gradient.to(dtype)
    product = product.masked_fill(~real.view(*real.shape, *[1] * (product.ndim - 2)), 0.0).sum(1)
    return product.sum(-1) if product.ndim == 3 else product


def gathered(
    effects: Mapping[str, Float[Tensor, "batch _"]], places: Places, count: int
) -> Float[Tensor, "batch component"]:
    """Effects at hook points as columns, one for each component; zero for components elsewhere."""
    scores = next(iter(effects.values())).new_zeros(len(next(iter(effects.values()))), count)
    for name, units in places.items():
        whole = [column for column, unit in units.items() if unit is None]
        single = {column: unit for column, unit in units.items() if unit is not None}
        scores[:, whole] = effects[name].sum(1, keepdim=True).to(scores.dtype)
        scores[:, list(single)] = effects[name][:, list(single.values())].to(scores.dtype)
    return scores


def scored(
    method: Callable[..., ComponentScores],
    components: tuple[Component, ...],
    rows: list[Tensor],
    sizes: ModelShape,
    metric: Metric,
    settings: Mapping[str, Any],
) -> ComponentScores:
    """Scores that are means over the prompts' rows."""
    per_prompt = torch.cat(rows).cpu().double()
    settings = {**settings, "prompts": len(per_prompt)}
    name, label = name_of(metric), name_of(method)
    return ComponentScores(components, per_prompt.mean(0), sizes, label, name, settings, per_prompt)
