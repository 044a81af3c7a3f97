from dataclasses import replace

import pytest
import tiny
import torch

from mechunlearn.tasks import joined


def test_joined_sets_answer_as_they_do_apart(llama):
    short, left = tiny.prompts(llama, n=1), tiny.prompts(llama, seed=1, answer=3, padding="left")
    both = joined(short, left)
    with torch.no_grad():
        apart, together = [p.logits(llama) for p in (short, left)], both.logits(llama)
    assert torch.allclose(together[:1, :1], apart[0], atol=1e-4)
    assert torch.allclose(together[1:], apart[1], atol=1e-4)
    assert both.names == short.names + left.names
    assert joined(short, replace(left, corrupt=None)).corrupt is None
    with pytest.raises(ValueError, match="equally many candidates, got"):
        joined(short, replace(left, candidates=left.candidates[:, :2]))
