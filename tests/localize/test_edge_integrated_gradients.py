"""EAP-IG: means of slopes of patching one edge, taken in other runs than the patched one."""

from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from one_edge import at, change_of, slope, some_edges
from state import left_as_it_was

from mechunlearn.components import Edge, layers
from mechunlearn.localize import (
    edge_attribution_patching,
    edge_clean_corrupted,
    edge_integrated_gradients,
    edge_integrated_gradients_of_activations,
    integrated_gradients,
)
from mechunlearn.metrics import logit_difference

METHODS = (
    partial(edge_integrated_gradients, steps=2),
    partial(edge_integrated_gradients_of_activations, steps=1),
    edge_clean_corrupted,
)
EMBEDDING = "blocks.0.hook_resid_pre"


def slope_between(model, prompts, edge, points, name):
    """The mean slope over runs in which the value at one hook point lies at these points of the way."""
    here, there = at(model, prompts, name), at(model, prompts.corrupted(), name)
    found, source, runs = [], Edge.parse(edge).source, (prompts, prompts.corrupted())
    # A post-norm's derivative is the mean of those at both runs, so that directions differ in sign alone.
    change = (change_of(model, *runs, source) - change_of(model, *runs[::-1], source)) / 2
    for point in points:
        value = here + point * (there - here)
        hooks = [(name, lambda own, hook, v=value: v)]
        found.append(slope(model, prompts, edge, logit_difference, hooks=hooks, change=change))
    return torch.stack(found).mean(0)


def test_over_inputs_it_is_the_mean_slope_between_the_two_embeddings(model):
    prompts = tiny.prompts(model)
    scores = edge_integrated_gradients(model, prompts, steps=3)
    for label in some_edges(model)[1::3]:
        expected = slope_between(model, prompts, label, [1 / 6, 3 / 6, 5 / 6], EMBEDDING)
        assert scores[label] == pytest.approx(float(expected.mean()), rel=1e-3, abs=1e-5), label


def test_over_activations_it_is_the_mean_slope_over_all_groups(model):
    prompts = tiny.prompts(model)
    scores = edge_integrated_gradients_of_activations(model, prompts, steps=1)
    groups = [f"blocks.{layer}.{name}" for layer in range(3) for name in ("hook_attn_out", "hook_mlp_out")]
    for label in ("L0H3->L1H2.W_V", "L0MLP->L2MLP"):
        means = [slope_between(model, prompts, label, [0.5], name) for name in [EMBEDDING, *groups]]
        assert scores[label] == pytest.approx(float(torch.stack(means).mean()), rel=1e-3, abs=1e-5), label


def test_clean_corrupted_is_the_mean_of_both_directions_of_edge_attribution(model):
    prompts = tiny.prompts(model)
    both = edge_clean_corrupted(model, prompts)
    noising = edge_attribution_patching(model, prompts)
    denoising = edge_attribution_patching(model, prompts, direction="denoising")
    assert torch.allclose(both.tensor, (noising.tensor - denoising.tensor) / 2, atol=1e-6)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2]])
def test_directions_differ_in_sign_alone(model, method):
    prompts = tiny.prompts(model)
    noising, denoising = (method(model, prompts, direction=d) for d in ("noising", "denoising"))
    assert torch.allclose(noising.tensor, -denoising.tensor, atol=1e-6)


def test_summed_over_destinations_scores_are_integrated_gradients_of_nodes(model):
    prompts = tiny.prompts(model)
    nodes = edge_integrated_gradients(model, prompts, steps=3).nodes()
    expected = integrated_gradients(model, prompts, steps=3)
    post_norm = "ln1_post" in dict(model.blocks[0].named_children())
    largest = float(expected.tensor.abs().max())
    for component, score in expected.items():
        if component.part == "MLP" or not post_norm:
            assert nodes[component] == pytest.approx(score, rel=1e-5, abs=1e-6 * largest), component
    if post_norm:
        return
    whole = integrated_gradients(model, prompts, steps=3, components=layers)
    heads = sum(nodes[f"L1H{head}"] for head in range(4))
    assert heads == pytest.approx(whole["L1ATTN"], rel=1e-5, abs=1e-6 * largest)


def test_the_embeddings_edges_sum_to_the_change_of_the_metric(model):
    """Completeness: over all destinations, the embedding's integrated gradient is all that happens."""
    prompts = tiny.prompts(model, n=3)
    scores = edge_integrated_gradients(model, prompts, steps=30)
    with torch.no_grad():
        clean = logit_difference(prompts.logits(model), prompts)
        corrupt = logit_difference(prompts.corrupted().logits(model), prompts)
    assert scores.per_prompt is not None
    assert torch.allclose(scores.per_prompt[:, 0].sum(-1), corrupt - clean, atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize("method", METHODS, ids=["inputs", "activations", "clean-corrupted"])
class TestEveryMethod:
    def test_it_has_only_the_edges_asked_for(self, llama, method):
        scores = method(llama, tiny.prompts(llama), edges=["L1H2->L2MLP"], per_prompt=False)
        assert [str(edge) for edge in scores] == ["L1H2->L2MLP"]
        assert scores.per_prompt is None

    def test_prompts_without_a_corrupted_side_are_refused(self, llama, method):
        prompts = replace(tiny.prompts(llama), corrupt=None)
        with left_as_it_was(llama), pytest.raises(ValueError, match="expected prompts with a corrupted counterpart"):
            method(llama, prompts)


@pytest.mark.parametrize("method", [edge_integrated_gradients, edge_integrated_gradients_of_activations])
def test_fewer_than_one_step_is_refused(llama, method):
    with pytest.raises(ValueError, match="expected at least one step, got 0"):
        method(llama, tiny.prompts(llama), steps=0)


def test_the_cost_is_what_it_says(llama):
    edge_attribution_patching(llama, tiny.prompts(llama))  # checks the model once
    passes = []
    handles = [
        llama.blocks[1].register_forward_hook(lambda *_: passes.append("F")),
        llama.blocks[1].register_full_backward_hook(lambda *_: passes.append("B")),
    ]
    counts = []
    try:
        for method in (partial(edge_integrated_gradients, steps=5), edge_clean_corrupted):
            passes.clear()
            method(llama, tiny.prompts(llama), batch_size=6)
            counts.append((passes.count("F"), passes.count("B")))
    finally:
        for handle in handles:
            handle.remove()
    assert counts == [(7, 5), (2, 2)]
