"""Whole answers: scored among options or in the vocabulary, with aliases, as a slow reference scores them."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import tiny
import torch

import mechunlearn as mu
from mechunlearn.evaluate.attacks.few_shot import demonstrations_of, shown_before
from mechunlearn.metrics import (
    answer_log_probability,
    answer_probability,
    candidate_probability,
    is_top_of_candidates,
    is_top_of_vocabulary,
)
from mechunlearn.tasks import Prompts, build, joined, knows

TEXTS = ["w4 w10 w5", "w11 w5", "w6 w7 w12 w8 w9"]
ANSWERS = [" w50 w51", " w60", " w70 w71 w72"]
ALIASES = [(" w52",), (), (" w53", " w70 w71")]
WRONG = [(" w50 w54", " w55"), (" w56 w57 w58", " w50 w51"), (" w70 w71 w73", " w59")]
SUBJECTS = ["w10", "w11", "w12"]
METRICS = (
    candidate_probability,
    is_top_of_candidates,
    is_top_of_vocabulary,
    answer_probability,
    answer_log_probability,
)


def made(model: Any, *, wrong: bool = True, padding: Any = "right") -> Prompts:
    options = WRONG if wrong else None
    extra: dict[str, Any] = {"subjects": SUBJECTS, "padding": padding, "prepend_bos": True}
    return build(model, TEXTS, ANSWERS, options=options, aliases=ALIASES, **extra)


def by_hand(model: Any, text: str, answer: str) -> tuple[float, bool]:
    """Log probability of an answer behind a text, and whether each token is the most probable: one plain forward."""
    start = [1, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    own = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([start + own]))[0, len(start) - 1 : -1].double()
    chosen = logits.log_softmax(-1)[torch.arange(len(own)), own]
    return float(chosen.sum()), logits.argmax(-1).tolist() == own


def expected(model: Any, metric: Any, *, wrong: bool, texts: list[str] = TEXTS) -> list[float]:
    values = []
    for text, answer, also, others in zip(texts, ANSWERS, ALIASES, WRONG, strict=True):
        right = [by_hand(model, text, option) for option in (answer, *also)]
        rest = [by_hand(model, text, option)[0] for option in others] if wrong else []
        logs = torch.tensor([log for log, _ in right])
        total = logs.exp().sum()
        if metric is candidate_probability and wrong:
            values.append(float(total / (total + torch.tensor(rest).exp().sum())))
        elif metric is is_top_of_candidates:
            values.append(float(logs.max() > max(rest)))
        elif metric is is_top_of_vocabulary:
            values.append(float(any(says for _, says in right)))
        else:
            values.append(float(total.log() if metric is answer_log_probability else total))
    return values


@pytest.mark.parametrize("wrong", [True, False])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_whole_answers_are_scored_as_by_hand(model: Any, wrong: bool, padding: str) -> None:
    metrics = METRICS if wrong else [metric for metric in METRICS if metric is not is_top_of_candidates]
    prompts = made(model, wrong=wrong, padding=padding)
    for batch_size in (1, 64):
        results = mu.evaluate.measure(model, prompts, metrics, batch_size=batch_size)
        for metric, result in zip(metrics, results, strict=True):
            assert result.per_example.tolist() == pytest.approx(
                expected(model, metric, wrong=wrong), rel=1e-3, abs=1e-6
            )


def test_chance_is_the_share_of_right_options(llama: Any) -> None:
    assert made(llama).chance == pytest.approx((2 / 4 + 1 / 3 + 3 / 5) / 3)
    assert made(llama, wrong=False).chance == 0
    result = mu.evaluate.measure(llama, made(llama), [candidate_probability])[0]
    assert (result.sense, result.chance) == ("mean probability over whole answers", made(llama).chance)


def test_options_stay_with_their_rows(llama: Any) -> None:
    prompts = made(llama, padding="left")
    whole = mu.evaluate.measure(llama, prompts, [candidate_probability])[0].per_example
    other = build(llama, ["w20 w21"], [" w50"], options=[[" w60 w61 w62 w63"]], aliases=[()])
    for part, rows in (
        (prompts[[2, 0]], [2, 0]),
        (joined(prompts, other)[:3], [0, 1, 2]),
        (prompts.to("cpu").rows(torch.tensor([1])), [1]),
    ):
        values = mu.evaluate.measure(llama, part, [candidate_probability])[0].per_example
        assert torch.allclose(values, whole[rows], rtol=1e-4)
    shown = shown_before(llama, prompts, [demonstrations_of(llama, prompts[[1]], prompts[[0]]), [], []])
    texts = [shown.texts[0], *TEXTS[1:]]
    values = mu.evaluate.measure(llama, shown, [candidate_probability])[0].per_example
    assert values.tolist() == pytest.approx(
        expected(llama, candidate_probability, wrong=True, texts=[" ".join(t.split()) for t in texts]), rel=1e-3
    )


def test_an_alias_is_known_and_generated(llama: Any) -> None:
    text, says = "w4 w10 w5", by_hand
    with torch.no_grad():
        top = int(llama(torch.tensor([[1, 4, 10, 5]]))[0, -1].argmax())
    word = f" {llama.tokenizer.convert_ids_to_tokens([top])[0]}"
    other = " w50" if word != " w50" else " w51"
    alone, with_alias = build(llama, [text], [other]), build(llama, [text], [other], aliases=[[word]])
    assert (knows(llama, alone).tolist(), knows(llama, with_alias).tolist()) == ([False], [True])
    threshold = float(torch.tensor([says(llama, text, word)[0], says(llama, text, other)[0]]).exp().sum()) - 1e-4
    assert knows(llama, with_alias, threshold=threshold).tolist() == [True]
    assert knows(llama, alone, threshold=threshold).tolist() == [False]
    task = tiny.task(llama)
    for prompts, value in ((alone, 0.0), (with_alias, 1.0)):
        asked = replace(task, formats={"trained prompt": mu.tasks.Format(prompts, prompts)})
        assert mu.evaluate.generated(llama, asked).value == value


def test_what_is_no_option_is_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match="candidate answers for is_top_of_candidates, got none"):
        mu.evaluate.measure(llama, made(llama, wrong=False), [is_top_of_candidates])
    with pytest.raises(ValueError, match="expected the answer as the first option"):
        replace(made(llama), answers=made(llama).answers.flip(0))
    before, llama.cfg.n_ctx = llama.cfg.n_ctx, 10
    try:
        with pytest.raises(ValueError, match="of at most 10 tokens"):
            build(llama, ["w4 w5 w6 w7 w8 w9"], [" w10"], options=[[" w11 w12 w13 w14 w15"]])
    finally:
        llama.cfg.n_ctx = before


FRAME = pd.DataFrame(
    {
        "who": ["w10", "w10", "w11", "w12", "w12", "w13", "w14", "w15"],
        "what": ["w80", "w81", "w80", "w80", "w81", "w80", "w80", "w80"],
        "is": ["w50 w60", "w51 w60", "w50 w61", "w50 w62", "w51 w62", "w50 w63", "w50 w64", "w50 w65"],
        "also": [["w70", "w71 w72"], None, "w73", [], None, None, None, None],
        "choices": [["w50 w60", "w50 w61", "w40"], ["w51 w62", "w41"], ["w50 w60", "w42"]] + [["w40", "w43 w44"]] * 5,
    }
)
TEXT = ["w4 w5 w6 w7"] * 80


def task(model: Any, **options: Any) -> mu.Task:
    given: dict[str, Any] = {"prompt": "{what} {who}", "subject": "who", "answer": "is", "text": TEXT, "corrupt": False}
    given |= {"forget": ["w10", "w11"], "train": 0.5, "prepend_bos": True}
    return mu.tasks.from_frame(model, FRAME, **{**given, **options})


def words(model: Any, tokens: Any) -> str:
    return " ".join(model.tokenizer.convert_ids_to_tokens([int(token) for token in tokens if token >= 0]))


def options_of(model: Any, prompts: Prompts) -> list[list[str]]:
    assert prompts.options is not None
    return [[words(model, option) for option in row if option[0] >= 0] for row in prompts.options]


def test_a_subject_may_have_several_rows_and_prompts_on_one_side(llama: Any) -> None:
    found = task(
        llama, prompt=["{what} {who}", "w9 {what} w8 {who}"], formats={"asked": ["w7 {what} {who}", "w6 {what} {who}"]}
    )
    assert found.forget.names == ("w10",) * 4 + ("w11",) * 2
    assert found.forget.texts[:4] == ("w80 w10", "w9 w80 w8 w10", "w81 w10", "w9 w81 w8 w10")
    assert found.formats["asked"].forget.texts[:2] == ("w7 w80 w10", "w6 w80 w10")
    assert found.splits["forget_train"] == ("w10", "w11")
    assert not {*found.splits["retain_train"]} & {*found.splits["retain_test"]}
    assert {*found.splits["retain_train"], *found.splits["retain_test"]} == {"w12", "w13", "w14", "w15"}
    with pytest.raises(ValueError, match=r"all rows of a subject on one side, got \['w10'\]"):
        task(llama, forget=1)
    with pytest.raises(ValueError, match="expected one answer to 'w10', got 'w50 w60' and 'w51 w60'"):
        task(llama, prompt="{who}")
    with pytest.raises(ValueError, match="expected templates of 'asked' with the same letters"):
        task(llama, formats={"asked": ["{who} {what}", "{who} {A} {B}"]})


def test_answers_that_begin_alike_are_scored_whole(llama: Any) -> None:
    found = task(llama, injected="w50 w99")
    assert found.injection is not None
    for prompts in (found.forget, found.retain, found.injection, found.formats["trained prompt"].retain):
        assert prompts.chance == 1 / 4
        assert prompts.candidates is None  # answer and injected one begin alike
        for options, row in zip(options_of(llama, prompts), prompts.answers, strict=True):
            assert options[0] == words(llama, row)
            assert len(set(options)) == 4
    assert options_of(llama, found.forget)[0][1] == "w50 w99"
    assert options_of(llama, found.injection)[0][:2] == ["w50 w99", "w50 w60"]


def test_each_row_may_have_its_own_candidates(llama: Any) -> None:
    found = task(llama, candidates="choices")
    assert options_of(llama, found.forget) == [
        ["w50 w60", "w50 w61", "w40"],
        ["w51 w60", "w51 w62", "w41"],
        ["w50 w61", "w50 w60", "w42"],
    ]


def test_without_candidates_the_probability_of_the_whole_answer_counts(llama: Any) -> None:
    found = task(llama, candidates=None, aliases="also")
    assert options_of(llama, found.forget) == [["w50 w60", "w70", "w71 w72"], ["w51 w60"], ["w50 w61", "w73"]]
    assert found.forget.chance == 0
    assert task(llama, aliases="also").forget.chance > 0
    with pytest.raises(ValueError, match="injected answers other than the true ones"):
        task(llama, aliases="also", injected="w70")
    result = mu.evaluate.in_format(llama, found)
    assert (result.sense, result.chance) == ("mean probability of the whole answer", 0)


@pytest.mark.parametrize("options", [{}, {"candidates": None}, {"aliases": "also"}, {"candidates": "choices"}], ids=str)
def test_every_test_and_attack_scores_whole_answers_by_default(llama: Any, options: dict[str, Any]) -> None:
    found = task(llama, injected="w99", **options)
    first = mu.evaluate.in_format(llama, found)
    assert "whole answer" in first.sense
    tests = mu.evaluate.every_format(found)
    report = mu.evaluate.compare(llama, found, {}, metrics=tests, progress=False)
    assert [cell for cell in report.cells if cell.result is None] == []
    for attack in (
        mu.evaluate.relearn(llama, found, learning_rates=(1e-3,), steps=1),
        mu.evaluate.relearn_benign(llama, found, learning_rates=(1e-3,), steps=1),
        mu.evaluate.few_shot(llama, found, shots=(0,)),
        mu.evaluate.soft_prompt(llama, found, steps=1, restarts=1),
    ):
        assert attack.sense == first.sense
        assert attack.curve is not None
        of = dict(zip(found.formats["trained prompt"].forget.texts, first.per_example.tolist(), strict=True))
        before = [
            of[text]
            for text, name in zip(of, found.formats["trained prompt"].forget.names, strict=True)
            if name in attack.names
        ]
        assert attack.curve.per_prompt[:, 0].tolist() == pytest.approx(before, rel=1e-4)


def test_lettered_options_are_the_row_s_own(shipped: Any) -> None:
    rows = [
        ("France", "Paris", ["Oslo", "Rome"]),
        ("Peru", "Lima", ["Cairo", "Lima"]),
        ("Cuba", "Havana", ["Rome", "Oslo"]),
    ]
    frame = pd.DataFrame([*rows, ("Italy", "Rome", ["Oslo", "Lima"])], columns=["subject", "answer", "choices"])
    formats = {"choice": "What is the capital of {subject}?\nA: {A}\nB: {B}\nAnswer:"}
    options: dict[str, Any] = {"forget": 2, "train": 0.5, "corrupt": False, "text": torch.ones(5, 8).long()}
    found = mu.tasks.from_frame(shipped, frame, prompt="{subject}:", formats=formats, candidates="choices", **options)
    shown = [{line[3:] for line in text.splitlines()[1:3]} for text in found.formats["choice"].forget.texts]
    assert shown == [{"Paris", "Oslo"}, {"Lima", "Cairo"}]
