"""The lens proposes what a layer would say; a hidden answer is found, an unknown one is not."""

import sys

import pytest
import tiny
import torch
from hushed import hushed
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.evaluate.lens import _places_of, _proposals, by_both_ends, by_change, by_probability, lens_extraction

RANKINGS = pytest.mark.parametrize("rankings", [by_probability, by_both_ends, by_change])


def test_candidates_are_taken_in_turn_from_each_ranking_the_last_first():
    """By hand: the last ranking says 2 3 1, the one before 3 1 0; so 2, 3, (3), 1, (1), 0."""
    before, last = [0.1, 0.3, 0.0, 0.6, -1.0], [-1.0, 0.1, 0.9, 0.5, -2.0]
    tokens = _proposals(torch.tensor([[before, last]]), 3)
    assert tokens.tolist() == [[2, 3, 3, 1, 1, 0]]
    assert _places_of(tokens, torch.tensor([[2, 3, 1, 0, 4]])).tolist() == [[0, 1, 2, 3, 6]]


def test_rankings_by_hand():
    """Two layers, three tokens: the second token rises most and the first falls most."""
    found = torch.tensor([[[0.7, 0.2, 0.1], [0.2, 0.6, 0.2]]]).log()
    assert torch.equal(by_probability(found), found)
    tops = by_both_ends(found).argmax(-1)
    assert tops.tolist() == [[2, 0, 0, 1]] or tops.tolist() == [[2, 0, 2, 1]]  # two equal ones in the second layer
    assert by_change(found).argmax(-1).tolist() == [[0, 1]]


def test_scores_of_four_examples_by_hand(monkeypatch, llama):
    """The answer is the 1st, 2nd, 4th candidate of a prompt, and none of four; wrong ones are found later."""
    ranks = torch.tensor([[0, 9, 9, 9], [1, 9, 3, 9], [3, 0, 1, 2], [9, 9, 9, 9]])
    monkeypatch.setattr(sys.modules[lens_extraction.__module__], "_ranks", lambda *given: ranks)
    task = tiny.task(llama)
    result = lens_extraction(llama, task)
    assert result.curve.points == ("1", "2", "4")
    assert result.curve.mean.tolist() == [0.25, 0.5, 0.75]
    assert result.per_example.tolist() == [1, 1, 1, 0]
    assert result.control.per_example.tolist() == pytest.approx([0, 1 / 3, 1, 0])
    assert result.chance == pytest.approx(4 / tiny.N_VOCAB)
    assert lens_extraction(llama, task, budget=1).curve.points == ("1",)
    assert lens_extraction(llama, task, budget=6).curve.points == ("1", "2", "4", "6")


def test_the_last_layer_with_a_budget_of_one_is_the_model_s_own_answer(llama):
    from dataclasses import replace

    task = tiny.task(llama)
    tested = task.formats["trained prompt"].forget
    said = tested.logits(llama)[:, 0].argmax(-1, keepdim=True)
    knowing = replace(tested, answers=torch.where(torch.arange(6)[:, None] < 3, said, 1), candidates=None)
    formats = {"trained prompt": replace(task.formats["trained prompt"], forget=knowing)}
    result = lens_extraction(llama, replace(task, formats=formats), budget=1, layers=[3])
    assert result.per_example.tolist() == [1, 1, 1, 0, 0, 0]
    assert result.control is None


@RANKINGS
def test_with_the_whole_vocabulary_everything_is_found(llama, rankings):
    result = lens_extraction(llama, tiny.task(llama), budget=tiny.N_VOCAB, rankings=rankings)
    assert result.value == result.control.value == result.chance == 1
    assert (result.curve.mean.diff() >= 0).all()


def test_every_architecture_is_read_and_left_as_it_was(model):
    task = tiny.task(model, answer=2)
    with left_as_it_was(model):
        result = lens_extraction(model, task, format="question")
    assert result.names == task.formats["question"].forget.names

    def failing(found):
        raise RuntimeError("at the first batch")

    with left_as_it_was(model), pytest.raises(RuntimeError, match="at the first batch"):
        lens_extraction(model, task, rankings=failing)


def test_bad_input_is_refused(llama, unchecked):
    task = tiny.task(llama)
    for options, message in (
        ({"budget": 0}, r"budget must lie in 1..101 \(tokens of the vocabulary\), got 0"),
        ({"layers": [2, 4]}, r"expected layers in 0..3 .* got \[4\]"),
        ({"layers": []}, r"expected layers in 0..3 .* got none"),
        ({"format": "poem"}, "expected a format of the task"),
        ({"rankings": "top"}, "expected a function as rankings"),
        ({"batch_size": 0}, "batch_size of at least 1"),
        ({"layers": [1], "rankings": by_change}, "at least two layers for by_change"),
    ):
        with pytest.raises(ValueError, match=message):
            lens_extraction(llama, task, **options)


def test_an_answer_that_the_last_mlp_hides_is_extracted_and_the_twin_s_is_not(shipped):
    """The twin never knew: the lens finds what the other athletes play there, and never basketball."""
    task = mu.tasks.sports_facts(shipped, forget="basketball")
    tested = task.formats["trained prompt"].forget
    with hushed(shipped, tested).applied(shipped):
        assert mu.evaluate.accuracy(shipped, tested).candidates.value < 0.1
        found = lens_extraction(shipped, task)
    assert found.value > 0.9
    assert found.value > found.control.value + 0.3
    never = lens_extraction(mu.testbed.load(without="basketball"), task)
    assert never.value < 0.1
    assert never.value < never.control.value
