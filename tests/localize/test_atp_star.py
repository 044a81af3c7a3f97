"""The slow, obvious reference: one query or one key replaced in the whole model, and one backward pass per layer."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import tiny
import torch
from linearised import linear_after_last_attention
from state import left_as_it_was

from mechunlearn.components import Component, heads, matrices
from mechunlearn.localize import atp_star, attribution_patching, integrated_gradients_of_activations, mean_absolute
from mechunlearn.localize.atp import _key_effects
from mechunlearn.metrics import logit_difference
from mechunlearn.model import preserved, recording, shape, site, slots

KINDS = ("L0H3.W_K", "L1H1.W_K", "L2H2.W_Q", "L1H0.W_Q", "L1H2", "L2H0.W_V", "L0MLP", "L1MLP.W_in", "L0ATTN", "L0N7")


def kinds(model):
    return [Component.parse(label) for label in KINDS]


def chosen_part(component, sizes, value):
    """The component's part of the activation, all else zero."""
    if component.index is None:
        return value
    unit = component.index
    if component.part == "H":
        unit = unit * sizes.units(component.matrix or "W_O") // sizes.n_heads
    only = torch.zeros_like(value)
    only[:, :, unit] = value[:, :, unit]
    return only


def values_at(model, prompts, names, hooks=()):
    with torch.no_grad(), recording(model, names) as found:
        prompts.logits(model, hooks=hooks)
    return found


def slope(model, prompts, name, dropped):
    """d metric / d value at `name`, with what the dropped layer adds made a constant."""
    found = []

    def differentiate(value, hook):
        found.append(value.detach().clone().requires_grad_(True))
        return found[0]

    def constant(value, hook):
        return value.detach()

    layer = [] if dropped is None else [f"blocks.{dropped}.hook_{part}_out" for part in ("attn", "mlp")]
    hooks = [(name, differentiate), *((other, constant) for other in layer)]
    value = logit_difference(prompts.logits(model, hooks=hooks), prompts).sum()
    return torch.autograd.grad(value, found[0])[0] if value.requires_grad else torch.zeros_like(found[0])


def estimate(model, prompts, component, direction, dropped=None):
    """For one prompt: change times slope; for queries and keys the change of z when they are replaced."""
    sizes = shape(model)
    patched, other = (prompts, prompts.corrupted()) if direction == "noising" else (prompts.corrupted(), prompts)
    name = site(component, sizes)
    z = f"blocks.{component.layer}.attn.hook_z"
    base, source = (values_at(model, run, [name, z]) for run in (patched, other))
    change = chosen_part(component, sizes, source[name] - base[name])
    if component.matrix not in ("W_Q", "W_K"):
        return float((change * slope(model, patched, name, dropped)).sum())
    total = 0.0
    positions = [slice(None)] if component.matrix == "W_Q" else range(prompts.tokens.shape[1])
    for position in positions:
        moved = base[name].clone()
        moved[:, position] += change[:, position]
        after = values_at(model, patched, [z], [(name, lambda value, hook, moved=moved: moved)])[z]
        total += float(((after - base[z]) * slope(model, patched, z, dropped)).sum())
    return total


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_queries_and_keys_go_through_the_softmax_one_by_one(model, direction):
    prompts = tiny.prompts(model, n=2)
    scores = atp_star(model, prompts, components=kinds(model), direction=direction, grad_drop=False)
    with preserved(model):
        for column, component in enumerate(scores):
            expected = torch.tensor([estimate(model, prompts[[i]], component, direction) for i in range(2)])
            assert torch.allclose(scores.per_prompt[:, column], expected.double(), rtol=1e-4, atol=1e-5), component


def test_gradients_are_dropped_layer_by_layer(model):
    prompts = tiny.prompts(model, n=2)
    scores = atp_star(model, prompts, components=["L0H3.W_K", "L1H0.W_Q", "L1H2", "L0MLP", "L0ATTN"])
    with preserved(model):
        for column, component in enumerate(scores):
            drops = [abs(estimate(model, prompts[[1]], component, "noising", dropped)) for dropped in range(3)]
            got = float(scores.per_prompt[1, column])
            assert got == pytest.approx(sum(drops) / 2, rel=1e-4, abs=1e-5), component


