"""Demonstrations: in the words of the prompt, about other facts, with every answer in turn."""

from random import Random

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.evaluate import halves
from mechunlearn.evaluate.attacks.few_shot import (
    Demonstration,
    demonstrations_for,
    demonstrations_of,
    drawn,
    few_shot,
    shown_before,
)
from mechunlearn.model.tokens import continuation

GOLF = "Fact: Tiger Woods plays the sport of golf\n"


@pytest.fixture(scope="module")
def basketball(shipped):
    return mu.tasks.sports_facts(shipped, forget="basketball")


@pytest.fixture(scope="module")
def eight(shipped):
    """Athletes of more than one sport."""
    return mu.tasks.sports_facts(shipped, forget=8)


def test_answers_are_read_back_with_their_space(shipped, llama):
    tokens = shipped.tokenizer("Fact: X plays the sport of basketball", add_special_tokens=False)["input_ids"]
    assert continuation(shipped, tokens[:-1], tokens[-1:]) == " basketball"
    assert continuation(llama, [1, 5, 6], [7]) == " w7"


def test_answers_take_turns_by_hand():
    found = [Demonstration(f"{answer}{i}", answer) for answer in "abc" for i in range({"a": 4, "b": 2, "c": 1}[answer])]
    order = [shown.answer for shown in drawn(found, True, Random(0))]
    assert sorted(order[:3]) == ["a", "b", "c"]
    assert sorted(order[3:5]) == ["a", "b"]
    assert order[5:] == ["a", "a"]
    assert sorted(map(str, drawn(found, False, Random(0)))) == sorted(map(str, found))


def test_the_prompt_by_hand(shipped, basketball):
    """The example on top stays there, once; the answer and its candidates stay what they were."""
    tested = basketball.formats["trained prompt"].forget[:1]
    shown = [Demonstration("Fact: A B plays the sport of", " football"), Demonstration("Fact: C plays", " golf")]
    made = shown_before(shipped, tested, [shown])
    assert made.texts[0] == tested.texts[0].replace(
        GOLF, GOLF + "Fact: A B plays the sport of football\nFact: C plays golf\n"
    )
    assert made.texts[0].count(GOLF) == 1
    assert made.names == tested.names
    assert torch.equal(made.answers, tested.answers)
    assert made.candidates is not None
    assert made.candidates.equal(tested.candidates)
    subject = made.tokens[made.subject].tolist()
    assert shipped.tokenizer.decode(subject).strip() == tested.names[0]


def test_a_whole_sport_is_shown_with_the_others_and_never_with_a_tested_name(shipped, basketball):
    trained, tested = halves(basketball)
    found = demonstrations_for(shipped, basketball, trained, tested, format=None, balanced=True)
    assert {shown.answer for shown in found} == {" basketball", " football", " baseball"}
    assert len(found) == len(trained) + len(basketball.retain)
    assert not [name for name in tested.names for shown in found if name in shown.lines]
    alone = demonstrations_for(shipped, basketball, trained, tested, format=None, balanced=False)
    assert {shown.answer for shown in alone} == {" basketball"}
    assert len(alone) == len(trained)


def test_single_athletes_are_shown_by_the_other_half_in_any_format(shipped, eight):
    for format in ("trained prompt", "question", "multiple choice"):
        trained, tested = halves(eight, format=format)
        found = demonstrations_for(shipped, eight, trained, tested, format=format, balanced=False)
        assert len(found) == 4
        assert all(any(name in shown.lines for name in trained.names) for shown in found)
        assert not [name for name in tested.names for shown in found if name in shown.lines]


def test_other_formats_of_a_whole_sport_are_written_in_their_words(shipped, basketball):
    trained, tested = halves(basketball, format="instruction")
    found = demonstrations_for(shipped, basketball, trained, tested, format="instruction", balanced=False)
    assert str(found[0]) == f"Athlete: {trained.names[0]}\nSport: basketball\n"
    text = shown_before(shipped, tested[:1], [found[:1]]).texts[0]
    asked = f"Athlete: {tested.names[0]}\nSport:"
    assert text == f"Name the sport of this athlete.\nAthlete: {trained.names[0]}\nSport: basketball\n{asked}"


def test_multiple_choice_of_a_whole_sport_asks_for_demonstrations(shipped, basketball):
    with pytest.raises(ValueError, match=r"(?s)expected a format in which prompts differ.*demonstrations="):
        few_shot(shipped, basketball, format="multiple choice")
    _, tested = halves(basketball, format="multiple choice")
    found = demonstrations_of(shipped, basketball.formats["multiple choice"].retain[:3], tested)
    assert {shown.answer for shown in found} <= {" A", " B", " C", " D"}
    assert str(found[0]).startswith("Question: What sport does ")
    assert str(found[0]).endswith("\n\n")
    with pytest.raises(ValueError, match="expected an attack on other facts"):
        demonstrations_of(shipped, tested, tested)


def test_every_architecture_is_asked_behind_demonstrations(model):
    task = tiny.task(model)
    with left_as_it_was(model):
        found = few_shot(model, task, shots=(1, 2))
    assert found.curve is not None
    assert found.curve.points == ("0", "1", "2")
    assert found.control is not None
    assert found.control.curve is not None
    assert found.control.curve.points == found.curve.points
    assert not torch.allclose(found.curve.per_prompt[:, 0], found.curve.per_prompt[:, 2], atol=1e-4)


def test_what_does_not_fit_is_left_out_and_said(llama):
    """A context of 64 tokens and six facts."""
    with pytest.warns(UserWarning, match="leaves out 7 demonstrations: there are 6 facts"):
        found = few_shot(llama, tiny.task(llama), shots=(0, 1, 7))
    assert found.curve is not None
    assert found.curve.points == ("0", "1")
    llama.cfg.n_ctx, before = 16, llama.cfg.n_ctx
    try:
        with pytest.warns(UserWarning, match="leaves out 3 demonstrations: .* tokens, context 16"):
            found = few_shot(llama, tiny.task(llama), shots=(3,))
    finally:
        llama.cfg.n_ctx = before
    assert found.curve is not None
    assert found.curve.points == ("0",)


def test_the_original_answers_behind_demonstrations_too(shipped, eight):
    found = few_shot(shipped, eight, shots=(0, 2))
    assert found.curve is not None
    assert float(found.curve.mean.min()) > 0.9


def test_prompts_without_texts_are_refused(llama):
    from dataclasses import replace

    from mechunlearn.tasks import Format

    task = tiny.task(llama)
    untold = {"trained prompt": Format(replace(task.formats["trained prompt"].forget, texts=()), task.retain)}
    with pytest.raises(ValueError, match="expected prompts with their texts"):
        few_shot(llama, replace(task, formats=untold))
