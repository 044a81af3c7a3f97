"""The residual stream is the sum of what its sources write, and every destination reads what is said."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import tiny
import torch
from conftest import shared
from state import left_as_it_was
from torch import nn

from mechunlearn.components import sources
from mechunlearn.metrics import logit_difference
from mechunlearn.model import differentiable, edges, recording, shape
from mechunlearn.model.edge_runs import InputGradients
from mechunlearn.model.edges import (
    contributions,
    edges_of,
    head_readers,
    is_parallel,
    recording_inputs,
    recording_outputs,
)
from mechunlearn.model.norms import norm_of


@torch.no_grad()
def parts_and_whole(model, prompts):
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    with recording_outputs(model) as written, recording(model, [name]) as whole:
        prompts.logits(model)
    return contributions(model, before_norms(written())), whole[name]


def test_sources_sum_to_the_residual_stream_up_to_a_constant(model):
    """In Gemma 2 with a whole layer's heads as one source: the norm behind them is not linear."""
    prompts = tiny.prompts(model)
    (parts, whole), (_, corrupt) = parts_and_whole(model, prompts), parts_and_whole(model, prompts.corrupted())
    assert len(parts) == len(sources(shape(model)))
    for layer, block in enumerate(model.blocks):
        post, heads = dict(block.named_children()).get("ln1_post"), slice(1 + 5 * layer, 5 + 5 * layer)
        if post is not None:
            parts[heads] = post(parts[heads].sum(0)) / 4
    rest = (whole - parts.sum(0))[prompts.attention_mask]
    assert torch.allclose(rest, rest[:1].expand_as(rest), atol=1e-5), "only biases are left"
    biases = [bias for bias in (getattr(block.attn, "b_O", None) for block in model.blocks) if bias is not None]
    assert torch.allclose(rest[0], sum(biases, torch.zeros(32)).detach(), atol=1e-5)
    assert not torch.allclose(whole, corrupt, atol=1e-2)


def test_a_difference_of_runs_is_the_difference_of_their_parts(model):
    prompts = tiny.prompts(model)
    with torch.no_grad():
        with recording_outputs(model) as clean:
            prompts.logits(model)
        with recording_outputs(model) as corrupt:
            prompts.corrupted().logits(model)
    mine, its, mask = corrupt(), clean(), prompts.attention_mask
    found = contributions(model, before_norms(mine.minus(its, mask)))
    ends = [contributions(model, before_norms(outputs)) for outputs in (mine, its)]
    assert torch.allclose(found, (ends[0] - ends[1]) * mask[..., None], atol=1e-5)
    rows, places = slice(1, 3), slice(2, 5)
    difference = mine.minus(its, mask)
    some = contributions(model, difference.at(rows, places))
    assert torch.allclose(some, contributions(model, difference)[:, rows, places], atol=1e-6)


def before_norms(outputs):
    return replace(outputs, attention={})


def test_gradients_of_inputs_are_autograds_through_the_models_own_norm(model):
    """Each head's copy: the vector-Jacobian product of ln1 at the residual, of W_Q (W_K, W_V) times the gradient."""
    prompts = tiny.prompts(model)
    with differentiable(model), recording_inputs(model) as read:
        values = logit_difference(prompts.logits(model, hooks=[("blocks.0.hook_resid_pre", leaf)]), prompts)
    with differentiable(model):
        found = torch.autograd.grad(values.sum(), read[0].tensors())
        gradients = InputGradients(model, prompts.attention_mask)
        gradients.add(read[0], found)
        whole = slice(None)
        for layer in range(3):
            expected = []
            for i, matrix in enumerate(("W_Q", "W_K", "W_V")):
                slot = gradients.slots[layer, matrix]
                upstream = found[3 * layer + i] * prompts.attention_mask[..., None, None]
                after = torch.einsum("bpuw,uwd->ubpd", upstream, slot.view(slot.parameter.detach()))
                residual = read[0].residuals[layer].clone().requires_grad_(True)
                normed = model.blocks[layer].ln1(residual)
                expected += [torch.autograd.grad(normed, residual, one, retain_graph=True)[0] for one in after]
            result = gradients.at_heads(layer, whole, whole)
            assert len(head_readers(layer, shape(model))) == len(expected)
            assert torch.allclose(result, torch.stack(expected), atol=1e-5)


