"""What SmolLM2 knows: the numbers of its card."""

from typing import Any

import pytest
from state import left_as_it_was

import mechunlearn as mu

pytestmark = [pytest.mark.real, pytest.mark.nightly]  # it asks 181 facts in nine formats


def test_it_knows_seventy_capitals_and_most_of_them_in_six_formats(smol: Any):
    asked = ["list", "reworded", "chat", "reverse", "two-hop"]
    with left_as_it_was(smol):
        task = mu.tasks.known_facts(smol, formats=asked, forget=16)
    assert abs(task.known["trained prompt"][0] - 70) <= 3
    assert task.known["trained prompt"][1] == 181
    for title in asked:
        said, of = task.known[title]
        assert said / of > 0.5, title
        assert 0 < len(task.formats[title].forget) <= 16
    assert task.special_tokens == "no special token added"
    assert (task.formats["chat"].forget.tokens == smol.tokenizer.bos_token_id).sum(1).unique().tolist() == [3]
    assert int(task.forget.answer_mask.sum(1).max()) > 1, "answers of several tokens are scored whole"
    assert "no_counterpart" not in task.splits, "each has a counterpart about another country"
