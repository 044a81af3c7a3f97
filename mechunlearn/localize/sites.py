"""What patching and gradient methods share: where components' outputs are, two runs in batches, effects as scores."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.arguments import check, chosen_components
from mechunlearn.components import Component, Components, ComponentScores, ModelShape
from mechunlearn.identity import name_of
from mechunlearn.metrics import Metric, checked
from mechunlearn.model import Hook, Model, differentiable, recording, shape, site
from mechunlearn.tasks.prompts import Prompts

Direction: TypeAlias = Literal["noising", "denoising"]
"""Which run is patched: the clean one (with activations of the corrupt run), or the corrupt one."""

Places: TypeAlias = dict[str, dict[int, int | None]]
"""Hook point -> column of the scores -> head or neuron there, None for all of the activation."""

Effects: TypeAlias = Callable[[Prompts, Prompts, Places], Float[Tensor, "batch component"]]
"""(prompts of the run that is patched, those of the other run, places) -> each component's effect for each prompt."""


def component_effects(
    effects: Effects,
    model: Model,
    prompts: Prompts,
    metric: Metric,
    direction: Direction,
    components: Components,
    batch_size: int,
) -> tuple[tuple[Component, ...], Float[Tensor, "prompt component"]]:
    """The components, and what a gradient method's `effects` gives for them, batch after batch of both runs."""
    sizes = shape(model)
    chosen = chosen_components(components, sizes)
    places = places_of(chosen, sizes)
    batches = run_pairs(model, prompts, metric, direction, batch_size)
    with differentiable(model):
        rows = [effects(patched, other, places) for patched, other in batches]
    return chosen, torch.cat(rows).cpu().double()


def scores_of(
    method: Callable[..., ComponentScores],
    components: tuple[Component, ...],
    per_prompt: Float[Tensor, "prompt component"],
    model: Model,
    metric: Metric,
    settings: Mapping[str, Any],
) -> ComponentScores:
    """Scores that are means of the effects over prompts."""
    settings = {**settings, "prompts": len(per_prompt)}
    name, label = name_of(metric), name_of(method)
    return ComponentScores(components, per_prompt.mean(0), shape(model), label, name, settings, per_prompt)


def run_pairs(
    model: Model, prompts: Prompts, metric: Metric, direction: Direction, batch_size: int
) -> list[tuple[Prompts, Prompts]]:
    """Batches of (the run that is patched, the run that the patch is from), on the model's device."""
    check(direction, batch_size, metric=metric)
    clean = prompts.on(model)
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
def activations_at(model: Model, prompts: Prompts, names: Iterable[str]) -> dict[str, Tensor]:
    """The values at the hook points `names` in one forward pass."""
    with recording(model, names) as activations:
        prompts.logits(model)
    return activations


def metric_and_activations(
    model: Model, prompts: Prompts, metric: Metric, names: Iterable[str], hooks: Iterable[Hook]
) -> tuple[Float[Tensor, "batch"], dict[str, Tensor]]:
    """The metric, and the values at `names` to differentiate it by. Weights are frozen: a hook starts the graph."""
    with recording(model, names) as activations:
        values = checked(metric, prompts.logits(model, hooks=list(hooks)), prompts)
    if not values.requires_grad:
        raise ValueError(
            f"expected a metric with a gradient, got one without from {name_of(metric)}: an argmax or a detached "
            f"tensor has none; use logit_difference or answer_log_probability."
        )
    return values, activations


def gradients(
    values: Tensor, activations: Mapping[str, Tensor], metric: Metric, *, keep_graph: bool = False
) -> dict[str, Tensor]:
    """d sum of the metric's values / d each activation; ValueError where they do not depend on it."""
    slopes = torch.autograd.grad(values.sum(), list(activations.values()), retain_graph=keep_graph, allow_unused=True)
    by_name = {name: slope for name, slope in zip(activations, slopes, strict=True) if slope is not None}
    for name in activations:
        if name not in by_name:
            raise ValueError(
                f"expected a metric that depends on {name}, but {name_of(metric)} has no gradient there: it must be "
                f"computed from the logits that it is given."
            )
    return by_name


def graph_start() -> Hook:
    """A hook that makes the first layer's input require a gradient: weights are frozen, so the graph starts there."""

    def require(residual: Tensor, hook: object) -> Tensor:
        return residual.detach().clone().requires_grad_(True)

    return "blocks.0.hook_resid_pre", require


def value_hook(name: str, value: Tensor) -> Hook:
    """A hook that puts `value` at the hook point, whatever comes."""

    def put(own: Tensor, hook: object) -> Tensor:
        return value

    return name, put


def midpoints(steps: int) -> list[float]:
    """The middles of `steps` equal parts of [0, 1]: both runs count alike, and the error falls with steps^2."""
    if steps < 1:
        raise ValueError(f"expected at least one step, got {steps}: 5 are usual, more are more exact.")
    return [(k + 0.5) / steps for k in range(steps)]


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


def effect_columns(
    effects: Mapping[str, Float[Tensor, "batch _"]], places: Places, count: int | None = None
) -> Float[Tensor, "batch component"]:
    """Effects at hook points as columns of `count` components (default: those of `places`); 0 for those not there."""
    first = next(iter(effects.values()))
    count = sum(map(len, places.values())) if count is None else count
    scores = first.new_zeros(len(first), count)
    for name, units in places.items():
        whole = [column for column, unit in units.items() if unit is None]
        single = {column: unit for column, unit in units.items() if unit is not None}
        scores[:, whole] = effects[name].sum(1, keepdim=True).to(scores.dtype)
        scores[:, list(single)] = effects[name][:, list(single.values())].to(scores.dtype)
    return scores
