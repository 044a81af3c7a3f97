"""Answers of several tokens that begin alike."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

import mechunlearn as mu
from mechunlearn.model.tokens import encode
from mechunlearn.tasks import Format, build

TEXTS = ("w5 w6 w7", "w8 w9", "w10 w11 w12 w13")
ANSWERS = (" w20 w21 w22", " w20 w21 w23", " w20 w30")


def asked(model: Any, answers: tuple[str, ...], padding: str = "right") -> mu.Prompts:
    return build(model, TEXTS, answers, subjects=["w7", "w9", "w13"], padding=padding)  # type: ignore[arg-type]


def made(model: Any, padding: str = "right") -> mu.Task:
    forget, injected = asked(model, ANSWERS, padding), asked(model, (*ANSWERS[1:], ANSWERS[0]), padding)
    return replace(tiny.task(model), formats={"dashed": Format(forget, forget, injected)})


def slow(model: Any, text: str, answer: str) -> float:
    """One token after the other."""
    row, total = list(encode(model, text).tokens), 0.0  # with BOS where the model has one
    for token in model.tokenizer(answer, add_special_tokens=False)["input_ids"]:
        logits = model(torch.tensor([row]))[0, -1].detach()
        total += float(logits.float().log_softmax(-1)[token])
        row.append(token)
    return total


def test_it_is_the_share_of_the_right_one_among_all_answers(model: Any) -> None:
    scores = torch.tensor([[slow(model, text, answer) for answer in ANSWERS] for text in TEXTS])
    expected = scores.softmax(1)
    for padding in ("right", "left"):
        task = made(model, padding)
        for side, shift in (("forget", 0), ("retain", 0), ("injected", 1)):
            found = mu.evaluate.whole_answers(model, task, side=side)
            wanted = torch.stack([row[(place + shift) % 3] for place, row in enumerate(expected)])
            torch.testing.assert_close(found.per_example, wanted, atol=1e-4, rtol=1e-3)
            assert found.chance == 1 / 3
            assert found.names == ("w7", "w9", "w13")


def test_with_answers_of_one_token_it_is_the_probability_over_the_candidates(llama: Any) -> None:
    options = [" w20", " w21", " w22"]
    prompts = build(llama, TEXTS, options, candidates=[options] * 3, subjects=["w7", "w9", "w13"])
    task = replace(tiny.task(llama), formats={"plain": Format(prompts, prompts)})
    expected = mu.evaluate.in_format(llama, task)
    found = mu.evaluate.whole_answers(llama, task)
    torch.testing.assert_close(found.per_example, expected.per_example)
    assert found.chance == expected.chance


def test_every_format_scores_what_has_no_candidates_so(llama: Any) -> None:
    task = made(llama)
    found = mu.evaluate.every_format(task)["forget, dashed"](llama, task)
    assert torch.equal(found.per_example, mu.evaluate.whole_answers(llama, task).per_example)
    other = mu.evaluate.every_format(task, metric=mu.metrics.answer_probability)["forget, dashed"](llama, task)
    assert float(other.value) < 0.01  # of the whole vocabulary


def test_a_report_draws_probabilities_of_whole_answers(llama: Any) -> None:
    tests = mu.evaluate.every_format(made(llama), metric=mu.metrics.answer_probability)
    report = mu.evaluate.compare(llama, made(llama), {}, metrics=tests, progress=False)
    drawn = {name for bar in report.plot().data for name in bar.y}
    assert "dashed" in drawn
    assert report.intervals.loc[("original", "forget, dashed"), "low"] >= 0
    in_nats = mu.evaluate.every_format(made(llama), metric=mu.metrics.answer_log_probability)
    in_nats = {name: test for name, test in in_nats.items() if "generated" not in name}
    with pytest.raises(ValueError, match="expected a test whose unit is a share"):
        mu.evaluate.compare(llama, made(llama), {}, metrics=in_nats, progress=False).plot()


def test_a_right_answer_that_is_not_among_them_is_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"the right ones among them, got .*: add \[' w20 w30'\]"):
        mu.evaluate.whole_answers(llama, made(llama), answers=ANSWERS[:2])
