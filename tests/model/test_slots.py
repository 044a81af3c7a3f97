from itertools import pairwise

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import Component, layers, matrices
from mechunlearn.model import logits_at, preserved, shape, slots

TOKENS = torch.randint(4, tiny.N_VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS, dtype=torch.bool)


def with_zeroed(model, layer, matrix, unit):
    slot = slots(model)[layer, matrix]
    with preserved(model), torch.no_grad():
        place = slot.view(slot.parameter)[unit]
        saved = place.clone()
        place.zero_()
        logits = logits_at(model, TOKENS, MASK)
        place.copy_(saved)
    return logits


def with_hook(model, name, unit):
    def zero(value, hook):
        value = value.clone()
        value[:, :, unit] = 0.0
        return value

    with preserved(model), torch.no_grad():
        return logits_at(model, TOKENS, MASK, hooks=[(name, zero)])


def untouched(model):
    with preserved(model), torch.no_grad():
        return logits_at(model, TOKENS, MASK)


@pytest.mark.parametrize("head", range(4))
def test_zeroing_a_slice_of_w_o_is_zeroing_z(model, head):
    for layer in range(3):
        zeroed = with_zeroed(model, layer, "W_O", head)
        assert torch.equal(zeroed, with_hook(model, f"blocks.{layer}.attn.hook_z", head))
        assert not torch.allclose(zeroed, untouched(model), atol=1e-3)


@pytest.mark.parametrize("neuron", [0, 17, 63])
def test_zeroing_a_row_of_w_out_is_zeroing_the_neuron(model, neuron):
    zeroed = with_zeroed(model, 1, "W_out", neuron)
    hooked = with_hook(model, "blocks.1.mlp.hook_post", neuron)
    assert torch.allclose(zeroed, hooked, atol=1e-6)
    assert not torch.allclose(zeroed, untouched(model), atol=1e-4)


@pytest.mark.parametrize(("matrix", "site"), [("W_Q", "q"), ("W_K", "k"), ("W_V", "v")])
def test_zeroing_a_slice_of_q_k_v_cuts_that_head_off_from_its_input(model, matrix, site):
    unit = shape(model).units(matrix) - 1
    seen = {}

    def look(value, hook):
        seen[site] = value[:, :, unit].clone()

    slot = slots(model)[1, matrix]
    with preserved(model), torch.no_grad():
        place = slot.view(slot.parameter)[unit]
        saved = place.clone()
        place.zero_()
        logits_at(model, TOKENS, MASK, hooks=[(f"blocks.1.attn.hook_{site}", look)])
        place.copy_(saved)
    assert torch.equal(seen[site], seen[site][:1, :1].expand_as(seen[site])), "input still reaches the head"


def test_views_write_through_to_the_parameter(model):
    for slot in slots(model).values():
        view = slot.view(slot.parameter.detach())
        assert view.shape[0] == slot.units
        assert view.shape[-1] == shape(model).d_model
        assert view.untyped_storage().data_ptr() == slot.parameter.untyped_storage().data_ptr()
        assert view.numel() == slot.parameter.numel()


def test_slots_are_all_attention_and_mlp_weights_each_once(architecture, model):
    parameters = [slot.parameter for slot in slots(model).values()]
    assert len({id(p) for p in parameters}) == len(parameters)
    places = sorted((p.data_ptr(), p.numel() * p.element_size()) for p in parameters if p.is_contiguous())
    assert all(start + size <= after for (start, size), (after, _) in pairwise(places))


def test_components_cover_as_many_weights_as_the_checkpoint_has(architecture):
    checkpoint = tiny.huggingface(architecture)
    blocks = [p for name, p in checkpoint.named_parameters() if p.ndim == 2 and (".layers." in name or ".h." in name)]
    sizes = shape(tiny.bridge(architecture))
    assert sizes.n_parameters(layers(sizes)) == sum(p.numel() for p in blocks)
    assert sizes.n_parameters(matrices(sizes)) == sum(p.numel() for p in blocks)
    assert sum(sizes.n_parameters([component]) for component in matrices(sizes)) == sum(p.numel() for p in blocks)


def test_an_edit_of_everything_leaves_biases_norms_and_embeddings(model):
    edit = mu.edit.finetune(model, tiny.task(model), mu.localize.everything(model), steps=1, progress=False)
    inside = {slot.parameter.untyped_storage().data_ptr() for slot in slots(model).values()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with edit.applied(model):
        for name, parameter in model.named_parameters():
            if parameter.untyped_storage().data_ptr() not in inside:
                assert torch.equal(parameter, before[name]), name
            else:
                assert parameter.ndim > 1
    assert any("ln" in name or "norm" in name for name in before)


def test_query_heads_of_one_group_share_keys_and_values(llama):
    sizes = shape(llama)
    together = sizes.n_parameters([Component.parse("L1H2"), Component.parse("L1H3")])
    apart = sizes.n_parameters([Component.parse("L1H1"), Component.parse("L1H2")])
    one_slice = sizes.unit_parameters("W_K")
    assert together == 6 * one_slice
    assert apart == 8 * one_slice
    assert sizes.n_parameters([Component.parse("L1H2.W_K"), Component.parse("L1H3.W_K")]) == one_slice


def test_looking_at_slots_changes_nothing(model):
    with left_as_it_was(model):
        slots(model)
        untouched(model)
