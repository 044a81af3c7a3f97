import tempfile

import pytest
import tiny
import torch
from conftest import HAS_HOOKED, shared
from state import left_as_it_was

from mechunlearn.model import logits_at
from mechunlearn.model.huggingface import exported, exported_logits


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_copy_gives_the_same_logits_and_its_files_go(architecture, padding, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = shared("bridge", architecture)
    prompts = tiny.prompts(model, answer=3, padding=padding)
    given = (prompts.tokens, prompts.attention_mask, prompts.positions)
    with left_as_it_was(model), torch.no_grad(), exported(model) as copy:
        found, expected = exported_logits(copy, *given), logits_at(model, *given)
        assert list(tmp_path.iterdir())
    assert found.shape == expected.shape
    assert torch.allclose(found[prompts.answer_mask], expected[prompts.answer_mask], atol=1e-4)
    assert not list(tmp_path.iterdir())


def test_the_files_go_after_a_failure_too(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), exported(llama):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
def test_a_hooked_transformer_cannot_be_exported():
    with pytest.raises(ValueError, match="expected a TransformerBridge"), exported(shared("hooked", "llama")):
        pass
