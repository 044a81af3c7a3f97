"""The slow, obvious reference: exact patching in a network whose norms, patterns and gates are held as they were."""

from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from conftest import shared
from linearised import linear_metric
from state import left_as_it_was

from mechunlearn.components import Component, heads, heads_and_mlps, matrices, neurons
from mechunlearn.localize import attribution_patching, relp
from mechunlearn.metrics import logit_difference
from mechunlearn.model import preserved, recording, shape, site
from mechunlearn.model.relevance import _proportional, relevance_rules

KINDS = ("L1H2", "L0H3.W_V", "L2H1.W_O", "L1ATTN", "L0MLP", "L1MLP.W_in", "L2MLP.W_out", "L1N7")
GATE = ("L1MLP.W_gate",)


def kinds(model):
    return [Component.parse(label) for label in KINDS + (GATE if shape(model).gated else ())]


def with_relevance(sizes):
    return [c for c in [*heads_and_mlps(sizes), *matrices(sizes)] if c.matrix not in ("W_Q", "W_K")]


def frozen(model, prompts):
    """Hooks that make the model linear around these prompts, by constants recorded from a plain run."""
    points = [name for name in model.hook_dict if name.endswith(".hook_scale") and ".attn." not in name]
    points += [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]
    parts = ("hook_pre", "hook_pre_linear") if shape(model).gated else ("hook_pre",)
    inside = [f"blocks.{layer}.mlp.{part}" for layer in range(3) for part in (*parts, "hook_post")]
    with torch.no_grad(), recording(model, [*points, *inside]) as base:
        prompts.logits(model)
    now = {}

    def constant(value, hook, *, name):
        return base[name]

    def keep(value, hook, *, name):
        now[name] = value

    def follow(value, hook, *, prefix):
        return sum(now[prefix + p] * base[prefix + "hook_post"] / base[prefix + p] for p in parts) / len(parts)

    hooks = [(name, partial(constant, name=name)) for name in points]
    for prefix in (f"blocks.{layer}.mlp." for layer in range(3)):
        hooks += [(prefix + part, partial(keep, name=prefix + part)) for part in parts]
        hooks += [(prefix + "hook_post", partial(follow, prefix=prefix))]
    return hooks


def patched_when_frozen(model, prompts, component, direction):
    """For one prompt: the metric with the component's output patched, minus without, in the frozen network."""
    sizes, name, metric = shape(model), site(component, shape(model)), linear_metric(model)
    patched, other = (prompts, prompts.corrupted()) if direction == "noising" else (prompts.corrupted(), prompts)
    with torch.no_grad(), recording(model, [name]) as source:
        other.logits(model)
    unit = slice(None) if component.index is None else component.index
    if component.part == "H":
        unit = component.index * sizes.units(component.matrix or "W_O") // sizes.n_heads

    def patch(value, hook):
        moved = value.clone()
        moved[:, :, unit] = source[name][:, :, unit]
        return moved

    with torch.no_grad():
        hooks = frozen(model, patched)
        # A neuron is patched as W_out reads it, behind the gate; everything else before the constants act on it.
        order = [*hooks, (name, patch)] if component.part == "N" else [(name, patch), *hooks]
        after = patched.logits(model, hooks=order)
        return float(metric(after, patched) - metric(patched.logits(model, hooks=hooks), patched))


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_relevance_is_exact_patching_in_the_frozen_network(model, direction):
    prompts = tiny.prompts(model, n=2)
    scores = relp(model, prompts, metric=linear_metric(model), components=kinds(model), direction=direction)
    with preserved(model):
        for column, component in enumerate(scores):
            expected = [patched_when_frozen(model, prompts[[i]], component, direction) for i in range(2)]
            expected = torch.tensor(expected).double()
            assert torch.allclose(scores.per_prompt[:, column], expected, rtol=1e-3, atol=1e-4), component


def test_the_frozen_network_is_not_the_model(llama):
    prompts = tiny.prompts(llama)
    relevance = relp(llama, prompts).tensor
    assert not torch.allclose(relevance, attribution_patching(llama, prompts).tensor, rtol=0.1, atol=1e-2)


