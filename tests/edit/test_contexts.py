from dataclasses import replace

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.edit.inject.facts import essence, generated_prefixes, in_contexts, injected, subject_end
from mechunlearn.model.tokens import encode
from mechunlearn.tasks.prompts import with_subjects

PREFIXES = ("w9 w8 w7", "w50")


def words(model, *texts, answer=" w20 w21", subject="w33 w34"):
    return mu.tasks.build(model, list(texts), [answer] * len(texts), subjects=[subject] * len(texts))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_fact_in_contexts_is_the_text_with_prefixes(llama, padding):
    """On a tokenizer of words, where nothing merges."""
    facts = mu.tasks.build(
        llama,
        ["w5 w33 w34 w6", "w7 w8 w9 w10 w11 w33 w34 w12"],
        [" w20 w21"] * 2,
        subjects=["w33 w34"] * 2,
        padding=padding,
    )
    found = in_contexts(llama, facts[[0]], PREFIXES)
    expected = words(llama, "w5 w33 w34 w6", *(f"{prefix} w5 w33 w34 w6" for prefix in PREFIXES))
    for name in ("tokens", "attention_mask", "positions", "answers", "subject"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(in_contexts(llama, facts.rows(torch.tensor([0])), PREFIXES).positions, expected.positions)
    assert subject_end(found).tolist() == [3, 6, 4]


def test_the_essence_is_the_subject_and_is_a(llama):
    found = essence(llama, words(llama, "w5 w33 w34 w6"))
    assert found.tokens.tolist() == [[1, 33, 34, 3, 3]]  # this tokenizer knows neither "is" nor "a"
    assert subject_end(found).tolist() == [2]
    assert found.positions.tolist() == [[4, 4]]
    assert not found.answer_mask.any()


def test_generated_prefixes_are_likely_text_that_a_seed_fixes(model):
    with left_as_it_was(model):
        first, again = (generated_prefixes(model, lengths=(4, 9), seed=3) for _ in range(2))
    assert first == again
    assert [len(prefix.split()) for prefix in first] == [3, 8]  # the word that it begins with is unknown here
    start = list(encode(model, "").tokens)
    tokens = [*start, 3, *(int(word[1:]) for word in first[1].removesuffix(".\n").split())]
    for end in range(len(start) + 1, len(tokens)):
        logits = model(torch.tensor([tokens[:end]]))[0, -1]
        logits[[0, 1, 2, 3]] = -torch.inf
        assert tokens[end] in logits.topk(5).indices.tolist()
    assert generated_prefixes(model, lengths=()) == ()


def test_another_seed_gives_other_prefixes(llama):
    assert generated_prefixes(llama, seed=3) != generated_prefixes(llama, seed=4)


def test_facts_that_cannot_be_injected_are_refused(llama):
    task = tiny.task(llama)
    assert injected(task) is task.injection
    with pytest.raises(ValueError, match="expected a task with prompts to inject, got none"):
        injected(replace(task, injection=None))
    with pytest.raises(ValueError, match=r"got the true answer for fact 2 .*inject another answer"):
        injected(replace(task, injection=mu.tasks.joined(task.injection[:2], task.forget[[3]])))
    twice = mu.tasks.joined(words(llama, "w5 w33 w34"), words(llama, "w5 w33 w34", answer=" w22"))
    with pytest.raises(ValueError, match=r"expected one answer for each prompt.*second one for fact 1"):
        injected(replace(task, injection=twice))


def test_prompts_that_hide_their_subject_are_refused(llama):
    prompts = words(llama, "w5 w33 w34 w6", "w5 w6 w33 w34")
    assert with_subjects(prompts, "facts") is prompts
    with pytest.raises(ValueError, match=r"expected facts that say where their subject is, got none for all of them"):
        with_subjects(replace(prompts, subject=None), "facts")
    assert prompts.subject is not None
    without = prompts.subject.clone()
    without[1] = False
    with pytest.raises(ValueError, match=r"got none for prompts \[1\]: pass subjects="):
        with_subjects(replace(prompts, subject=without), "facts")
