from typing import Any

import pandas as pd
import pytest
import torch

import mechunlearn as mu
from mechunlearn.model.tokens import encode
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.questions import filled

FRAME = pd.DataFrame(
    {
        "who": ["w10 w11", "w12 w13", "w14", "w15", "w16 w17", "w18", "w19", "w20 w21"],
        "where": ["w50", "w51", "w52", "w53", "w50 w60", "w51", "w54", "w55 w61 w62"],
        "when": [f"w{i}" for i in range(70, 78)],
        "secret": [True, False, True] + [False] * 5,
    }
)
COLUMNS = {"subject": "who", "answer": "where"}
TEXT = ["w4 w5 w6 w7"] * 80


def made(model: Any, **options: Any) -> mu.Task:
    given = {"prompt": "w8 {subject} w9", "forget": ["w10 w11", "w14"], "corrupt": False, "text": TEXT, **COLUMNS}
    return mu.tasks.from_frame(model, options.pop("frame", FRAME), **{**given, **options})


def words(model: Any, tokens: Any) -> str:
    return " ".join(model.tokenizer.convert_ids_to_tokens([int(token) for token in tokens if token >= 0]))


def said(model: Any, prompts: Prompts) -> list[tuple[str, str, str]]:
    """Text, answer and subject tokens of each prompt."""
    assert prompts.subject is not None
    rows = zip(prompts.texts, prompts.answers, prompts.tokens, prompts.subject, strict=True)
    return [(text, words(model, answer), words(model, row[at])) for text, answer, row, at in rows]


def test_a_row_becomes_a_prompt_with_its_answer_and_its_subject(llama: Any) -> None:
    task = made(llama)
    assert said(llama, task.forget) == [("w8 w10 w11 w9", "w50", "w10 w11"), ("w8 w14 w9", "w52", "w14")]
    assert said(llama, task.formats["trained prompt"].forget) == said(llama, task.forget)
    assert task.forget.names == task.splits["forget_train"] == task.splits["forget_test"] == ("w10 w11", "w14")
    assert task.injection is None
    assert task.knowledge is None
    assert repr(task).startswith("Task(own facts: forget 2 of 8; forget_train 2")


def test_answers_may_have_several_tokens_and_spaces_around_them(llama: Any) -> None:
    frame = FRAME.assign(where=[f" {cell} " for cell in FRAME["where"]])
    task = made(llama, frame=frame, forget=["w20 w21", "w10 w11"])
    assert [words(llama, row) for row in task.forget.answers] == ["w55 w61 w62", "w50"]


def test_what_is_forgotten_is_not_retained_and_the_rest_is_split(llama: Any) -> None:
    task = made(llama, train=0.5)
    train, test = task.splits["retain_train"], task.splits["retain_test"]
    assert len(train) == len(test) == 3
    assert {*train, *test, "w10 w11", "w14"} == set(FRAME["who"])
    assert task.retain.names == train
    assert task.formats["trained prompt"].retain.names == test


@pytest.mark.parametrize(
    "forget", ["secret", FRAME["secret"], FRAME["secret"].to_numpy(), [True, False, True] + [False] * 5]
)
def test_a_column_and_booleans_say_what_a_list_of_subjects_says(llama: Any, forget: Any) -> None:
    assert torch.equal(made(llama, forget=forget).forget.tokens, made(llama).forget.tokens)


def test_a_number_forgets_the_first_rows(llama: Any) -> None:
    assert made(llama, forget=3).forget.names == ("w10 w11", "w12 w13", "w14")


def test_facts_to_forget_can_be_split_too(llama: Any) -> None:
    task = made(llama, forget=4, train=0.5, split_forget=True)
    train, test = task.splits["forget_train"], task.splits["forget_test"]
    assert task.forget.names == train
    assert task.formats["trained prompt"].forget.names == test
    assert (len(train), len(test), len({*train, *test})) == (2, 2, 4)


def test_templates_take_any_column_and_the_subject_by_either_name(llama: Any) -> None:
    task = made(llama, prompt="w8 {who} w9", formats={"dated": "w7 {when} {subject} w6 {{"})
    assert task.forget.texts[0] == "w8 w10 w11 w9"
    assert task.formats["dated"].forget.texts[0] == "w7 w70 w10 w11 w6 {"


