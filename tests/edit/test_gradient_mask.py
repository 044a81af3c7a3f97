import pytest
import tiny
import torch
from state import left_as_it_was, state

import mechunlearn as mu
from mechunlearn.edit import gradient_mask
from mechunlearn.model import logits_at
from mechunlearn.weights import read, select

MASKS = (["L1H2"], ["L0H3.W_K", "L2H0.W_V"], ["L1MLP"], ["L2N3", "L2N60"], ["L0ATTN", "L1MLP.W_out"], ["L1H0.W_Q"])
TOKENS = torch.randint(4, tiny.N_VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def loss(model):
    logits = logits_at(model, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def outside_changes(model, before, mask):
    """Names of parameters of which an entry that the mask does not cover has changed.

    GPT-2's dead fused qkv shares its storage with q, k and v, which are looked at themselves.
    """
    inside = {id(e.slot.parameter): e for e in select(model, mask)}
    storages = {e.slot.parameter.untyped_storage().data_ptr() for e in inside.values()}
    changed = []
    for name, parameter in model.named_parameters():
        moved = parameter.detach() != before["weights"][name]
        if id(parameter) not in inside and "qkv" in name and parameter.untyped_storage().data_ptr() in storages:
            continue
        if id(parameter) in inside:
            e = inside[id(parameter)]
            moved = e.slot.view(moved)[~e.units]
        if bool(moved.any()):
            changed.append(name)
    return changed


@pytest.mark.parametrize("labels", MASKS, ids=lambda labels: "+".join(labels))
def test_only_masked_entries_move_whatever_the_optimizer_does(model, labels):
    mask = mu.ComponentMask.of(labels, mu.shape(model))
    before = state(model)
    stale = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with gradient_mask(model, mask) as training:
        original = read(training.entries)
        for parameter in model.parameters():  # momentum from an earlier, unmasked training
            stale.state[parameter] = {
                "step": torch.tensor(5.0),
                "exp_avg": torch.ones_like(parameter),
                "exp_avg_sq": torch.ones_like(parameter),
            }
        for _ in range(3):
            stale.zero_grad()
            loss(model).backward()
            stale.step()
            assert outside_changes(model, before, mask) == []
        assert all((read(training.entries)[label] != original[label]).all() for label in original)
        inside = training.edit()
    after = state(model)
    assert all(torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"])
    edit = training.edit()
    assert all(torch.equal(edit.values[label], inside.values[label]) for label in edit.values)
    assert edit.n_parameters == mask.n_parameters


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_torch_optimizer_is_held(llama, make):
    mask = mu.ComponentMask.of(["L1H2"], mu.shape(llama))
    before = state(llama)
    with gradient_mask(llama, mask) as training:
        optimizer = make(training.parameters, lr=1e-2, weight_decay=0.1)
        loss(llama).backward()
        optimizer.step()
        assert outside_changes(llama, before, mask) == []


def test_inside_only_masked_parameters_require_a_gradient(model):
    mask = mu.ComponentMask.of(["L1H2", "L0MLP"], mu.shape(model))
    with left_as_it_was(model), gradient_mask(model, mask) as training:
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for p in trainable} == {id(p) for p in training.parameters}
        loss(model).backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        for e in training.entries:
            gradient = e.slot.view(e.slot.parameter.grad)
            assert (gradient[~e.units] == 0).all()
            assert (gradient[e.units] != 0).any()


def test_the_masked_gradient_is_the_true_gradient(llama):
    slot = select(llama, mu.ComponentMask.of(["L1MLP.W_in"], mu.shape(llama)))[0].slot
    expected = torch.autograd.grad(loss(llama), slot.parameter)[0]
    with gradient_mask(llama, mu.ComponentMask.of(["L1N3", "L1N9"], mu.shape(llama))):
        loss(llama).backward()
        assert torch.equal(slot.view(slot.parameter.grad)[[3, 9]], slot.view(expected)[[3, 9]])


def test_an_interrupt_in_a_users_loop_leaves_the_model_as_it_was_and_loses_nothing(model):
    mask = mu.ComponentMask.of(["L1H2"], mu.shape(model))
    with left_as_it_was(model), pytest.raises(KeyboardInterrupt), gradient_mask(model, mask) as training:
        loss(model).backward()
        torch.optim.SGD(training.parameters, lr=1e-2).step()
        inside = training.edit()
        raise KeyboardInterrupt
    assert all(torch.equal(training.edit().values[label], value) for label, value in inside.values.items())


def test_the_edit_is_the_trained_model(llama):
    mask = mu.ComponentMask.of(["L1H2"], mu.shape(llama))
    with left_as_it_was(llama), gradient_mask(llama, mask) as training:
        loss(llama).backward()
        torch.optim.SGD(training.parameters, lr=1e-1).step()
        trained = loss(llama).item()
    edit = training.edit(note="by hand")
    assert loss(llama).item() != trained
    with left_as_it_was(llama), edit.applied(llama):
        assert loss(llama).item() == trained
    assert edit.provenance == {"editor": "gradient_mask", "note": "by hand"}


def test_a_model_cannot_be_trained_twice_at_once(model):
    outer = mu.ComponentMask.of(["L1H2"], mu.shape(model))
    message = "expected a model that is not being trained.*leave that first"
    with left_as_it_was(model), gradient_mask(model, outer):
        with pytest.raises(ValueError, match=message), gradient_mask(model, outer):
            pass
        with pytest.raises(ValueError, match=message):
            mu.edit.finetune(model, tiny.task(model), outer, steps=1, progress=False)
    with gradient_mask(model, outer):
        pass
