from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import tiny
import torch

import mechunlearn as mu
from mechunlearn.tasks import with_random_subjects


def test_random_subjects_replace_every_subject_token_and_nothing_else(model: Any) -> None:
    for padding in ("right", "left"):
        prompts = tiny.prompts(model, n=12, padding=padding)
        found = with_random_subjects(model, prompts, seed=3)
        assert found.corrupt is not None
        assert torch.equal(found.corrupt != prompts.tokens, prompts.subject)
        drawn = found.corrupt[prompts.subject]
        assert int(drawn.max()) < model.cfg.d_vocab
        assert not {0, 1, 2, 3} & set(drawn.tolist())  # special tokens
        assert torch.equal(found.corrupt, with_random_subjects(model, prompts, seed=3).corrupt)
        assert not torch.equal(found.corrupt, with_random_subjects(model, prompts, seed=4).corrupt)
        assert torch.equal(found.tokens, prompts.tokens)


def test_every_other_token_is_equally_likely(llama: Any) -> None:
    """97 words: each but the token itself in one of 96 draws; a word that could not be drawn would show."""
    prompts = tiny.prompts(llama, n=1)
    own = prompts.tokens[prompts.subject][0].item()
    drawn = torch.stack([with_random_subjects(llama, prompts, seed=s).corrupt[prompts.subject] for s in range(2000)])
    counts = torch.bincount(drawn[:, 0], minlength=tiny.N_VOCAB)
    assert counts[own] == 0
    others = torch.cat([counts[4:own], counts[own + 1 :]])
    assert others.min() >= 5  # 20.8 expected, standard deviation 4.5
    assert others.max() <= 45


def test_prompts_without_subjects_are_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match="expected prompts with subjects, got none"):
        with_random_subjects(llama, replace(tiny.prompts(llama), subject=None))


def test_sports_facts_take_them_and_patching_runs_on_them(shipped: Any) -> None:
    frame = pd.DataFrame({"athlete": ["LeBron James", "Tom Brady", "Jim Thome", "Ben Roethlisberger"]})
    frame = frame.assign(sport=["basketball", "football", "baseball", "football"])
    text = torch.ones(5, 8, dtype=torch.long)
    task = mu.tasks.sports_facts(shipped, source=frame, forget=1, corrupt=with_random_subjects, text=text)
    for prompts in (task.forget, task.retain):
        assert torch.equal(prompts.corrupt != prompts.tokens, prompts.subject)
    clean, corrupt = (
        mu.metrics.candidate_probability(each.logits(shipped), each).detach()
        for each in (task.forget, task.forget.corrupted())
    )
    assert float(clean) > 0.9
    assert float(corrupt) < float(clean)
