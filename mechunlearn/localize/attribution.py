"""Attribution patching: the effect of patching every component, estimated by one gradient; and RelP."""

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from mechunlearn.arguments import chosen_components
from mechunlearn.components import Component, Components, ComponentScores, heads_and_mlps
from mechunlearn.localize.sites import (
    Direction,
    differentiated,
    effects_at,
    gathered,
    gradients,
    gradients_from_here,
    pairs,
    places_of,
    recorded,
    scored,
)
from mechunlearn.metrics import Metric, logit_difference
from mechunlearn.model import Hook, Model, differentiable, shape
from mechunlearn.model.admission import check_unforked
from mechunlearn.model.relevance import relevance_rules
from mechunlearn.tasks.prompts import Prompts


def attribution_patching(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Direction = "noising",
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
    sizes = shape(model)
    chosen = chosen_components(components, sizes)
    places = places_of(chosen, sizes)
    rows = []
    batches = pairs(model, prompts, metric, direction, batch_size)
    with differentiable(model):
        for patched, other in batches:
            rows.append(gathered(first_order_effects(model, patched, other, metric, places), places, len(chosen)))
    settings = {"direction": direction, "batch_size": batch_size}
    return scored(attribution_patching, chosen, rows, sizes, metric, settings)


def first_order_effects(
    model: Model, patched: Prompts, other: Prompts, metric: Metric, names: Iterable[str], hooks: Iterable[Hook] = ()
) -> dict[str, Float[Tensor, "batch _"]]:
    """Hook point -> gradient times difference, summed over positions and, for heads, over d_head.

    `hooks` act on the patched run alone, after its values are recorded.
    """
    source = recorded(model, other, names)
    values, base = differentiated(model, patched, metric, names, [gradients_from_here(), *hooks])
    slopes = gradients(values, base, metric)
    real = patched.attention_mask
    return {name: effects_at(source[name] - base[name].detach(), slopes[name], real) for name in names}


def relp(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Direction = "noising",
    components: Components = heads_and_mlps,
    batch_size: int = 64,
) -> ComponentScores:
    r"""Relevance patching: `attribution_patching` with steadier slopes.

    With a(x) a component's output, x the run that is patched and x' the run that the patch is from,

        score = mean over prompts of the sum over positions and d of (a(x') - a(x)) * r(x)

    in the metric's unit and with `attribution_patching`'s sign ("noising": a component that the answer needs scores
    negative). r is d metric / d a in a network that agrees with the model on x and is linear around it:

    - LN rule: norms divide by the scale that they have on x;
    - AH rule: attention patterns are those of x;
    - identity rule: act(h) = h * (act(h) / h on x);
    - half rule: a gated MLP's act(gate) * up passes half of the gradient to each factor.

    It says what a component does through values and MLPs, not what it does by changing where heads attend:
    queries and keys have no relevance, so `W_Q` and `W_K` are refused. An LRP rule for the soft cap of Gemma 2's
    logits is not in the paper; it is differentiated.

    Cost: 2 forwards + 1 backward per batch, and memory, as `attribution_patching`.

    Rezaei Jafari et al. 2025, https://arxiv.org/abs/2508.21258. ValueError without corrupted prompts, for `W_Q`
    and `W_K`, and for norms that are neither a LayerNorm nor an RMSNorm.
    """
    sizes = shape(model)
    check_unforked(model)
    chosen = chosen_components(components, sizes)
    _check_have_relevance(chosen)
    places = places_of(chosen, sizes)
    rows = []
    batches = pairs(model, prompts, metric, direction, batch_size)
    with differentiable(model), relevance_rules(model) as rules:
        for patched, other in batches:
            effects = first_order_effects(model, patched, other, metric, places, rules)
            rows.append(gathered(effects, places, len(chosen)))
    return scored(relp, chosen, rows, sizes, metric, {"direction": direction, "batch_size": batch_size})


def _check_have_relevance(components: tuple[Component, ...]) -> None:
    without = [str(component) for component in components if component.matrix in ("W_Q", "W_K")]
    if without:
        raise ValueError(
            f"expected components with relevance, got {', '.join(without[:3])}: attention patterns are held fixed, so "
            f"queries and keys have none; leave them out, or use atp_star or attribution_patching."
        )
