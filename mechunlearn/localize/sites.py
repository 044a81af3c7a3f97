"""What patching and gradient methods share: where components' outputs are, two runs in batches, effects as scores."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.arguments import Direction, check, chosen_components
from mechunlearn.components import Component, ComponentScores, ModelShape
from mechunlearn.identity import name_of
from mechunlearn.localize.options import ComponentOptions, settings_of
from mechunlearn.metrics import Metric, checked
from mechunlearn.model import Hook, Model, differentiable, preserved, recording, shape, site
from mechunlearn.model.running import computed_in, in_half, is_castable
from mechunlearn.tasks.prompts import Prompts

Places: TypeAlias = dict[str, dict[int, int | None]]
"""Hook point -> column of the scores -> head or neuron there, None for all of the activation."""

EMBEDDING = "blocks.0.hook_resid_pre"
"""The input of the first layer, which all other activations follow from."""

Effects: TypeAlias = Callable[[Prompts, Prompts, Places], Float[Tensor, "batch component"]]
"""(prompts of the run that is patched, those of the other run, places) -> each component's effect for each prompt."""


def component_scores(
    method: str, effects: Effects, model: Model, prompts: Prompts, options: ComponentOptions, **settings: Any
) -> ComponentScores:
    """The means over prompts of what a gradient method's `effects` gives, batch after batch of both runs."""
    sizes, metric = shape(model), options["metric"]
    chosen = chosen_components(options["components"], sizes)
    places = places_of(chosen, sizes)
    batches = run_pairs(model, prompts, metric, options["direction"], options["batch_size"])
    with differentiable(model):
        per_prompt = torch.cat([effects(patched, other, places) for patched, other in batches]).cpu().double()
        _check_sees(method, model, metric, batches, chosen, per_prompt)
    name, settings = name_of(metric), settings_of(options, prompts, **settings)
    return ComponentScores(chosen, per_prompt.mean(0), sizes, method, name, settings, per_prompt)


def _check_sees(
    method: str,
    model: Model,
    metric: Metric,
    batches: list[tuple[Prompts, Prompts]],
    chosen: tuple[Component, ...],
    per_prompt: Float[Tensor, "prompt component"],
) -> None:
    """ValueError if every component of a kind got exactly 0, but the metric moves when all of them are patched."""
    seen = {component.kind for component, some in zip(chosen, per_prompt.any(0).tolist(), strict=True) if some}
    for kind in {component.kind for component in chosen} - seen:
        blind = [component for component in chosen if component.kind == kind]
        change, size = 0.0, 0.0
        with torch.no_grad():
            for patched, other in batches:
                before = checked(metric, patched.logits(model), patched).double()
                hooks = _unit_hooks(model, other, places_of(blind, shape(model)))
                after = checked(metric, patched.logits(model, hooks=hooks), patched).double()
                change, size = max(change, float((after - before).abs().max())), max(size, float(before.abs().max()))
        if change > 1e-3 * size:
            raise ValueError(
                f"expected {method} to see an effect of {', '.join(map(str, blind[:3]))}, got exactly 0 for all "
                f"{len(blind)} of this kind, although patching them together moves {name_of(metric)} by up to "
                f"{change:.3g}: no gradient reaches them (a saturated metric has none); use logit_difference, a wider "
                f"dtype, or activation_patching."
            )


def _unit_hooks(model: Model, other: Prompts, places: Places) -> list[Hook]:
    """Hooks that put the values of another run in place of those of heads, neurons, or whole activations."""
    with recording(model, places) as source:
        other.logits(model)

    def put(value: Tensor, hook: object, *, name: str) -> Tensor:
        units = list(places[name].values())
        patched = value.clone()
        at = (slice(None), slice(None)) if None in units else (slice(None), slice(None), units)
        patched[at] = source[name][at]
        return patched

    return [(name, partial(put, name=name)) for name in places]


def run_pairs(
    model: Model, prompts: Prompts, metric: Metric, direction: Direction, batch_size: int
) -> list[tuple[Prompts, Prompts]]:
    """Batches of (the run that is patched, the run that the patch is from), on the model's device."""
    check(direction, batch_size, metric=metric)
    clean = prompts.on(model)
    corrupt = clean.corrupted()
    patched, other = (clean, corrupt) if direction == "noising" else (corrupt, clean)
    return list(zip(patched.batches(batch_size), other.batches(batch_size), strict=True))


@torch.no_grad()
def resolution(
    model: Model, prompts: Prompts, metric: Metric, compute_dtype: torch.dtype | None = None, batch_size: int = 64
) -> dict[str, float]:
    """As a setting, the smallest score that a half-precision model tells from rounding; nothing for other models.

    An effect is the difference of two metrics. With e a prompt's metric less that of the same weights in float32, and
    errors of different runs and prompts taken to be independent, that of a mean over n prompts is

        resolution = sqrt(2 / n) * sqrt(mean over prompts, in both runs, of e^2)

    in the metric's unit. Patches in late layers share most rounding with the unpatched run: their errors are smaller.
    Cost: 2F for each run, half of them in float32.
    """
    if compute_dtype is not None or not in_half(model.blocks) or not is_castable(model):
        return {}
    errors, patched = [], prompts.on(model)
    # In the other run too: a metric that is saturated in one of them, a probability near 1, hides rounding there.
    runs = [patched] if patched.corrupt is None else [patched, patched.exchanged()]
    with preserved(model):
        for batch in (batch for run in runs for batch in run.batches(batch_size)):
            own = checked(metric, batch.logits(model), batch).double()
            with computed_in(model, torch.float32):
                errors.append(own - checked(metric, batch.logits(model), batch).double())
    return {"resolution": float((2 / len(prompts) * torch.cat(errors).square().mean()).sqrt())}


def places_of(components: Iterable[Component], sizes: ModelShape) -> Places:
    """Where each component's output is: a hook point, and the head or neuron there."""
    places: Places = {}
    for column, component in enumerate(components):
        unit = component.index
        if component.part == "H" and unit is not None:
            unit = unit * sizes.units(component.matrix or "W_O") // sizes.n_heads
        places.setdefault(site(component, sizes), {})[column] = unit
    return places


def passes(counts: Iterable[int], rows: int, device: torch.device) -> Iterator[tuple[Int[Tensor, "row"], ...]]:
    """All combinations of a number below each count, `rows` of them at a time; the last number changes fastest."""
    combinations = torch.cartesian_prod(*(torch.arange(count, device=device) for count in counts))
    return (part.unbind(1) for part in combinations.split(operator.index(rows)))


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
    return EMBEDDING, lambda residual, hook: residual.detach().clone().requires_grad_(True)


def value_hook(name: str, value: Tensor) -> Hook:
    """A hook that puts `value` at the hook point, whatever comes."""
    return name, lambda own, hook: value


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
