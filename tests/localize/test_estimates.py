"""What every gradient estimate promises of every kind of component: parts sum to the whole, and none is blind."""

from contextlib import ExitStack
from functools import partial

import pytest
import tiny
import torch

from mechunlearn.components import Component, layers, matrices, neurons
from mechunlearn.localize import (
    activation_patching,
    atp_star,
    attribution_patching,
    edge_attribution_patching,
    edge_clean_corrupted,
    edge_integrated_gradients,
    edge_integrated_gradients_of_activations,
    integrated_gradients,
    integrated_gradients_of_activations,
    relp,
    screen_then_verify,
)
from mechunlearn.localize.sites import graph_start
from mechunlearn.metrics import logit_difference
from mechunlearn.model import preserved, recording, shape, slots
from mechunlearn.model.relevance import relevance_rules

SIGNED = {
    "attribution_patching": attribution_patching,
    "atp_star": partial(atp_star, grad_drop=False),
    "relp": relp,
    "integrated_gradients": partial(integrated_gradients, steps=2),
    "integrated_gradients_of_activations": partial(integrated_gradients_of_activations, steps=2),
}
ESTIMATES = SIGNED | {"atp_star with grad_drop": atp_star}
EDGES = (
    edge_attribution_patching,
    edge_clean_corrupted,
    partial(edge_integrated_gradients, steps=1),
    partial(edge_integrated_gradients_of_activations, steps=1),
)


def everything(sizes, without=()):
    kinds = [*layers(sizes), *matrices(sizes), *neurons(sizes), *(Component(0, "H", head) for head in range(4))]
    return [component for component in kinds if component.matrix not in without]


def sums(scores, part):
    """Per prompt and layer, the sum over all components of a part of the model."""
    chosen = [[i for i, c in enumerate(scores) if (c.layer, c.part) == (layer, part)] for layer in range(3)]
    return torch.stack([scores.per_prompt[:, columns].sum(1) for columns in chosen], 1)


@pytest.mark.parametrize("name", SIGNED)
def test_neurons_sum_to_their_mlp(gpt2, llama, name):
    """Without a post-norm an MLP's output is linear in its neurons."""
    for model in (gpt2, llama):
        prompts = tiny.prompts(model)
        parts = sums(SIGNED[name](model, prompts, components=neurons), "N")
        whole = sums(SIGNED[name](model, prompts, components=layers), "MLP")
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [attribution_patching, relp])
def test_neurons_sum_to_what_w_out_makes_of_them(every_model, method):
    """Also where a post-norm follows: by autograd at what the MLP gives before it."""
    model, prompts = every_model, tiny.prompts(every_model)
    found = sums(method(model, prompts, components=neurons), "N")
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(3)]
    with preserved(model), recording(model, names) as other, torch.no_grad():
        prompts.corrupted().logits(model)
    given = []

    def keep(module, inputs, output):
        given.append(output.clone())
        return given[-1]

    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        rules = stack.enter_context(relevance_rules(model)) if method is relp else []
        own = stack.enter_context(recording(model, names))
        for block in model.blocks:
            stack.enter_context(block.mlp.register_forward_hook(keep))
        values = logit_difference(prompts.logits(model, hooks=[graph_start(), *rules]), prompts)
    slopes = torch.autograd.grad(values.sum(), given)
    for layer, (name, slope) in enumerate(zip(names, slopes, strict=True)):
        change = (other[name] - own[name]).detach() @ slots(model)[layer, "W_out"].weight[:, 0]
        expected = (change * slope * prompts.attention_mask[..., None]).sum((1, 2)).double()
        torch.testing.assert_close(found[:, layer], expected, rtol=1e-4, atol=1e-5)
    assert found.abs().max() > 1e-2


@pytest.mark.parametrize("name", ESTIMATES)
def test_no_kind_is_zero_where_exact_patching_is_not(model, name):
    without = ("W_Q", "W_K") if name == "relp" else ()
    components = everything(shape(model), without)
    prompts = tiny.prompts(model, n=3)
    estimate = ESTIMATES[name](model, prompts, components=components)
    exact = activation_patching(model, prompts, components=components)
    for kind in {component.kind for component in components}:
        columns = [i for i, component in enumerate(components) if component.kind == kind]
        assert exact.tensor[columns].any()
        assert estimate.tensor[columns].any(), kind


def step(logits, prompts):
    """A stair of the logit difference: exact patching climbs it, no gradient does."""
    difference = logit_difference(logits, prompts)
    return difference * 0 + (difference * 1e3).round()


@pytest.mark.parametrize("name", ESTIMATES)
def test_a_blind_estimate_is_refused(gpt2, name):
    with pytest.raises(ValueError, match=r"to see an effect of L0MLP, .* 0 for all 3 of this kind.*use logit_diff"):
        ESTIMATES[name](gpt2, tiny.prompts(gpt2), metric=step, components=["L0MLP", "L1MLP", "L2MLP"])


@pytest.mark.parametrize("method", EDGES)
def test_a_blind_estimate_of_edges_is_refused(gpt2, method):
    with pytest.raises(ValueError, match=r"got exactly 0 for all .* edge_patching"):
        method(gpt2, tiny.prompts(gpt2), metric=step)


def test_what_carries_nothing_is_zero_without_an_error(gpt2):
    """The last token is the same in both runs, so that the embedding's edge to the logits carries nothing."""
    assert not edge_attribution_patching(gpt2, tiny.prompts(gpt2), edges=["embed->logits"]).tensor.any()


def test_neurons_screened_by_relevance_are_better_than_by_order(gpt2):
    prompts = tiny.prompts(gpt2)
    found = screen_then_verify(gpt2, prompts, k=20, estimate=relp, components=neurons, sample=100)
    assert found.scores.tensor.abs().mean() > 3 * found.sampled.tensor.abs().mean()