def test_forward_values_are_unchanged_to_the_bit(model):
    prompts = tiny.prompts(model)
    plain = prompts.logits(model)
    with relevance_rules(model) as rules:
        assert torch.equal(prompts.logits(model, hooks=rules), plain)
        with torch.no_grad():
            assert torch.equal(prompts.logits(model, hooks=rules), plain)


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3"])
def test_without_biases_relevance_is_conserved(name):
    """Whatever is scaled, divided and halved on the way: all of the metric arrives at the embeddings."""
    model = shared("bridge", name)
    prompts = tiny.prompts(model)
    embedded = []

    def enter(value, hook):
        embedded.append(value.detach().clone().requires_grad_(True))
        return embedded[0]

    with relevance_rules(model) as rules:
        values = logit_difference(prompts.logits(model, hooks=[("blocks.0.hook_resid_pre", enter), *rules]), prompts)
        relevance = embedded[0] * torch.autograd.grad(values.sum(), embedded[0])[0]
    assert torch.allclose(relevance.sum((1, 2)), values, rtol=1e-4, atol=1e-4)


def test_a_factor_of_zero_keeps_its_ordinary_derivative():
    """act(0) * up = 0 for SiLU: the quotient's limit is act'(0) * up = up / 2; for the other factor it is act(gate)."""
    silu = torch.nn.functional.silu
    gate, up = torch.zeros(1, 1, 1, requires_grad=True), torch.full((1, 1, 1), 3.0, requires_grad=True)
    slope = torch.autograd.grad(_proportional(silu(gate) * up, gate), [gate, up], materialize_grads=True)
    assert [float(part) for part in slope] == [1.5, 0.0]
    gate, up = torch.full((1, 1, 1), 2.0, requires_grad=True), torch.zeros(1, 1, 1, requires_grad=True)
    slope = torch.autograd.grad(_proportional(silu(gate) * up, up), [gate, up], materialize_grads=True)
    assert [float(part) for part in slope] == pytest.approx([0.0, float(silu(gate))])


def test_it_costs_two_forwards(llama):
    passes = []
    handle = llama.blocks[1].register_forward_hook(lambda *_: passes.append("forward"))
    try:
        relp(llama, tiny.prompts(llama), components=lambda s: [*with_relevance(s), *neurons(s)])
    finally:
        handle.remove()
    assert passes == ["forward", "forward"]


def test_the_model_is_left_as_it_was(model):
    def fails(logits, prompts):
        raise KeyboardInterrupt

    with left_as_it_was(model):
        relp(model, tiny.prompts(model), components=heads)
    with left_as_it_was(model), pytest.raises(KeyboardInterrupt):
        relp(model, tiny.prompts(model), metric=fails)


def test_settings_say_how_it_was_made(llama):
    scores = relp(llama, tiny.prompts(llama), direction="denoising", batch_size=3)
    expected = {"direction": "denoising", "batch_size": 3, "prompts": 6}
    assert (scores.method, scores.metric, scores.settings) == ("relp", "logit_difference", expected)


def test_queries_and_keys_are_refused(llama):
    with pytest.raises(ValueError, match=r"expected components with relevance, got L0H1.W_K: .* use atp_star"):
        relp(llama, tiny.prompts(llama), components=["L0H1.W_V", "L0H1.W_K"])


def test_a_norm_that_is_no_layer_norm_is_refused(llama, monkeypatch):
    monkeypatch.setattr(llama.ln_final.original_component, "forward", lambda value: value.tanh())
    with left_as_it_was(llama), pytest.raises(ValueError, match=r"expected a LayerNorm or an RMSNorm"):
        relp(llama, tiny.prompts(llama))


def test_prompts_without_a_corrupted_side_are_refused(llama):
    with pytest.raises(ValueError, match="expected prompts with a corrupted counterpart"):
        relp(llama, replace(tiny.prompts(llama), corrupt=None))
