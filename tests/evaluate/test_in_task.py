from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch

import mechunlearn as mu
from mechunlearn.evaluate import every_format, generated, in_format, injected
from mechunlearn.metrics import candidate_probability, is_top_of_candidates, is_top_of_vocabulary
from mechunlearn.tasks import Format, Prompts

SHARES = ((0.7, 0.1, 0.1, 0.1), (0.4, 0.3, 0.2, 0.1), (0.3, 0.5, 0.1, 0.1), (0.25, 0.25, 0.25, 0.25))
"""Of the four candidates, the answer first. By hand: the answer is the largest twice (a tie is wrong)."""


@pytest.fixture
def toy(llama, monkeypatch):
    """Four prompts whose candidates have these probabilities; a fifth token beats all of them in the second row."""
    prompts = tiny.prompts(llama, n=4)
    order = {int(row[0]): place for place, row in enumerate(prompts.candidates)}
    assert len(order) == 4

    def by_hand(self, model, **options):
        logits = torch.full((len(self), 1, tiny.N_VOCAB), -9.0)
        for row, columns in zip(logits, self.candidates, strict=True):
            place = next(order[int(token)] for token in columns if int(token) in order)
            shown = {int(token): share for token, share in zip(prompts.candidates[place], SHARES[place], strict=True)}
            for token, share in shown.items():
                row[0, token] = torch.tensor(share).log()
            if place == 1:
                row[0, next(other for other in range(4, 99) if other not in shown)] = 3.0
        return logits

    monkeypatch.setattr(Prompts, "logits", by_hand)
    second = replace(prompts, answers=prompts.candidates[:, 1:2], candidates=prompts.candidates[:, [1, 0, 2, 3]])
    return replace(tiny.task(llama), formats={"toy": Format(prompts, prompts, second)}, injection=second[:2])


@pytest.mark.parametrize(
    ("metric", "expected", "chance"),
    [
        (candidate_probability, (0.7 + 0.4 + 0.3 + 0.25) / 4, 0.25),
        (is_top_of_candidates, 2 / 4, 0.25),
        (is_top_of_vocabulary, 1 / 4, None),
    ],
)
def test_four_examples_by_hand_in_three_senses(llama, toy, metric, expected, chance):
    if metric is is_top_of_vocabulary:  # of equal logits argmax takes any: leave the tie out
        toy = replace(toy, formats={"toy": Format(toy.formats["toy"].forget[:3], toy.formats["toy"].retain[:3])})
        expected = 1 / 3
    for side in ("forget", "retain"):
        found = in_format(llama, toy, side=side, metric=metric)
        assert found.value == pytest.approx(expected)
        assert found.chance == chance
        assert every_format(toy, metric=metric)[f"{side}, toy"](llama, toy).value == found.value


def test_the_injected_answer_by_hand(llama, toy):
    found = injected(llama, toy, format="toy")
    assert found.per_example.tolist() == pytest.approx([0.1, 0.3, 0.5, 0.25])
    assert found.chance == 0.25
    assert found.sense.startswith("injected answer, mean probability over the candidates")
    assert injected(llama, toy, format="toy", metric=is_top_of_candidates).per_example.tolist() == [0, 0, 1, 0]
    assert injected(llama, toy).per_example.tolist() == pytest.approx([0.1, 0.3])  # what an edit trains on


@pytest.mark.parametrize("metric", [candidate_probability, is_top_of_candidates])
def test_the_order_of_the_other_candidates_does_not_matter(llama, metric):
    task = tiny.task(llama)
    asked = task.formats["question"].forget
    other = replace(asked, candidates=asked.candidates[:, [0, 3, 1, 2]])
    changed = replace(task, formats={"question": Format(other, other)})
    first, second = (in_format(llama, each, name="question", metric=metric) for each in (task, changed))
    assert torch.allclose(first.per_example, second.per_example, atol=1e-6)


def test_every_format_has_a_column_for_each_side_and_marks_what_should_be_kept(llama):
    task = tiny.task(llama)
    neighbour = replace(task.formats["question"], kept=True)
    task = replace(task, formats={**task.formats, "neighbour": neighbour})
    sides = ("forget", "retain")
    columns = [f"{side}, {name}" for name in ("trained prompt", "question", "neighbour (keep)") for side in sides]
    rest = ["forget, generated", "retain, generated", "injected answer", "other knowledge", "text loss"]
    assert list(every_format(task)) == [*columns, *rest]
    assert list(every_format(replace(task, injection=None, knowledge=None)))[-2:] == ["retain, generated", "text loss"]


def test_every_format_of_a_task_without_formats_is_the_rest(llama):
    task = replace(tiny.task(llama), formats={})
    assert list(every_format(task)) == ["injected answer", "other knowledge", "text loss"]


def test_injection_is_found_after_it_and_not_before(llama):
    """An edit that trains on injected answers raises their accuracy, in another format of the same facts too."""
    task = tiny.task(llama)
    made = Format(task.forget, task.retain, task.injection)
    task = replace(task, formats={"trained prompt": made, "other": made})
    options = {"steps": 12, "batch_size": 6, "text_batch_size": 2, "progress": False, "learning_rate": 0.01}
    mask = mu.ComponentMask.of(["L0MLP", "L1MLP"], mu.shape(llama))
    edit = mu.edit.finetune(llama, task, mask, inject=True, **options)
    tests = (injected, partial(injected, format="other"))
    before = [test(llama, task).value for test in tests]
    with edit.applied(llama):
        after = [test(llama, task).value for test in tests]
    assert all(late > early + 0.2 for early, late in zip(before, after, strict=True))


def test_a_task_without_injected_answers_is_refused_and_told_who_builds_them(llama):
    task = replace(tiny.task(llama), injection=None)
    with pytest.raises(ValueError, match=r"injected answers, got none: build it with mu\.tasks\.sports_facts"):
        injected(llama, task)
    with pytest.raises(ValueError, match=r"\(the task has none\), got 'question': sports_facts and from_frame"):
        injected(llama, task, format="question")


@pytest.mark.parametrize("test", [in_format, generated, mu.evaluate.extraction_strength, injected])
def test_a_format_that_the_task_lacks_is_refused_and_told_who_builds_it(llama, test):
    named = {"name": "dialogue"} if test is in_format else {"format": "dialogue"}
    with pytest.raises(ValueError, match=r"\(trained prompt, question\), got 'dialogue': mu\.tasks\.sports_facts"):
        test(llama, tiny.task(llama), **named)
