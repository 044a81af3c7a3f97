"""What comes after an edit on a real pretrained model: attacks, probes, generation, files, another process, export."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from state import left_as_it_was

import mechunlearn as mu

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def edit(smol: Any, capitals: mu.Task) -> mu.Edit:
    where = mu.ComponentMask.of(["L28MLP", "L29MLP"], mu.shape(smol))
    options: dict[str, Any] = {"batch_size": 6, "text_batch_size": 1, "learning_rate": 2e-4, "progress": False}
    return mu.edit.finetune(smol, capitals, where, steps=4, **options)


def test_relearning_runs_on_the_edited_model_and_puts_it_back(smol: Any, capitals: mu.Task, edit: mu.Edit):
    with left_as_it_was(smol):
        with edit.applied(smol):
            found = mu.evaluate.relearn(
                smol, capitals, learning_rates=(3e-5,), steps=2, batch_size=4, metric=mu.metrics.answer_probability
            )
    assert 0.0 <= found.value <= 1.0
    assert found.curve is not None


def test_the_attribute_is_read_off_by_probes(smol: Any, capitals: mu.Task):
    with left_as_it_was(smol):
        found = mu.evaluate.lens_extraction(smol, capitals)
    assert torch.isfinite(found.per_example).all()


def test_the_chat_template_is_answered_in_words_and_has_one_opening(smol: Any, capitals: mu.Task):
    chat = capitals.formats["chat"].forget
    assert (chat.tokens == smol.tokenizer.bos_token_id).sum(1).tolist() == [3] * len(chat), "a turn each begins with it"
    with left_as_it_was(smol):
        texts = mu.evaluate.continuations(smol, chat[:3], 3)
    answers = mu.tasks.building.answer_texts(smol, chat[:3])
    assert all(mu.evaluate.says(text, answer) for text, answer in zip(texts, answers, strict=True))


PROCESS = """
import sys, torch, mechunlearn as mu
model = mu.testbed.smollm2()
edit = mu.Edit.load(sys.argv[1])
edit.apply(model)
tokens = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(tokens), sys.argv[3])
"""


def test_a_saved_edit_gives_the_same_logits_in_another_process(
    smol: Any, capitals: mu.Task, edit: mu.Edit, tmp_path: Path
):
    tokens = capitals.forget.tokens[:1]
    files = [str(tmp_path / name) for name in ("edit.safetensors", "tokens.pt", "logits.pt")]
    edit.save(files[0])
    torch.save(tokens, files[1])
    subprocess.run([sys.executable, "-P", "-c", PROCESS, *files], check=True, env={**os.environ}, timeout=300)
    with edit.applied(smol), torch.no_grad():
        expected = smol(tokens)
    torch.testing.assert_close(torch.load(files[2], weights_only=True), expected, atol=1e-5, rtol=0.0)


def test_the_edited_model_is_exported_as_a_plain_checkpoint(
    smol: Any, capitals: mu.Task, edit: mu.Edit, tmp_path: Path
):
    from transformers import AutoModelForCausalLM

    tokens = capitals.forget.tokens[:1]
    with edit.applied(smol), torch.no_grad():
        mu.model.save_huggingface(smol, tmp_path / "edited")
        expected = smol(tokens)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert not hasattr(loaded.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, expected, atol=1e-4, rtol=0.0)


def test_an_edit_is_trained_in_bfloat16_too(in_bfloat16: Any, capitals: mu.Task):
    model, where = in_bfloat16, mu.ComponentMask.of(["L29MLP"], mu.shape(in_bfloat16))
    with left_as_it_was(model):
        options: dict[str, Any] = {"batch_size": 2, "text_batch_size": 1, "progress": False}
        edit = mu.edit.finetune(model, capitals, where, steps=2, learning_rate=3e-4, **options)
    assert edit.size(model).changed > 0.1 * where.n_parameters
