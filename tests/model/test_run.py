import pytest
import tiny
import torch
from state import left_as_it_was

from mechunlearn.model import fingerprint, logits_at, preserved, recording, slots
from mechunlearn.model.running import residual_before, running_from

TOKENS = torch.randint(4, tiny.N_VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.arange(9)[None] < torch.tensor([[9], [6], [4]])


def full(model, tokens=TOKENS, mask=MASK):
    with preserved(model), torch.no_grad():
        return logits_at(model, tokens, mask)


def test_left_and_right_padding_give_the_same_logits(model):
    left_tokens, left_mask = TOKENS.clone(), MASK.clone()
    for row, length in enumerate((9, 6, 4)):
        left_tokens[row] = TOKENS[row].roll(9 - length)
        left_mask[row] = MASK[row].roll(9 - length)
    right, left = full(model), full(model, left_tokens, left_mask)
    for row, length in enumerate((9, 6, 4)):
        assert torch.allclose(right[row, :length], left[row, 9 - length :], atol=1e-5)


def test_padding_content_does_not_matter(model):
    other = torch.where(MASK, TOKENS, 7)
    assert torch.allclose(full(model)[MASK], full(model, other)[MASK], atol=1e-6)


def test_logits_at_positions_are_those_of_the_full_pass(model):
    places = torch.tensor([[8, 3], [5, 0], [3, 1]])
    with preserved(model), torch.no_grad():
        some = logits_at(model, TOKENS, MASK, places)
    assert torch.allclose(some, full(model)[torch.arange(3)[:, None], places], atol=1e-6)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_run_from_a_layer_equals_the_full_run(model, layer):
    with preserved(model), torch.no_grad():
        residual = residual_before(model, layer, TOKENS, MASK)
        with running_from(model, layer, residual):
            suffix = logits_at(model, TOKENS, MASK)
    assert torch.equal(suffix[MASK], full(model)[MASK])


def test_a_run_from_a_layer_skips_the_layers_below(model):
    with preserved(model), torch.no_grad():
        residual = residual_before(model, 2, TOKENS, MASK)
        slot = slots(model)[0, "W_out"]
        saved = slot.parameter.detach().clone()
        slot.parameter.zero_()
        with running_from(model, 2, residual):
            suffix = logits_at(model, TOKENS, MASK)
        slot.parameter.copy_(saved)
    assert torch.equal(suffix[MASK], full(model)[MASK])


def test_gradients_reach_an_injected_residual(model):
    with preserved(model):
        residual = residual_before(model, 1, TOKENS, MASK).requires_grad_(True)
        with running_from(model, 1, residual):
            gradient = torch.autograd.grad(logits_at(model, TOKENS, MASK)[:, -1].sum(), residual)[0]
    assert gradient.abs().sum() > 0


def test_runs_leave_the_model_as_it_was(model):
    with left_as_it_was(model), preserved(model):
        residual = residual_before(model, 2, TOKENS, MASK)
        with running_from(model, 2, residual):
            logits_at(model, TOKENS, MASK, torch.zeros(3, 1, dtype=torch.long))


def test_an_interrupt_inside_a_run_leaves_the_model_as_it_was(model):
    def interrupt(value, hook):
        raise KeyboardInterrupt

    with left_as_it_was(model), pytest.raises(KeyboardInterrupt), preserved(model):
        residual = residual_before(model, 1, TOKENS, MASK)
        with running_from(model, 1, residual):
            logits_at(model, TOKENS, MASK, MASK[:, :1].long(), hooks=[("blocks.2.hook_mlp_out", interrupt)])


def test_a_users_own_hooks_survive(model):
    calls = []

    def count(value, hook):
        calls.append(1)

    model.add_hook("blocks.1.hook_mlp_out", count)
    try:
        with left_as_it_was(model), preserved(model), recording(model, ["blocks.1.hook_mlp_out"]):
            logits_at(model, TOKENS, MASK)
        assert calls == [1]
    finally:
        model.reset_hooks()


def test_a_hook_that_does_not_fire_is_an_error(model):
    with pytest.raises(RuntimeError, match=r"expected every hook to fire, but blocks.0.hook_mlp_out"):
        with preserved(model), recording(model, ["blocks.0.hook_mlp_out"]):
            pass


def test_preserved_restores_modes_flags_and_gradients(model):
    parameter = slots(model)[0, "W_in"].parameter
    parameter.grad = torch.ones_like(parameter)
    try:
        with left_as_it_was(model), pytest.raises(KeyboardInterrupt), preserved(model):
            assert parameter.grad is None
            assert not parameter.requires_grad
            raise KeyboardInterrupt
    finally:
        parameter.grad = None


def test_the_fingerprint_sees_every_weight(model):
    before = fingerprint(model)
    for slot in slots(model).values():
        with torch.no_grad():
            view = slot.view(slot.parameter)
            saved = view[-1, -1, -1].clone()
            view[-1, -1, -1] += 1e-3
            assert fingerprint(model) != before, slot
            view[-1, -1, -1] = saved
    assert fingerprint(model) == before


def test_the_fingerprint_sees_an_exchange_of_two_weights(llama):
    before = fingerprint(llama)
    slot = slots(llama)[1, "W_in"]
    with torch.no_grad():
        saved = slot.parameter.detach().clone()
        slot.parameter.copy_(saved.flip(0))
        exchanged = fingerprint(llama)
        slot.parameter.copy_(saved)
    assert exchanged != before


def test_a_users_own_forward_of_a_block_survives():
    model = tiny.bridge("llama")
    own = model.blocks[0].forward

    def patched(*arguments, **options):
        return own(*arguments, **options)

    model.blocks[0].__dict__["forward"] = patched
    with preserved(model), torch.no_grad(), running_from(model, 1, residual_before(model, 1, TOKENS, MASK)):
        logits_at(model, TOKENS, MASK)
    assert model.blocks[0].__dict__["forward"] is patched


def test_the_fingerprint_sees_a_change_of_every_sign():
    model = tiny.bridge("gpt2").to(torch.float64)
    before = fingerprint(model)
    with torch.no_grad():
        slots(model)[1, "W_in"].parameter.neg_()
    assert fingerprint(model) != before