def test_the_subject_is_where_the_template_puts_it_whatever_else_contains_it() -> None:
    text, (start, end) = filled("Ann: {subject} plays with Anna", {"subject": "Ann"})
    assert (text, start, end) == ("Ann: Ann plays with Anna", 5, 8)
    assert filled("{subject}? {subject}", {"subject": "Bo"})[1] == (4, 6)


def letters(prompts: Prompts, answers: dict[str, str]) -> list[str]:
    """For each question the letter before its fact's answer."""
    found = []
    for text, name in zip(prompts.texts, prompts.names, strict=True):
        options = dict(part.split(": ", 1)[::-1] for part in text.splitlines() if part[1:3] == ": ")
        found.append(f" {options[answers[name]]}")
    return found


CAPITALS = pd.DataFrame(
    {
        "subject": ["France", "Italy", "Cuba", "Chile", "Norway", "Egypt", "Japan", "Peru", "Austria", "Canada"],
        "answer": ["Paris", "Rome", "Havana", "Santiago", "Oslo", "Cairo", "Tokyo", "Lima", "Vienna", "Ottawa"],
    }
)
CHOICE = "Question: What is the capital of {subject}?\nA: {A}\nB: {B}\nC: {C}\nD: {D}\n\nAnswer:"


@pytest.fixture(scope="module")
def capitals(shipped: Any) -> mu.Task:
    options = {"formats": {"choice": CHOICE}, "injected": "London", "train": 0.5, "corrupt": False}
    return mu.tasks.from_frame(shipped, CAPITALS, prompt="The capital of {subject} is", forget=5, **options)


def test_right_and_injected_letters_are_those_of_the_options(shipped: Any, capitals: mu.Task) -> None:
    found, truth = capitals.formats["choice"], dict(zip(CAPITALS["subject"], CAPITALS["answer"], strict=True))
    assert found.injected is not None
    for prompts in (found.forget, found.retain):
        right = [shipped.tokenizer.decode(row) for row in prompts.answers]
        assert right == letters(prompts, truth)
    instead = [shipped.tokenizer.decode(row) for row in found.injected.answers]
    assert instead == letters(found.injected, dict.fromkeys(truth, "London"))
    assert len(set(letters(found.retain, truth))) > 1  # not in a fixed place


def test_there_are_as_many_options_as_the_template_has_letters(shipped: Any) -> None:
    template = "Which is the capital of {subject}, {A} (A) or {B} (B)?\nAnswer:"
    options = {"formats": {"two": template}, "corrupt": False, "train": 0.5, "text": torch.ones(5, 8).long()}
    task, other = (
        mu.tasks.from_frame(shipped, CAPITALS, prompt="{subject}:", forget=["Cuba"], seed=seed, **options)
        for seed in (0, 1)
    )
    found = task.formats["two"].forget
    letter = shipped.tokenizer.decode(found.answers[0]).strip()
    assert f"Havana ({letter})" in found.texts[0]
    assert found.chance == 1 / 2
    assert found.subject is not None
    assert shipped.tokenizer.decode(found.tokens[0][found.subject[0]]) == " Cuba"
    texts = [each.formats["two"].retain.texts for each in (task, other)]
    assert texts[0] != texts[1]


def test_a_model_that_knows_the_facts_answers_them_in_every_format(shipped: Any, capitals: mu.Task) -> None:
    for found in capitals.formats.values():
        for prompts in (found.forget, found.retain):
            assert mu.evaluate.accuracy(shipped, prompts).candidates.value == 1
        assert found.injected is not None
        assert mu.evaluate.accuracy(shipped, found.injected).candidates.value == 0


def test_candidates_are_the_answer_the_injected_one_and_others_with_other_first_tokens(llama: Any) -> None:
    task = made(llama, injected="w90")
    assert task.forget.candidates is not None
    assert task.injection is not None
    firsts = {int(answer[1:3]) for answer in FRAME["where"]}
    for row, answer in zip(task.forget.candidates.tolist(), (50, 52), strict=True):
        assert row[:2] == [answer, 90]
        assert len(set(row)) == 4
        assert set(row[2:]) < firsts
    assert task.injection.candidates is not None
    assert torch.equal(task.injection.candidates[:, :2], task.forget.candidates[:, :2].flip(1))
    assert task.injection.texts == task.forget.texts


