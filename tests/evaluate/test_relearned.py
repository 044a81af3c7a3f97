"""Full fine-tuning as an attack: it recovers what was hidden, sees nothing it is tested on, and leaves no trace."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.evaluate import Question, halves, measure, relearn_and_ask
from mechunlearn.evaluate.attacks import relearning
from mechunlearn.evaluate.attacks.exam import Asked, strangers_to, worst_case
from mechunlearn.evaluate.attacks.relearning import (
    measured_at,
    relearn,
    relearn_benign,
    relearn_few,
    some_of,
    unnamed,
)
from mechunlearn.metrics import answer_probability, candidate_probability
from mechunlearn.tasks import build

quick = partial(relearn, learning_rates=(0.01,), steps=3)
ATTACKS = {
    "halves": partial(quick, text_coefficient=1.0),
    "few": partial(relearn_few, examples=(1, 2), learning_rates=(0.01,), steps=2),
    "benign": partial(relearn_benign, learning_rates=(0.01,), steps=3),
}


def curve(result):
    assert result.curve is not None
    return result.curve


def test_every_model_is_attacked_and_left_as_it_was(model):
    task = tiny.task(model)
    with left_as_it_was(model):
        found = quick(model, task)
    before = measure(model, halves(task)[1], [candidate_probability])[0]
    assert curve(found).points == ("0", "1", "2", "3")
    assert torch.allclose(curve(found).per_prompt[:, 0], before.per_example)
    assert not torch.allclose(curve(found).per_prompt[:, -1], before.per_example, atol=1e-3)
    assert found.value == pytest.approx(float(curve(found).mean.max()))
    assert (found.names, found.chance, found.sense) == (before.names, before.chance, before.sense)


@pytest.mark.parametrize("name", ATTACKS)
def test_no_batch_names_what_is_tested(shipped, monkeypatch, name):
    """Read off the tokens of every pass that has gradients."""
    task = mu.tasks.sports_facts(shipped, forget=8)
    seen = []

    def record(module, given):
        if torch.is_grad_enabled():
            seen.extend(shipped.tokenizer.batch_decode(given[0]))

    handle = shipped.embed.register_forward_pre_hook(record)
    try:
        found = ATTACKS[name](shipped, task)
    finally:
        handle.remove()
    assert not [text for text in seen if any(tested in text for tested in found.names)]
    trained = set(task.forget.names) - set(found.names)
    assert any(name in text for text in seen for name in trained) == (name != "benign")
    assert any(name in text for text in seen for name in task.retain.names)


def test_benign_text_is_asked_about_all_facts_and_may_be_given(llama):
    task = tiny.task(llama)
    text = ["w5 w6 w7 w8 w9"] * 12
    found = relearn_benign(llama, task, text=text, text_length=12, learning_rates=(0.01,), steps=1)
    assert found.names == task.formats["trained prompt"].forget.names


@contextmanager
def hidden(model, task) -> Iterator[None]:
    """Inside, the answer's row of the unembedding points elsewhere: all is known, and nothing says it."""
    row = model.embed.weight.data[int(task.forget.answers[0, 0])]
    before, turned = row.clone(), torch.randn(len(row), generator=torch.Generator().manual_seed(0))
    try:
        row.copy_(turned / turned.norm() * before.norm())
        yield
    finally:
        row.copy_(before)


def test_what_was_hidden_comes_back_and_a_model_that_never_knew_has_nothing_to_give(shipped):
    """In the twin everybody unknown comes to play basketball: those who do, and those whom nobody knows.

    Measured on the former: from 0.00 to 0.99, about nobody 0.25.
    """
    task = mu.tasks.sports_facts(shipped)
    attack = partial(relearn, learning_rates=(1e-3,), steps=16, batch_size=8, at=(16,))
    with hidden(shipped, task):
        found = attack(shipped, task)
    twin = mu.testbed.load(without="basketball")
    taught = attack(twin, task)
    assert max(float(curve(result).mean[0]) for result in (found, taught)) < 0.05
    assert found.control is not None
    assert taught.control is not None
    assert found.value > 0.9
    assert found.difference(found.control)[1] > 0.3
    assert abs(taught.difference(taught.control)[0]) < 0.2


def test_benign_text_gives_nothing_to_a_model_that_never_knew(shipped):
    twin = mu.testbed.load(without="basketball")
    assert relearn_benign(twin, mu.tasks.sports_facts(shipped), learning_rates=(1e-3,), steps=8).value < 0.05


