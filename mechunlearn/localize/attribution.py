"""Attribution patching: the effect of patching every component, estimated by one gradient; RelP: by LRP's gradient."""

from collections.abc import Iterable
from functools import partial
from typing import Unpack

from jaxtyping import Float
from torch import Tensor

from mechunlearn.arguments import chosen_components
from mechunlearn.components import ComponentScores
from mechunlearn.localize import sites
from mechunlearn.localize.options import ComponentOptions
from mechunlearn.localize.replacement import activations_at
from mechunlearn.localize.sites import Places
from mechunlearn.metrics import Metric
from mechunlearn.model import Hook, Model, differentiable, shape
from mechunlearn.model.admission import check_unforked
from mechunlearn.model.relevance import relevance_rules
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts


@with_options()
def attribution_patching(model: Model, prompts: Prompts, **options: Unpack[ComponentOptions]) -> ComponentScores:
    r"""A first-order estimate of activation patching, for every component at once.

    With a(x) a component's output, x the run that is patched and x' the run that the patch is from,

        score = mean over prompts of the sum over positions and d of
                (a(x') - a(x)) * d metric / d a(x)

    which approximates metric(x with a replaced by a(x')) - metric(x), in the metric's unit.

    The outputs of components are:

    - of a head and its W_O, what the head adds to the residual stream; of an MLP and its W_out likewise;
    - of W_Q, W_K, W_V the query, key or value (a KV head that several query heads share has one score);
    - of W_in and W_gate the pre-activations; of a neuron its activation.

    Cost: 2F + 1B (of activations only), however many components. Memory: one batch's activations for the backward pass,
    and those of the components twice. The model is left as it was.

    Nanda 2023, https://www.neelnanda.io/mechanistic-interpretability/attribution-patching;
    Syed et al. 2023, https://arxiv.org/abs/2310.10348. ValueError without corrupted prompts.
    """
    effects = partial(first_order_effects, model, options["metric"])
    return sites.component_scores(attribution_patching, effects, model, prompts, options)


def first_order_effects(
    model: Model, metric: Metric, patched: Prompts, other: Prompts, places: Places, hooks: Iterable[Hook] = ()
) -> Float[Tensor, "batch component"]:
    """Gradient times difference, summed over positions and, for heads, over d_head.

    `hooks` act on the patched run alone, after its values are recorded.
    """
    source = activations_at(model, other, places)
    values, base = sites.metric_and_activations(model, patched, metric, places, [sites.graph_start(), *hooks])
    slopes = sites.gradients(values, base, metric)
    real = patched.attention_mask
    effects = {name: sites.effects_at(source[name] - base[name].detach(), slopes[name], real) for name in places}
    return sites.effect_columns(effects, places)


@with_options()
def relp(model: Model, prompts: Prompts, **options: Unpack[ComponentOptions]) -> ComponentScores:
    r"""Relevance patching: `attribution_patching` with steadier slopes.

    With a(x) a component's output, x the run that is patched and x' the run that the patch is from,

        score = mean over prompts of the sum over positions and d of (a(x') - a(x)) * r(x)

    in the metric's unit. r is d metric / d a in a network that agrees with the model on x and is linear around it:

    - LN rule: norms divide by the scale that they have on x;
    - AH rule: attention patterns are those of x;
    - identity rule: act(h) = h * (act(h) / h on x);
    - half rule: a gated MLP's act(gate) * up passes half of the gradient to each factor.

    The score has what a component does through values and MLPs, not what it does by changing where heads attend:
    queries and keys have no relevance, so `W_Q` and `W_K` are refused. The soft cap of Gemma 2's logits, for which the
    paper has no rule, is differentiated. Cost and memory are those of `attribution_patching`.

    Rezaei Jafari et al. 2025, https://arxiv.org/abs/2508.21258. Norms have to be LayerNorms or RMSNorms.
    """
    check_unforked(model)
    options["components"] = chosen = chosen_components(options["components"], shape(model))
    without = [str(component) for component in chosen if component.matrix in ("W_Q", "W_K")]
    if without:
        raise ValueError(
            f"expected components with relevance, got {', '.join(without[:3])}: attention patterns are held fixed, so "
            f"queries and keys have none; leave them out, or use atp_star or attribution_patching."
        )
    with differentiable(model), relevance_rules(model) as rules:
        effects = partial(first_order_effects, model, options["metric"], hooks=rules)
        return sites.component_scores(relp, effects, model, prompts, options)