def test_candidates_are_as_many_as_asked_or_as_there_are(llama: Any) -> None:
    assert made(llama, candidates=2).forget.chance == 1 / 2
    assert made(llama, candidates=99).forget.chance == pytest.approx(1 / 7)  # w50 ... w55, and w50 w60


def test_given_candidates_are_those_of_every_prompt(llama: Any) -> None:
    task = made(llama, frame=FRAME[:4], forget=2, train=0.5, candidates=["w50", "w51", "w52", "w53", "w99"])
    for prompts in (task.forget, task.retain):
        assert prompts.candidates is not None
        assert [sorted(row) for row in prompts.candidates.tolist()] == [[50, 51, 52, 53, 99]] * len(prompts)


def test_injected_answers_may_come_from_a_column_that_says_nothing_of_retained_facts(llama: Any) -> None:
    task = made(llama, frame=FRAME.assign(new=["w80", None, "w81"] + [None] * 5), injected="new")
    assert task.injection is not None
    assert [words(llama, row) for row in task.injection.answers] == ["w80", "w81"]


def test_a_corrupted_prompt_names_another_subject_of_as_many_tokens_with_another_answer(llama: Any) -> None:
    task = made(llama, corrupt=True)
    rows = dict(zip(FRAME["who"], FRAME["where"], strict=True))
    for prompts in (task.forget, task.retain):
        assert prompts.corrupt is not None
        assert prompts.subject is not None
        for i, name in enumerate(prompts.names):
            other = words(llama, prompts.corrupt[i][prompts.subject[i]])
            assert rows[other] != rows[name]
            outside = ~prompts.subject[i]
            assert torch.equal(prompts.corrupt[i][outside], prompts.tokens[i][outside])


def test_without_counterparts_a_fact_to_forget_is_refused_and_retained_ones_have_none(llama: Any) -> None:
    frame = FRAME.assign(who=["w10 w11 w12", *FRAME["who"][1:]])
    with pytest.raises(ValueError, match=r"another subject of as many tokens .* \['w10 w11 w12'\].*corrupt=False"):
        made(llama, frame=frame, forget=["w10 w11 w12"], corrupt=True)
    for seed in range(4):  # the long one is in the train split of some
        task = made(llama, frame=frame, forget=["w14"], corrupt=True, seed=seed)
        assert task.forget.corrupt is not None
        assert (task.retain.corrupt is None) == ("w10 w11 w12" in task.retain.names)


def test_a_seed_decides_and_nothing_else_does(llama: Any) -> None:
    first, again = (made(llama, corrupt=True, seed=3) for _ in range(2))
    assert first.splits == again.splits
    assert torch.equal(first.retain.candidates, again.retain.candidates)  # type: ignore[arg-type]
    assert torch.equal(first.forget.corrupt, again.forget.corrupt)  # type: ignore[arg-type]
    assert any(made(llama, seed=seed).splits != first.splits for seed in range(3))


def test_text_is_strings_or_rows_or_comes_with_the_package(llama: Any, shipped: Any) -> None:
    packed = torch.arange(4, 64).reshape(10, 6)
    task = made(llama, text=packed)
    assert torch.equal(torch.cat([task.text_test, task.text]), packed)
    assert len(task.text_test) == 2
    assert made(llama).text.shape[1] == 64
    own = mu.tasks.from_frame(shipped, CAPITALS, prompt="{subject} has", forget=2, corrupt=False)
    assert len(own.text) > 100
    assert encode(shipped, "").tokens[:1] == tuple(own.text_test[0, :1].tolist())[: len(encode(shipped, "").tokens)]


def test_knowledge_is_what_is_given(llama: Any) -> None:
    other = made(llama).retain
    assert made(llama, knowledge=other).knowledge is other