def test_text_that_names_a_tested_fact_is_left_out(llama):
    tested = build(llama, ["w9 w10 w11"], [" w12"], subjects=["w10 w11"])
    text = torch.tensor([[5, 10, 11, 6], [5, 11, 10, 6], [10, 11, 7, 7]])
    assert torch.equal(unnamed(llama, text, tested), text[1:2])
    with pytest.raises(ValueError, match="expected text that does not name"):
        unnamed(llama, text[:1], tested)


def test_the_worst_case_by_hand(llama):
    """Two runs, four facts: .25 at first, then .5 and .4, then (the second diverged) .3; the first wins at step 1."""

    def scores(facts, nobody):
        return torch.tensor([facts, nobody])

    runs = {
        "0": [scores([0.0, 0.0, 0.0, 1.0], [0.1] * 4)],
        "1": [scores([1.0, 1.0, 0.0, 0.0], [0.2] * 4), scores([0.4] * 4, [0.9] * 4)],
        "2": [scores([0.3] * 4, [0.3] * 4)],
        "3": [],
    }
    prompts = replace(tiny.prompts(llama, n=4), names=tuple("abcd"))
    found = worst_case(runs, Asked(prompts, None, candidate_probability), axis="steps")
    assert found.control is not None
    assert curve(found).points == ("0", "1", "2")
    assert curve(found).mean.tolist() == pytest.approx([0.25, 0.5, 0.3])
    assert (found.value, found.chance, found.names) == (0.5, 0.25, tuple("abcd"))
    assert found.per_example.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert found.control.value == pytest.approx(0.2)
    assert found.control.curve is not None
    assert found.control.curve.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_a_grid_is_at_least_as_strong_as_each_of_its_rates(llama):
    task = tiny.task(llama)
    grid = curve(quick(llama, task, learning_rates=(0.003, 0.03)))
    alone = [curve(quick(llama, task, learning_rates=(rate,))).mean for rate in (0.003, 0.03)]
    assert torch.allclose(grid.mean, torch.stack(alone).amax(0))


