"""MLP keys and values, against what the weights say."""

import pytest
import tiny
import torch
from state import left_as_it_was

from mechunlearn.model import logits_at, slots
from mechunlearn.model.mlp_values import adding_to_mlp, before_post_norm, key_moments, mlp_values
from mechunlearn.model.running import residual_after


def some_prompts(model):
    prompts = tiny.prompts(model)
    places = (prompts.subject * torch.arange(prompts.tokens.shape[1])).argmax(1)
    return prompts.tokens, prompts.attention_mask, places


def leaving(model, layer, tokens, mask, places):
    with torch.no_grad():
        return residual_after(model, layer, tokens, mask)[torch.arange(len(tokens)), places]


def test_the_output_is_the_key_times_w_out_and_a_bias(model):
    with left_as_it_was(model):
        found = mlp_values(model, [0, 2], *some_prompts(model))
    for layer in (0, 2):
        slot = slots(model)[layer, "W_out"]
        rest = found.outputs[layer] - found.keys[layer] @ slot.view(slot.parameter.detach())[:, 0]
        assert torch.allclose(rest, rest[:1].expand_as(rest), atol=1e-5)
        assert (float(rest.abs().max()) > 1e-3) == (not model.cfg.gated_mlp)  # GPT-2 and NeoX have one
        assert found.keys[layer].abs().max() > 1e-3


def test_the_residual_is_the_one_that_leaves_the_highest_layer(model):
    tokens, mask, places = some_prompts(model)
    residuals = []
    hook = ("blocks.1.hook_resid_post", lambda value, hook: residuals.append(value))
    logits_at(model, tokens, mask, hooks=[hook])
    found = mlp_values(model, [0, 1], tokens, mask, places).residual
    assert torch.allclose(found, residuals[0][torch.arange(len(tokens)), places], atol=1e-5)


def test_what_is_added_moves_the_residual_at_the_place_alone(model):
    tokens, mask, places = some_prompts(model)
    value = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = residual_after(model, 1, tokens, mask)
        with left_as_it_was(model):
            with adding_to_mlp(model, 1, places, value):
                after = residual_after(model, 1, tokens, mask)
    moved = after - before
    at = torch.arange(tokens.shape[1]) == places[:, None]
    assert moved[~at & mask].abs().max() == 0.0
    norm = getattr(model.blocks[1], "ln2_post", None)
    if norm is None:
        expected = value.expand(len(tokens), -1)
    else:
        outputs = mlp_values(model, [1], tokens, mask, places).outputs[1]
        expected = (norm((outputs + value)[:, None]) - norm(outputs[:, None]))[:, 0].detach()
    assert torch.allclose(moved[at], expected, atol=1e-5)


def test_a_small_move_of_the_residual_is_taken_back_through_a_post_norm(model):
    tokens, mask, places = some_prompts(model)
    outputs = mlp_values(model, [1], tokens, mask, places).outputs[1]
    wanted = 1e-3 * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
    move = before_post_norm(model, 1, outputs, wanted)
    before = leaving(model, 1, tokens, mask, places)
    for row in range(len(tokens)):
        with adding_to_mlp(model, 1, places, move[row]):
            got = (leaving(model, 1, tokens, mask, places) - before)[row]
        if getattr(model.blocks[1], "ln2_post", None) is None:
            assert torch.allclose(got, wanted[row], atol=1e-5)
        else:  # its length is fixed by the norm, which a linear map does not know
            assert torch.cosine_similarity(got, wanted[row], dim=0) > 0.9


def test_moments_are_sums_over_all_real_tokens(model):
    tokens, mask, _ = some_prompts(model)
    with left_as_it_was(model):
        found = key_moments(model, [1], tokens, mask)
    second, fourth = torch.zeros(()), 0.0
    for place in range(tokens.shape[1]):
        keys = mlp_values(model, [1], tokens, mask, torch.full((len(tokens),), place)).keys[1]
        for key in keys[mask[:, place]]:
            second = second + torch.outer(key, key)
            fourth += float(key @ key) ** 2
    assert not mask.all()
    assert torch.allclose(found[1][0], second, atol=1e-4)
    assert float(found[1][1]) == pytest.approx(fourth, rel=1e-5)