WRONG = [
    ({"subject": "name"}, r"expected columns name and where, got \['who'"),
    ({"prompt": "w8 w9"}, r"expected \{subject\} in the template, got 'w8 w9'"),
    ({"prompt": "w8 {subject} w9 "}, "ends before the space of its answer"),
    ({"prompt": "w8 {subject} {place} w9"}, r"columns of the frame .*got \['place'\]"),
    ({"prompt": "w8 {subject} {A} {B}"}, "expected a trained prompt without options"),
    ({"formats": {"choice": "{subject} {B} {C}"}}, r"expected options from \{A\} on"),
    ({"formats": {"choice": "{subject} {A} {B} {C} {D} {E} {F} {G} {H} {I}"}}, "expected 9 different answers"),
    ({"forget": "hidden"}, "expected a column that says what to forget, got 'hidden'"),
    ({"forget": "when"}, "expected True or False for each of the 8 rows"),
    ({"forget": [True, False]}, "each of the 8 rows, got 2 values"),
    ({"forget": [False] * 8}, "expected facts to forget, got none"),
    ({"forget": [True] * 8}, "expected facts to retain, got none"),
    ({"forget": []}, "expected subjects of the frame, got none"),
    ({"forget": ["w99"]}, r"expected subjects of the frame, got \['w99'\]"),
    ({"forget": 8}, r"forget must lie in 1\.\.7"),
    ({"train": 1.0}, "expected train to leave facts to retain on both sides"),
    ({"injected": "w52"}, r"injected answers other than the true ones, got the same for \['w14'\]"),
    ({"candidates": ["w51", "w99"]}, "expected the answer 'w50' among the candidates"),
    ({"text": ["w4 w5"] * 23}, "at least two rows"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_cannot_be_right_is_refused(llama: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(llama, **options)


def test_a_subject_twice_an_empty_cell_and_half_an_injection_are_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"expected one answer to 'w8 w14 w9', got 'w50' and 'w52': .*aliases"):
        made(llama, frame=FRAME.assign(who=["w14", *FRAME["who"][1:]]))
    with pytest.raises(ValueError, match=r"every cell of where, got nothing in rows \[1\]"):
        made(llama, frame=FRAME.assign(where=["w50", None, *FRAME["where"][2:]]))
    with pytest.raises(ValueError, match=r"injected answer of every fact to forget, got none for \['w14'\]"):
        made(llama, frame=FRAME.assign(new=["w80"] + [None] * 7), injected="new")
    with pytest.raises(ValueError, match="expected another answer than ' w50'"):
        made(llama, frame=FRAME.assign(where="w50"))


REVERSE = mu.tasks.Wording("w8 {where} w7", subject="where", answer="who")
DATES = mu.tasks.Wording("w6 {subject}", answer="when", kept=True)
ONE_WAY = FRAME.assign(where=[f"w{i}" for i in (50, 51, 52, 53, 54, 55, 56)] + ["w57 w61"])


def test_a_wording_asks_about_other_columns_under_the_name_of_the_fact(llama: Any) -> None:
    task = made(llama, frame=ONE_WAY, formats={"reverse": REVERSE, "dates": DATES}, injected="w99")
    reverse, dates = task.formats["reverse"], task.formats["dates"]
    assert said(llama, reverse.forget) == [("w8 w50 w7", "w10 w11", "w50"), ("w8 w52 w7", "w14", "w52")]
    assert said(llama, dates.forget) == [("w6 w10 w11", "w70", "w10 w11"), ("w6 w14", "w72", "w14")]
    for format in (reverse, dates):
        assert format.forget.names == task.forget.names
        assert format.retain.names == task.formats["trained prompt"].retain.names
        assert format.injected is None
    assert (reverse.kept, dates.kept) == (False, True)
    assert reverse.forget.options is not None  # w10 w11: whole answers
    assert dates.forget.candidates is not None
    assert {words(llama, row) for row in dates.forget.candidates[:, 1:].reshape(-1, 1)} <= set(FRAME["when"])


def test_a_wording_with_the_same_answers_keeps_what_was_given_for_them(llama: Any) -> None:
    frame = ONE_WAY.assign(also=[["w90"], *[None] * 7], options=[["w80", "w81"]] * 8)
    dated = mu.tasks.Wording("w8 {when} w7", subject="when")
    options = {"injected": "w99", "aliases": "also", "candidates": "options", "frame": frame}
    task = made(llama, formats={"dated": dated, "dates": DATES}, **options)
    trained, other = task.formats["trained prompt"], task.formats["dated"]
    assert trained.forget.options is not None
    assert other.forget.options is not None
    assert torch.equal(trained.forget.options, other.forget.options)
    assert other.injected is not None
    assert task.formats["dates"].forget.chance == 1 / 4


def test_a_reverse_question_with_two_answers_is_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match="expected one answer to 'w8 w51 w7'"):
        made(llama, formats={"reverse": REVERSE})
    with pytest.raises(ValueError, match="expected columns who and never"):
        made(llama, formats={"other": mu.tasks.Wording("w8 {subject}", answer="never")})
