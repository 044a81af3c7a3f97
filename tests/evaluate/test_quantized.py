"""Rounded weights: the numbers of bitsandbytes, the layout of every model, and an edit that is rounded away."""

import sys

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.evaluate.attacks.weights import quantized
from mechunlearn.weights import read, select
from mechunlearn.weights.rounding import (
    as_linear,
    bitsandbytes_int8,
    bitsandbytes_nf4,
    every_entry,
    from_linear,
    int4,
    int8,
    int8_of_half,
    nf4,
    rewritten,
    roundings_on,
)


def gaussian(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_int4_by_hand():
    """The first row's step is 1; 0.6 is nearest to 1 and -3.4 to -3. A row of zeros stays."""
    weight = torch.tensor([[7.0, -3.4, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0], [0.7, -0.34, 0.06, -0.7]])
    expected = torch.tensor([[7.0, -3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.7, -0.3, 0.1, -0.7]])
    assert torch.allclose(int4(weight), expected, atol=1e-6)


def test_int8_by_hand():
    weight = torch.tensor([[127.0, 1.4, -1.6], [12.7, 0.16, 0.0]])
    assert torch.allclose(int8(weight), torch.tensor([[127.0, 1.0, -2.0], [12.7, 0.2, 0.0]]), atol=1e-5)


def test_nf4_by_hand():
    """Two blocks of two, the second of them twice as large: 0.04 lies above 0.0398, halfway from 0 to 0.0796."""
    weight = torch.tensor([[1.0, 0.04], [2.0, 0.079]])
    expected = torch.tensor([[1.0, 0.07958029955625534], [2.0, 0.0]])
    assert torch.equal(nf4(weight, block=2), expected)
    assert torch.equal(nf4(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nf4_is_that_of_bitsandbytes_bit_for_bit(dtype):
    pytest.importorskip("bitsandbytes")
    weight = gaussian(96, 128, dtype=dtype)
    assert torch.equal(nf4(weight), bitsandbytes_nf4(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_is_that_of_bitsandbytes_bit_for_bit(dtype):
    """It takes half precision."""
    pytest.importorskip("bitsandbytes")
    weight = gaussian(96, 128, dtype=dtype)
    assert torch.equal(int8_of_half(weight), bitsandbytes_int8(weight))
    functional = pytest.importorskip("bitsandbytes.functional")
    steps, top, _ = functional.int8_vectorwise_quant(weight.float())
    assert torch.equal(int8(weight.float()), functional.int8_vectorwise_dequant(steps, top))


def test_bitsandbytes_rounds_where_there_is_a_gpu():
    """That a default is chosen by device needs none; what it computes is run on CPU above and below."""
    pytest.importorskip("bitsandbytes")
    on_gpu = roundings_on(torch.device("cuda", 0))
    chosen = {"int8, bitsandbytes": bitsandbytes_int8, "int4": int4, "nf4, bitsandbytes": bitsandbytes_nf4}
    assert on_gpu == chosen
    assert roundings_on(torch.device("cpu")) == {"int8": int8_of_half, "int4": int4, "nf4": nf4}


def test_without_bitsandbytes_the_arithmetic_is_ours_and_its_functions_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(sys.modules[roundings_on.__module__], "find_spec", lambda name: None)
    assert roundings_on(torch.device("cuda", 0)) == {"int8": int8_of_half, "int4": int4, "nf4": nf4}
    for rounding in (bitsandbytes_int8, bitsandbytes_nf4):
        with pytest.raises(ImportError, match=r"mechunlearn\[bitsandbytes\]"):
            rounding(gaussian(4, 64))


def test_the_numbers_of_bitsandbytes_go_through_the_attack(llama):
    pytest.importorskip("bitsandbytes")
    task = tiny.task(llama)
    with left_as_it_was(llama):
        theirs = quantized(llama, task, roundings=roundings_on(torch.device("cuda"))).curve
    ours = quantized(llama, task).curve
    assert theirs is not None
    assert ours is not None
    assert theirs.points == ("float32", "int8, bitsandbytes", "int4", "nf4, bitsandbytes")
    assert torch.equal(theirs.per_prompt, ours.per_prompt)


@pytest.mark.parametrize("rounding", [int8, int4, nf4])
def test_rounding_twice_is_rounding_once(rounding):
    """Up to the last bit of the scale."""
    once = rounding(gaussian(8, 64))
    assert torch.allclose(rounding(once), once, rtol=1e-6, atol=0)
    assert not torch.equal(once, gaussian(8, 64))


def test_every_matrix_is_seen_as_a_linear_layer_has_it_and_back(model):
    sizes = mu.shape(model)
    for e in every_entry(model):
        weight = as_linear(e)
        heads = e.slot.units * (sizes.d_head if e.slot.matrix in ("W_Q", "W_K", "W_V", "W_O") else 1)
        writes = e.slot.matrix in ("W_O", "W_out")
        assert weight.shape == ((sizes.d_model, heads) if writes else (heads, sizes.d_model))
        assert torch.equal(from_linear(e, weight), e.read(e.slot.parameter.detach()))
    assert len(every_entry(model)) == sizes.n_layers * len(sizes.matrices)


def test_rows_are_those_of_the_checkpoint(llama, gpt2):
    """`nn.Linear` has them as they are, GPT-2's Conv1D transposed, as bitsandbytes takes it."""
    of_llama, of_gpt2 = ({e.label: as_linear(e) for e in every_entry(model)} for model in (llama, gpt2))
    assert torch.equal(of_llama["L1.W_Q"], llama.blocks[1].attn.q.weight)
    assert torch.equal(of_llama["L1.W_O"], llama.blocks[1].attn.o.weight)
    assert torch.equal(of_llama["L1.W_out"], llama.blocks[1].mlp.out.weight)
    assert torch.equal(of_gpt2["L1.W_in"], getattr(gpt2.blocks[1].mlp, "in").weight.T)


def test_the_curve_has_the_model_as_it_is_and_each_rounding(model):
    task = tiny.task(model)
    with left_as_it_was(model):
        found = quantized(model, task)
    assert found.curve is not None
    assert found.curve.points == ("float32", "int8", "int4", "nf4")
    plain = mu.evaluate.accuracy(model, task.formats["trained prompt"].forget).probability
    assert torch.allclose(found.curve.per_prompt[:, 0], plain.per_example, atol=1e-5)
    distance = (found.curve.per_prompt - found.curve.per_prompt[:, :1]).abs().mean(0)
    assert 0 < float(distance[1]) < float(distance[2])
    assert found.value == pytest.approx(float(found.curve.mean.max()))


def test_an_edit_within_half_a_step_is_rounded_away(llama):
    """All but each row's largest weight are put 0.4 steps from their rounded values, so int4 sees no edit."""
    task, mask = tiny.task(llama), mu.ComponentMask.of(["L1MLP"], mu.shape(llama))
    entries = select(llama, mask)
    original = read(entries)
    values = {}
    for e in entries:
        weight = as_linear(e)
        top = weight.abs().amax(1, keepdim=True)
        inward = int4(weight) - 0.4 * top / 7 * torch.sign(int4(weight))
        values[e.label] = from_linear(e, torch.where(weight.abs() < top, inward, weight))
    edit = mu.Edit(mask, values, mu.fingerprint(llama))
    before = quantized(llama, task, roundings={"int4": int4}).curve
    with edit.applied(llama):
        after = quantized(llama, task, roundings={"int4": int4}).curve
    assert before is not None
    assert after is not None
    assert not torch.allclose(before.per_prompt[:, 0], after.per_prompt[:, 0], atol=1e-3)
    assert torch.allclose(before.per_prompt[:, 1], after.per_prompt[:, 1], atol=1e-6)
    assert all(torch.equal(original[label], value) for label, value in read(entries).items())


def test_a_rounding_that_fails_half_way_leaves_no_trace(llama):
    seen = []

    def failing(weight):
        seen.append(weight)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return weight + 1

    with left_as_it_was(llama), pytest.raises(KeyboardInterrupt):
        quantized(llama, tiny.task(llama), roundings={"failing": failing})


def test_a_model_that_is_being_trained_is_not_rewritten(llama):
    with (
        rewritten(llama, every_entry(llama), lambda e: e.read(e.slot.parameter.detach())),
        pytest.raises(ValueError, match="expected a model that is not being trained"),
    ):
        quantized(llama, tiny.task(llama))
