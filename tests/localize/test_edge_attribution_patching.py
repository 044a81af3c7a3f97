"""The slow, obvious reference: let a little more of one source reach one destination and see what the metric does."""

from dataclasses import replace

import pytest
import tiny
import torch
from one_edge import change_of, slope, some_edges
from state import left_as_it_was

import mechunlearn.localize.edge_attribution as shared
from mechunlearn.components import Edge, EdgeMask, edges, layers, sources
from mechunlearn.localize import attribution_patching, edge_attribution_patching
from mechunlearn.metrics import answer_log_probability, logit_difference
from mechunlearn.model import shape
from mechunlearn.model.edges import is_parallel


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_scores_are_the_derivative_of_patching_one_edge(model, direction):
    prompts = tiny.prompts(model)
    scores = edge_attribution_patching(model, prompts, direction=direction)
    place = {edge: i for i, edge in enumerate(scores)}
    values = scores.per_prompt[:, scores.scored]
    for label in some_edges(model):
        expected = slope(model, prompts, label, logit_difference, direction)
        assert torch.allclose(values[:, place[Edge.parse(label)]], expected, rtol=1e-3, atol=1e-5), label
        assert scores[label] == pytest.approx(float(expected.mean()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_every_edge_is_the_derivative_of_patching_it(architecture):
    model = tiny.bridge(architecture)
    prompts = tiny.prompts(model, n=2)
    scores = edge_attribution_patching(model, prompts)
    assert list(scores) == edges(shape(model))
    changes = {source: change_of(model, prompts, prompts.corrupted(), source) for source in sources(shape(model))}
    for edge, score in scores.items():
        expected = float(slope(model, prompts, edge, logit_difference, change=changes[edge.source]).mean())
        assert score == pytest.approx(expected, rel=1e-3, abs=1e-5), edge


def test_summed_over_destinations_scores_are_node_attribution(model):
    prompts = tiny.prompts(model)
    nodes = edge_attribution_patching(model, prompts).nodes()
    expected = attribution_patching(model, prompts)
    largest = float(expected.tensor.abs().max())
    for component, score in expected.items():
        assert nodes[component] == pytest.approx(score, rel=1e-4, abs=1e-5 * largest), component
    if "ln1_post" in dict(model.blocks[0].named_children()):
        return  # what a layer adds differs by more than first order in its heads
    whole = attribution_patching(model, prompts, components=layers)
    for layer in range(3):
        heads = sum(nodes[f"L{layer}H{head}"] for head in range(4))
        assert heads == pytest.approx(whole[f"L{layer}ATTN"], rel=1e-5, abs=1e-6 * largest)


def test_without_a_change_there_is_no_effect(model):
    prompts = tiny.prompts(model)
    scores = edge_attribution_patching(model, replace(prompts, corrupt=prompts.tokens))
    assert float(scores.tensor.abs().max()) < 1e-6


def test_by_default_long_prompts_of_large_models_come_one_by_one(llama, monkeypatch):
    prompts, passes = tiny.prompts(llama), []
    whole = edge_attribution_patching(llama, prompts)
    handle = llama.blocks[1].register_forward_hook(lambda *_: passes.append(1))
    of_two = 2 * 40 * 4 * prompts.tokens.shape[1] * 3 * 32
    monkeypatch.setattr(shared, "_CACHED", of_two)
    try:
        two = edge_attribution_patching(llama, prompts)
        monkeypatch.setattr(shared, "_CACHED", 1)
        one = edge_attribution_patching(llama, prompts)
        monkeypatch.setattr(shared, "free_memory", lambda device: 4 * 2 * of_two)
        of_gpu = edge_attribution_patching(llama, prompts)
    finally:
        handle.remove()
    assert [scores.settings["batch_size"] for scores in (two, one, of_gpu)] == [2, 1, 4]
    assert len(passes) == 2 * 3 + 2 * 6 + 2 * 2
    assert torch.allclose(one.per_prompt, whole.per_prompt, atol=1e-5)
    with pytest.raises(ValueError, match="expected a batch_size of at least 1, got 0"):
        edge_attribution_patching(llama, prompts, batch_size=0)


@pytest.mark.parametrize("size", [1, 40_000, 120_000])
def test_pieces_of_prompts_and_positions_add_up_to_the_whole(llama, monkeypatch, size):
    prompts = tiny.prompts(llama)
    whole = edge_attribution_patching(llama, prompts).per_prompt
    sizes = []

    def watched(*arguments):
        sizes.append(contributions(*arguments))
        return sizes[-1]

    contributions = shared.contributions
    monkeypatch.setattr(shared, "_TEMPORARY", size)
    monkeypatch.setattr(shared, "contributions", watched)
    assert torch.allclose(edge_attribution_patching(llama, prompts).per_prompt, whole, atol=1e-6)
    one_place = 16 * 32 * 4
    assert max(made.numel() * 4 for made in sizes) <= max(size, one_place), "no more than allowed at a time"


def test_some_edges_have_the_scores_that_they_have_among_all(llama):
    prompts = tiny.prompts(llama)
    whole = edge_attribution_patching(llama, prompts)
    some = edge_attribution_patching(llama, prompts, edges=["L1H2->L2H3.W_K", "embed->L0MLP"])
    assert [str(edge) for edge in some] == ["embed->L0MLP", "L1H2->L2H2.W_K"]
    assert all(some[edge] == whole[edge] for edge in some)
    again = edge_attribution_patching(llama, prompts, edges=whole.top(k=7))
    assert set(again) == whole.top(k=7).edges


def test_prompts_own_scores_can_be_left_out(llama):
    prompts = tiny.prompts(llama)
    kept, left_out = (edge_attribution_patching(llama, prompts, per_prompt=keep) for keep in (True, False))
    assert left_out.per_prompt is None
    assert torch.allclose(kept.tensor, left_out.tensor, atol=1e-9)
    assert torch.allclose(kept.per_prompt.double().mean(0), kept.tensor, atol=1e-6)


def test_answers_of_several_tokens_are_scored_whole(llama):
    prompts = tiny.prompts(llama, answer=3)
    scores = edge_attribution_patching(llama, prompts, metric=answer_log_probability)
    expected = slope(llama, prompts, "L0MLP->L2H1.W_Q", answer_log_probability).mean()
    assert scores["L0MLP->L2H1.W_Q"] == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


def test_all_edges_at_once_cost_two_forwards_and_one_backward(llama):
    edge_attribution_patching(llama, tiny.prompts(llama))  # checks the model once
    passes = []
    handles = [
        llama.blocks[1].register_forward_hook(lambda *_: passes.append("forward")),
        llama.blocks[1].register_full_backward_hook(lambda *_: passes.append("backward")),
    ]
    try:
        edge_attribution_patching(llama, tiny.prompts(llama), batch_size=6)
    finally:
        for handle in handles:
            handle.remove()
    assert passes == ["forward", "forward", "backward"]


def test_the_model_is_left_as_it_was(model):
    with left_as_it_was(model):
        edge_attribution_patching(model, tiny.prompts(model))


@pytest.mark.parametrize("where", ["metric", "hook"])
def test_an_interrupt_leaves_the_model_as_it_was(model, where):
    edge_attribution_patching(model, tiny.prompts(model)[:1])  # checks the model once

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    handle = model.blocks[1].register_forward_hook(interrupt) if where == "hook" else None
    metric = interrupt if where == "metric" else logit_difference
    try:
        with left_as_it_was(model), pytest.raises(KeyboardInterrupt):
            edge_attribution_patching(model, tiny.prompts(model), metric=metric)
    finally:
        if handle is not None:
            handle.remove()


def test_half_precision_gives_about_the_same(llama):
    prompts = tiny.prompts(llama)
    whole = edge_attribution_patching(llama, prompts).values_in_order
    half = tiny.bridge("llama").to(torch.bfloat16)
    rough = edge_attribution_patching(half, prompts).values_in_order
    assert float(torch.corrcoef(torch.stack([whole, rough]))[0, 1]) > 0.99


def test_prompts_without_a_corrupted_side_are_refused(model):
    prompts = replace(tiny.prompts(model), corrupt=None)
    with left_as_it_was(model), pytest.raises(ValueError, match="expected prompts with a corrupted counterpart, got"):
        edge_attribution_patching(model, prompts)


def test_an_edge_outside_the_model_is_refused(llama):
    with pytest.raises(ValueError, match=r"expected a component of a model with 3 layers.*got L7MLP"):
        edge_attribution_patching(llama, tiny.prompts(llama), edges=["embed->L7MLP"])
    with pytest.raises(ValueError, match="expected at least one edge, got none"):
        edge_attribution_patching(llama, tiny.prompts(llama), edges=[])


def test_a_circuit_of_another_model_is_refused(llama):
    other = EdgeMask.of(["embed->L0MLP"], replace(shape(llama), n_layers=7))
    with left_as_it_was(llama), pytest.raises(ValueError, match=r"expected edges of this model.*n_layers=7"):
        edge_attribution_patching(llama, tiny.prompts(llama), edges=other)


def test_heads_do_not_feed_the_mlp_beside_them_in_parallel_blocks(model):
    edge = "L2H0->L2MLP"
    if not is_parallel(model):
        assert edge in edge_attribution_patching(model, tiny.prompts(model), edges=[edge])
        return
    assert "L1H0->L2MLP" in edge_attribution_patching(model, tiny.prompts(model))
    assert edge not in edge_attribution_patching(model, tiny.prompts(model))
    with (
        left_as_it_was(model),
        pytest.raises(ValueError, match=f"expected edges of this model, got {edge}: .*parallel"),
    ):
        edge_attribution_patching(model, tiny.prompts(model), edges=["embed->L0MLP", edge])


def test_metrics_without_a_gradient_are_refused(llama):
    def share(logits, prompts):
        return (logits[:, 0].argmax(-1) == prompts.answers[:, 0]).float()

    def detached(logits, prompts):
        return torch.zeros(len(prompts), requires_grad=True) + 0.0

    with (
        left_as_it_was(llama),
        pytest.raises(ValueError, match=r"expected a metric with a gradient.* from share"),
    ):
        edge_attribution_patching(llama, tiny.prompts(llama), metric=share)
    with left_as_it_was(llama), pytest.raises(ValueError, match=r"expected a metric that depends .*detached has no"):
        edge_attribution_patching(llama, tiny.prompts(llama), metric=detached)


def test_an_unknown_direction_is_refused(llama, unchecked):
    with pytest.raises(ValueError, match='expected direction "noising" or "denoising", got'):
        edge_attribution_patching(llama, tiny.prompts(llama), direction="noise")
