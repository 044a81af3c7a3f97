"""Numbers by hand, the same on every architecture as the plain formula."""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import tiny
import torch
from state import left_as_it_was

from mechunlearn.evaluate import text_kl
from mechunlearn.model import slots


@contextmanager
def changed(model, factor):
    """Inside, half of a matrix is `factor` times as large (Gemma 2 normalises away what the whole of it does)."""
    weight = slots(model)[1, "W_out"].parameter
    before = weight.detach().clone()
    with torch.no_grad():
        weight[: len(weight) // 2] *= factor
    try:
        yield model
    finally:
        with torch.no_grad():
            weight.copy_(before)


def saying(model, logits):
    """Inside, the model predicts this at each of two places, whatever it reads."""
    return model.hooks(fwd_hooks=[("unembed.hook_out", lambda value, hook: logits.expand(len(value), -1, -1).clone())])


def test_a_row_is_the_mean_over_its_tokens_by_hand(llama):
    """Uniform over v tokens at first; then at one place of two, token 0 has three times the odds of another."""
    text = torch.tensor([[1, 5, 6], [1, 7, 8], [1, 9, 4], [1, 4, 4]])
    task = replace(tiny.task(llama), text=text, text_test=text)
    before = torch.zeros(2, tiny.N_VOCAB)
    after = before.clone()
    after[1, 0] = math.log(3)

    @contextmanager
    def original():
        with saying(llama, before) as model:
            yield model

    with saying(llama, after):
        found = text_kl(llama, task, original=original)
        assert text_kl(llama, task, original=original, rows=3).per_example.tolist() == found.per_example[:3].tolist()
    v = tiny.N_VOCAB
    assert found.per_example.tolist() == pytest.approx([(math.log((v + 2) / v) - math.log(3) / v) / 2] * 4, abs=1e-6)
    assert (found.chance, found.unit) == (None, "nats per token")


def test_it_is_the_plain_formula_and_batches_do_not_matter(model):
    task = tiny.task(model)
    with torch.no_grad():
        before = model(task.text_test[:, :-1]).log_softmax(-1)
    with changed(model, 2), left_as_it_was(model):
        with torch.no_grad():
            after = model(task.text_test[:, :-1]).log_softmax(-1)
        found = text_kl(model, task, original=lambda: changed(model, 1 / 2))
        one = text_kl(model, task, original=lambda: changed(model, 1 / 2), batch_size=1)
    rows = torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1).mean(-1)
    assert torch.allclose(found.per_example, rows, atol=1e-5)
    assert torch.allclose(one.per_example, found.per_example, atol=1e-5)
    assert found.value > 1e-3


def test_the_original_has_none_and_a_larger_change_has_more(llama):
    task = tiny.task(llama)
    assert text_kl(llama, task, original=lambda: nullcontext(llama)).per_example.tolist() == [0.0] * 4

    def moved(factor):
        with changed(llama, factor):
            return text_kl(llama, task, original=lambda: changed(llama, 1 / factor)).value

    assert 0 < moved(1.25) < moved(2) < moved(4)


def test_without_an_original_or_with_a_broken_model_it_says_so(llama):
    task = tiny.task(llama)
    with (
        left_as_it_was(llama),
        pytest.raises(ValueError, match=r"the original model, .* by mu.evaluate.compare"),
    ):
        text_kl(llama, task)
    with pytest.raises(ValueError, match="expected finite predictions"):
        with saying(llama, torch.full((11, tiny.N_VOCAB), math.nan)):
            text_kl(llama, task, original=lambda: nullcontext(llama))