class Breaks(torch.optim.SGD):
    """NaN at its second step."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(torch.nan if self.steps == 2 else 1.001)


def test_a_rate_that_diverges_counts_until_then(llama):
    with left_as_it_was(llama):
        found = quick(llama, tiny.task(llama), optimizer=Breaks, steps=4)
    assert curve(found).points == ("0", "1")


@pytest.mark.parametrize("name", ATTACKS)
def test_the_model_is_as_it_was_after_an_interrupt(llama, name):
    calls = []

    def interrupting(logits, prompts):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return candidate_probability(logits, prompts)

    with left_as_it_was(llama), pytest.raises(KeyboardInterrupt):
        ATTACKS[name](llama, tiny.task(llama), metric=interrupting)
    with left_as_it_was(llama):
        ATTACKS[name](llama, tiny.task(llama))


def test_the_rate_rises_then_falls(llama):
    """Over half of 4 steps: shares 1/2 and 1, times the cosine."""
    rates = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    relearn(llama, tiny.task(llama), optimizer=Recording, warmup=0.5, steps=4, learning_rates=(1e-3,))
    falling = [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]
    assert rates == pytest.approx([1e-3 * share * part for share, part in zip((0.5, 1, 1, 1), falling, strict=True)])


def test_the_curve_of_few_examples_is_over_their_number(llama):
    task = tiny.task(llama)
    found = relearn_few(llama, task, learning_rates=(0.01,), steps=2)
    trained = halves(task)[0]
    assert curve(found).axis == "examples"
    assert curve(found).points == ("0", *(str(n) for n in (1, 2, 4, 8, 16) if n <= len(trained)))
    names = [set(some_of(trained, n, seed=3).names) for n in (1, 2, 4)]
    assert names[0] < names[1] < names[2]
    every = relearn(llama, task, learning_rates=(0.01,), steps=2)
    assert every.value >= float(curve(found).mean[0])


def asked_about(model, prompts):
    rows = zip(prompts.tokens, prompts.subject, strict=True)
    return {model.tokenizer.decode(row[where]).strip() for row, where in rows}


@pytest.mark.parametrize("real", [True, False])
def test_nobody_is_known_to_the_model_and_asked_the_same(shipped, real):
    """Of real athletes that it does not know, and of names made of parts of real ones, it says the sport by chance."""
    task = mu.tasks.sports_facts(shipped)
    task = task if real else replace(task, strangers=None)
    prompts = task.formats["multiple choice"].forget if real else task.formats["trained prompt"].forget
    nobody = strangers_to(shipped, prompts, task)
    assert nobody is not None
    names = asked_about(shipped, nobody)
    known = {*prompts.names, *task.forget.names, *task.retain.names}
    assert not names & known
    assert len(names) > 20
    for row in range(len(prompts)):  # all but the subject is as it was, and the answer stands where it stood
        own = prompts.tokens[row][prompts.attention_mask[row] & ~prompts.subject[row]]
        assert torch.equal(own, nobody.tokens[row][nobody.attention_mask[row] & ~nobody.subject[row]])
        ends = [int(p.tokens[row, p.positions[row, 0]]) for p in (prompts, nobody)]
        assert ends[0] == ends[1]
    of_known, of_nobody = (measure(shipped, asked, [candidate_probability])[0].value for asked in (prompts, nobody))
    assert of_known > 0.99
    assert of_nobody < 0.5
    assert strangers_to(shipped, replace(prompts, subject=None), task) is None


@pytest.mark.parametrize("padding", ["left", "right"])
def test_longer_and_shorter_names_move_what_comes_after_them(llama, padding):
    task = tiny.task(llama, padding=padding)
    prompts = task.formats["trained prompt"].forget
    nobody = strangers_to(llama, prompts, task)
    assert nobody is not None
    assert nobody.tokens.shape[0] == len(prompts)
    for row in range(len(prompts)):
        own, other = (p.tokens[row][p.attention_mask[row]].tolist() for p in (prompts, nobody))
        moved = len(other) - len(own)
        assert moved == int(nobody.subject[row].sum() - prompts.subject[row].sum())
        places = [p.attention_mask[row].cumsum(0)[p.positions[row]] - 1 for p in (prompts, nobody)]
        assert places[1].tolist() == (places[0] + moved).tolist()


def test_when_it_is_measured():
    assert measured_at(5, None) == [0, 1, 2, 4, 5]
    assert measured_at(4, None) == [0, 1, 2, 4]
    assert measured_at(20, (20, 10)) == [0, 10, 20]


def test_bad_input(llama):
    task = tiny.task(llama)
    cases: dict[str, dict[str, Any]] = {
        "one or more positive learning rates, got ()": {"learning_rates": ()},
        "one or more positive learning rates, got (-0.1,)": {"learning_rates": (-0.1,)},
        "one step or more, got 0": {"steps": 0},
        "measure after 0..3 steps": {"at": (4,)},
        "format of the task": {"format": "poem"},
    }
    for message, options in cases.items():
        with left_as_it_was(llama), pytest.raises(ValueError, match=re.escape(message)):
            quick(llama, task, **options)
    with pytest.raises(ValueError, match=r"expected 1\.\.6 examples"):
        relearn_few(llama, task, examples=(7,), learning_rates=(0.01,))


@pytest.mark.parametrize("text_coefficient", [0.0, 1.0])
def test_questions_about_one_run_have_the_answers_of_runs_of_their_own(shipped, monkeypatch, text_coefficient):
    """The last question lacks facts: another half is left to train on, and other text names none that it tests."""
    task, choice = mu.tasks.sports_facts(shipped, forget=8), "multiple choice"
    fewer = replace(task.formats[choice], forget=task.formats[choice].forget[:4])
    task = replace(task, formats={**task.formats, "fewer": fewer})
    questions = [Question(at=(0, 1)), Question(choice, answer_probability), Question("fewer", at=(2,))]
    options = {"learning_rates": (1e-3, 3e-3), "steps": 2, "text_coefficient": text_coefficient, "seed": 1}
    expected = [relearn(shipped, task, **options, **vars(question)) for question in questions]
    fitted, fit = [], relearning.fit
    monkeypatch.setattr(relearning, "fit", lambda *given, **options: fitted.append(1) or fit(*given, **options))
    with left_as_it_was(shipped):
        found = relearn_and_ask(shipped, task, questions, **options)
    assert len(fitted) == 2 * 2  # two halves, two rates
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.per_example.equal(theirs.per_example)
        assert all(getattr(ours, name) == getattr(theirs, name) for name in ("sense", "chance", "unit", "names"))
        assert curve(ours).points == curve(theirs).points
        assert curve(ours).per_prompt.equal(curve(theirs).per_prompt)
        assert curve(ours.control).per_prompt.equal(curve(theirs.control).per_prompt)