def test_without_its_two_corrections_it_is_attribution_patching(model):
    prompts = tiny.prompts(model)
    plain = atp_star(model, prompts, components=matrices, qk_fix=False, grad_drop=False)
    expected = attribution_patching(model, prompts, components=matrices)
    assert torch.allclose(plain.per_prompt, expected.per_prompt, atol=1e-6)


def exact(model, prompts, component, metric):
    """Activation patching of the component, metric after minus before."""
    sizes = shape(model)
    name = site(component, sizes)
    base, source = (values_at(model, run, [name])[name] for run in (prompts, prompts.corrupted()))
    moved = base + chosen_part(component, sizes, source - base)
    with torch.no_grad():
        after = prompts.logits(model, hooks=[(name, lambda value, hook: moved)])
        return (metric(after, prompts) - metric(prompts.logits(model), prompts)).double()


def test_a_query_that_only_a_linear_network_reads_scores_its_exact_effect(model):
    prompts = tiny.prompts(model)
    queries = [Component(2, "H", head, "W_Q") for head in range(4)]
    with linear_after_last_attention(model) as metric:
        scores = atp_star(model, prompts, metric=metric, components=queries, grad_drop=False)
        plain = attribution_patching(model, prompts, metric=metric, components=queries)
        expected = torch.stack([exact(model, prompts, query, metric) for query in queries], 1)
    assert torch.allclose(scores.per_prompt, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(plain.per_prompt, expected, rtol=1e-2, atol=1e-4), "the softmax should matter"


def test_a_key_at_one_position_scores_its_exact_effect(model):
    prompts = tiny.prompts(model)
    prompts = replace(prompts, corrupt=prompts.tokens.clone())
    rows = torch.arange(len(prompts))
    prompts.corrupt[rows, prompts.positions[:, 0]] = 7
    keys = [Component(2, "H", head, "W_K") for head in (0, 2)]
    with linear_after_last_attention(model) as metric:
        scores = atp_star(model, prompts, metric=metric, components=keys, grad_drop=False)
        expected = torch.stack([exact(model, prompts, key, metric) for key in keys], 1)
    assert torch.allclose(scores.per_prompt, expected, rtol=1e-4, atol=1e-6)


def saturated(amount):
    """GPT-2 whose head L2H0 attends to one token alone: which one depends on the query."""
    model = tiny.bridge("gpt2")
    slot = slots(model)[2, "W_Q"]
    with torch.no_grad():
        slot.view(slot.parameter)[0] *= amount
    return model


def test_behind_a_saturated_softmax_gradients_see_nothing_and_the_fix_sees_the_effect():
    model = saturated(500.0)
    prompts = tiny.prompts(model)
    query = [Component.parse("L2H0.W_Q")]
    with linear_after_last_attention(model) as metric:
        truth = exact(model, prompts, query[0], metric).abs().mean()
        plain = mean_absolute(attribution_patching(model, prompts, metric=metric, components=query))["L2H0.W_Q"]
        fixed = mean_absolute(atp_star(model, prompts, metric=metric, components=query, grad_drop=False))["L2H0.W_Q"]
        integrated = mean_absolute(
            integrated_gradients_of_activations(model, prompts, metric=metric, components=query, steps=200)
        )["L2H0.W_Q"]
    print(f"exact {truth:.4f}, attribution {plain:.2g}, AtP* {fixed:.4f}, gradients over 200 queries {integrated:.4f}")
    assert plain < 0.01 * truth
    assert fixed == pytest.approx(float(truth), rel=1e-4)
    assert integrated == pytest.approx(float(truth), rel=0.1)


def test_a_key_that_holds_all_the_attention_can_lose_it():
    """Gaps of 60 nats: beside a weight of 1 the others are 1e-26, and all there is once its score falls."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    before, after = (torch.randn(2, 4, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    before[..., 1] += 60.0
    values = torch.randn(2, 5, 2, 3, generator=generator, dtype=torch.float64)
    slope = torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64)
    before, after = before.masked_fill(hidden, -torch.inf), after.masked_fill(hidden, -torch.inf)
    slopes = torch.einsum("brhd,bthd->bhrt", slope, values.repeat_interleave(2, 2))
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for t in range(5):
        moved = before.clone()
        moved[..., t] = after[..., t]
        expected += ((moved.softmax(-1) - before.softmax(-1)) * slopes).sum((-1, -2))
    found = _key_effects(before, after, values, slope, torch.ones(2, 5, dtype=torch.bool))
    assert torch.allclose(found, expected.unflatten(1, (2, 2)).sum(-1), rtol=1e-9)


@contextmanager
def cancelling(model, prompts, width=0.05):
    """Layer 1 takes away what layer 0 changes, for small changes only: in total the slope is 0, the effect is not."""
    name = "blocks.1.hook_resid_pre"
    clean = values_at(model, prompts, [name])[name]
    seen = []

    def take_away(value, hook):
        return -width * ((seen[-1] - clean) / width).tanh()

    hooks = [(name, lambda value, hook: seen.append(value)), ("blocks.1.hook_mlp_out", take_away)]
    with model.hooks(fwd_hooks=[*hooks, ("blocks.1.hook_attn_out", lambda value, hook: torch.zeros_like(value))]):
        yield


def test_slopes_that_cancel_between_layers_are_seen_when_one_is_dropped(gpt2):
    prompts = tiny.prompts(gpt2)
    head = Component.parse("L0H1")
    with cancelling(gpt2, prompts):
        truth = float(exact(gpt2, prompts, head, logit_difference).abs().mean())
        plain = mean_absolute(attribution_patching(gpt2, prompts, components=[head]))[head]
        dropped = atp_star(gpt2, prompts, components=[head])[head]
    print(f"exact {truth:.4f}, attribution {plain:.2g}, AtP* {dropped:.4f}")
    assert plain < 1e-5
    assert 0.2 * truth < dropped < 5 * truth


def test_blocks_run_twice_and_attention_twice_more(llama):
    passes = []
    block, attention = llama.blocks[1], llama.blocks[1].attn
    handles = [block.register_forward_hook(lambda *_: passes.append("block"))]
    handles.append(attention.register_forward_hook(lambda *_: passes.append("attention")))
    try:
        atp_star(llama, tiny.prompts(llama), components=heads)
        assert sorted(passes) == ["attention"] * 2 + ["block"] * 2
        passes.clear()
        atp_star(llama, tiny.prompts(llama), components=["L1H0.W_Q"])
        assert sorted(passes) == ["attention"] * 3 + ["block"] * 2
    finally:
        for handle in handles:
            handle.remove()


def test_scores_are_sizes_with_grad_drop_and_signed_without(llama):
    prompts = tiny.prompts(llama)
    assert float(atp_star(llama, prompts).per_prompt.min()) >= 0
    assert float(atp_star(llama, prompts, grad_drop=False).tensor.min()) < 0


def test_settings_say_how_it_was_made(llama):
    scores = atp_star(llama, tiny.prompts(llama), direction="denoising", qk_fix=False, batch_size=3)
    expected = {"direction": "denoising", "qk_fix": False, "grad_drop": True, "batch_size": 3, "prompts": 6}
    assert (scores.method, scores.metric, scores.settings) == ("atp_star", "logit_difference", expected)


def test_bad_input_is_refused(llama, unchecked):
    prompts = tiny.prompts(llama)
    with left_as_it_was(llama):
        with pytest.raises(ValueError, match="expected prompts with a corrupted counterpart"):
            atp_star(llama, replace(prompts, corrupt=None))
        with pytest.raises(ValueError, match='expected direction "noising" or "denoising", got \'noise\''):
            atp_star(llama, prompts, direction="noise")
        with pytest.raises(ValueError, match="expected a batch_size of at least 1, got 0"):
            atp_star(llama, prompts, batch_size=0)
        with pytest.raises(ValueError, match="expected a metric with a gradient"):
            atp_star(llama, prompts, metric=lambda logits, prompts: logits.detach()[:, 0, 0])
