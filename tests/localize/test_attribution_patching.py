"""The slow, obvious reference: patch a little of one component's difference and see what the metric does."""

import pytest
import tiny
import torch
from linearised import linear_after_last_attention
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import Component, ComponentMask, layers, matrices, neurons
from mechunlearn.localize import attribution_patching
from mechunlearn.metrics import answer_log_probability, logit_difference
from mechunlearn.model import logits_at, preserved, recording, shape, site

EVERY_KIND = (
    "L1H2",
    "L1H2.W_Q",
    "L0H3.W_K",
    "L2H0.W_V",
    "L2H1.W_O",
    "L1ATTN",
    "L0MLP",
    "L1MLP.W_in",
    "L2MLP.W_out",
    "L1N7",
)
GATE = ("L1MLP.W_gate",)


def kinds(model):
    return [Component.parse(label) for label in EVERY_KIND + (GATE if shape(model).gated else ())]


def patched_a_little(model, prompts, component, metric, direction, amount):
    """The metric per prompt with the component's output moved by `amount` of the way to the other run's."""
    sizes = shape(model)
    name = site(component, sizes)
    patched, other = (prompts, prompts.corrupted()) if direction == "noising" else (prompts.corrupted(), prompts)
    index = component.index
    if component.part == "H":
        index = index * sizes.units(component.matrix or "W_O") // sizes.n_heads
    with torch.no_grad(), recording(model, [name]) as source:
        logits_at(model, other.tokens, other.attention_mask)
    with torch.no_grad(), recording(model, [name]) as base:
        logits_at(model, patched.tokens, patched.attention_mask)
    difference = source[name] - base[name]
    chosen = difference if index is None else torch.zeros_like(difference)
    if index is not None:
        chosen[:, :, index] = difference[:, :, index]
    real = patched.attention_mask.view(*patched.attention_mask.shape, *[1] * (difference.ndim - 2))

    def move(value, hook):
        return value + amount * chosen * real

    return metric(
        logits_at(model, patched.tokens, patched.attention_mask, patched.positions, hooks=[(name, move)]), patched
    )


def derivative(model, prompts, component, metric, direction):
    """d metric / d amount at 0, for one component and one prompt at a time."""
    found = []
    with preserved(model):
        for i in range(len(prompts)):
            amount = torch.zeros((), requires_grad=True)
            value = patched_a_little(model, prompts[[i]], component, metric, direction, amount)
            found.append(torch.autograd.grad(value.sum(), amount)[0])
    return torch.stack(found).double()


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_attribution_is_the_derivative_of_patching(model, direction):
    prompts = tiny.prompts(model, n=4)
    scores = attribution_patching(model, prompts, components=kinds(model), direction=direction)
    for component in kinds(model):
        expected = derivative(model, prompts, component, logit_difference, direction)
        place = scores.components.index(component)
        assert torch.allclose(scores.per_prompt[:, place], expected, rtol=1e-4, atol=1e-5), component
        assert scores[component] == pytest.approx(float(expected.mean()), rel=1e-4, abs=1e-5)


@pytest.fixture
def in_float64(monkeypatch):
    """Norms, rotary embeddings and softmaxes that ask for float32 get float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_attribution_is_the_slope_of_exact_patching(architecture, in_float64, direction):
    """Finite differences in float64, for every kind of component."""
    double = tiny.bridge(architecture).to(torch.float64)
    prompts = tiny.prompts(double, n=4)
    scores = attribution_patching(double, prompts, components=kinds(double), direction=direction)
    for column, component in enumerate(scores):
        with preserved(double), torch.no_grad():
            ends = [
                patched_a_little(double, prompts, component, logit_difference, direction, amount)
                for amount in (1e-4, -1e-4)
            ]
        slope = (ends[0] - ends[1]) / 2e-4
        assert slope.dtype == torch.float64
        assert torch.allclose(scores.per_prompt[:, column], slope, rtol=1e-4, atol=1e-7), component


def test_where_the_rest_is_linear_attribution_is_exact_patching(model):
    """The last attention layer, its heads and values, with the last MLP and the final norm taken out."""
    prompts = tiny.prompts(model, n=4)
    linear = [Component.parse(label) for label in ("L2ATTN", "L2H0", "L2H3", "L2H2.W_V", "L2H1.W_O")]
    with linear_after_last_attention(model) as metric:
        scores = attribution_patching(model, prompts, components=linear, metric=metric)
        for column, component in enumerate(scores):
            with torch.no_grad():
                ends = [patched_a_little(model, prompts, component, metric, "noising", amount) for amount in (1.0, 0.0)]
            assert torch.allclose(scores.per_prompt[:, column], (ends[0] - ends[1]).double(), rtol=1e-4, atol=1e-5)


def test_a_head_scores_what_its_output_and_its_w_o_score(model):
    labels = ["L1H2", "L1H2.W_O", "L1MLP", "L1MLP.W_out"]
    scores = attribution_patching(model, tiny.prompts(model), components=[Component.parse(label) for label in labels])
    assert scores["L1H2"] == scores["L1H2.W_O"]
    assert scores["L1MLP"] == scores["L1MLP.W_out"]


def test_heads_sum_to_their_attention_layer_without_post_norms(llama):
    prompts = tiny.prompts(llama)
    heads = attribution_patching(llama, prompts)
    total = attribution_patching(llama, prompts, components=layers)
    for layer in range(3):
        assert sum(heads[f"L{layer}H{h}"] for h in range(4)) == pytest.approx(
            total[f"L{layer}ATTN"], rel=1e-4, abs=1e-6
        )


def test_a_corrupted_run_equal_to_the_clean_one_scores_zero(model):
    from dataclasses import replace

    prompts = tiny.prompts(model)
    scores = attribution_patching(model, replace(prompts, corrupt=prompts.tokens))
    assert float(scores.tensor.abs().max()) < 1e-6


def test_answers_of_several_tokens_are_scored_whole(llama):
    prompts = tiny.prompts(llama, answer=3)
    scores = attribution_patching(llama, prompts, metric=answer_log_probability)
    expected = derivative(llama, prompts, Component.parse("L1H2"), answer_log_probability, "noising").mean()
    assert scores["L1H2"] == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_every_component_at_once_costs_two_forwards_and_one_backward(llama):
    passes = []
    handle = llama.blocks[1].register_forward_hook(lambda *_: passes.append("forward"))
    try:
        attribution_patching(llama, tiny.prompts(llama), components=lambda s: [*matrices(s), *neurons(s), *layers(s)])
    finally:
        handle.remove()
    assert passes == ["forward", "forward"]


def test_weights_that_are_being_trained_stay_trainable(llama):
    llama.train()
    try:
        with left_as_it_was(llama):
            attribution_patching(llama, tiny.prompts(llama))
    finally:
        llama.eval()


def test_the_shipped_model_needs_some_components_more_than_others(shipped):
    task = mu.tasks.sports_facts(shipped, forget="basketball")
    scores = attribution_patching(shipped, task.forget)
    ends = scores.interval()
    assert (ends["high"] < 0).sum() >= 3, "noising should lower the logit difference, beyond chance, somewhere"
    assert isinstance(scores.top(fraction=0.05), ComponentMask)