def leaf(residual, hook):
    return residual.detach().clone().requires_grad_(True)


def test_the_cfg_tells_the_truth_about_parallel_blocks(model):
    """By gradient: does what attention writes change what the MLP of its own layer reads?"""
    prompts = tiny.prompts(model)
    read = []

    def move(value, hook):
        return value + amount

    with differentiable(model):
        amount = torch.zeros((), requires_grad=True)
        handle = model.blocks[1].ln2.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
        try:
            prompts.logits(model, hooks=[("blocks.1.attn.hook_z", move)])
        finally:
            handle.remove()
        feeds = read[0].requires_grad and bool(torch.autograd.grad(read[0].square().sum(), amount)[0])
    assert is_parallel(model) == (not feeds)


def test_an_mlp_and_the_logits_get_copies_of_their_own(model):
    prompts = tiny.prompts(model)
    with differentiable(model), recording_inputs(model) as read:
        values = logit_difference(prompts.logits(model, hooks=[("blocks.0.hook_resid_pre", leaf)]), prompts)
        last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        assert last in model.hook_dict
    tensors = [*read[0].mlps, read[0].logits]
    found = torch.autograd.grad(values.sum(), tensors)
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    assert all(float(gradient.abs().max()) > 0 for gradient in found)


def test_the_norm_found_by_probing_is_the_modules(model):
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    for module in (model.blocks[1].ln1, model.blocks[2].ln2, model.ln_final):
        norm = norm_of(module, model)
        direction, scale = norm.direction_and_scale(x)
        with torch.no_grad():
            bias = module(torch.zeros_like(x)) if norm.centred else 0.0
            assert torch.allclose(direction * norm.weight + bias, module(x), atol=1e-4)
        assert torch.allclose(norm.numerator(x) / scale, direction * norm.weight, atol=1e-6)
        y = torch.randn(32, generator=torch.Generator().manual_seed(1))
        assert torch.allclose((norm.numerator(x) * y).sum(-1), (x * norm.numerator_transposed(y)).sum(-1), atol=1e-4), (
            "transposes"
        )


def test_a_module_that_is_no_norm_is_refused():
    with pytest.raises(ValueError, match="expected a LayerNorm or an RMSNorm with eps 1e-05, got a Linear"):
        norm_of(nn.Linear(32, 32), tiny.bridge("gpt2"))
    with pytest.raises(ValueError, match=r"expected a LayerNorm or an RMSNorm with eps 1e-05, got a LayerNorm"):
        norm_of(nn.LayerNorm(32, eps=0.1), tiny.bridge("gpt2"))


@contextmanager
def unchecked_model(model):
    edges._checked.discard(model)
    try:
        yield
    finally:
        edges._checked.discard(model)


def test_the_check_of_sums_leaves_the_model_as_it_was(model):
    with unchecked_model(model), left_as_it_was(model):
        edges_of(model)


def test_a_cfg_that_lies_about_parallel_blocks_is_found_out(architecture):
    """On a bridge; a HookedTransformer does what its cfg says."""
    model = shared("bridge", architecture)
    real = is_parallel(model)
    with unchecked_model(model):
        model.cfg.parallel_attn_mlp = not real
        try:
            said = "sequential" if real else "parallel"
            with pytest.raises(ValueError, match=f"expected a model whose residual stream .* block 0 is not {said}"):
                edges_of(model)
        finally:
            model.cfg.parallel_attn_mlp = real


def test_a_model_that_is_not_the_sum_of_its_parts_is_refused():
    model = tiny.bridge("llama")
    module = model.blocks[1].mlp
    handle = model.blocks[1].register_forward_hook(lambda m, i, output: doubled(output))
    try:
        with (
            left_as_it_was(model),
            pytest.raises(ValueError, match="expected a model whose residual stream is the sum"),
        ):
            edges_of(model)
    finally:
        handle.remove()
    assert module is model.blocks[1].mlp


def doubled(output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output
