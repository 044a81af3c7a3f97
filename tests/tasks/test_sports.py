import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import mechunlearn.testbed
from mechunlearn.evaluate import accuracy
from mechunlearn.tasks import (
    Prompts,
    Task,
    facts,
    formats,
    general_knowledge,
    sports_facts,
    validation_split,
    with_random_subjects,
)

SPORTS = ("football", "baseball", "basketball")
SPORT_OF = {row["athlete"]: row["sport"] for row in facts.athletes()}
TEXT = ["The rain fell softly on the roof all night. " * 40] * 3
SIDES = ("forget_train", "forget_test", "retain_train", "retain_test")
NAMES = [
    f"{first} {last}" for first in ("Ada", "Bob", "Cy", "Dan") for last in ("Reed", "Hill", "Wood", "Stone", "Lake")
]
MULTIPLE_CHOICE = ("multiple choice", "multiple choice, system prompt")
LETTERED = (
    *MULTIPLE_CHOICE,
    "multiple choice, zero-shot",
    "multiple choice, zero-shot, system prompt",
    "multiple choice, two-shot",
)
IN_WORDS = tuple(
    f"multiple choice in words{shots}{system}" for shots in ("", ", zero-shot") for system in ("", ", system prompt")
)
NEIGHBOURS = ("neighbourhood, position", "neighbourhood, city")


@cache
def model() -> Any:
    return mechunlearn.testbed.load()


def table() -> pd.DataFrame:
    """Twenty made-up athletes; sports in turn, so that same names differ in sport."""
    return pd.DataFrame({"athlete": NAMES, "sport": [SPORTS[i % 3] for i in range(len(NAMES))]})


def small(forget: str | int | Sequence[str] = "basketball", **options: Any) -> Task:
    return sports_facts(model(), forget=forget, **{"source": table(), "text": TEXT, **options})


@cache
def whole() -> Task:
    """All 495 athletes of the package."""
    return sports_facts(model(), forget="basketball", text=TEXT)


def decoded(tokens: torch.Tensor) -> list[str]:
    return [model().tokenizer.decode([token]) for token in tokens.tolist()]


def texts_of(prompts: Prompts, tokens: torch.Tensor) -> list[str]:
    return [model().tokenizer.decode(row[real][1:]) for row, real in zip(tokens, prompts.attention_mask, strict=True)]


def everything(task: Task) -> list[Prompts]:
    assert task.injection is not None
    assert task.knowledge is not None
    asked = [prompts for format in task.formats.values() for prompts in (format.forget, format.retain)]
    return [task.forget, task.retain, task.injection, task.knowledge, *asked]


def same(first: Prompts, second: Prompts) -> bool:
    tensors = ("tokens", "attention_mask", "positions", "answers", "candidates", "subject", "corrupt")
    pairs = [(getattr(first, name), getattr(second, name)) for name in tensors]
    return first.texts == second.texts and all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_splits_partition_the_athletes() -> None:
    for task, names in ((whole(), {n for n, s in SPORT_OF.items() if s in SPORTS}), (small(), set(NAMES))):
        listed = [name for side in SIDES for name in task.splits[side]]
        assert len(listed) == len(set(listed))
        assert set(listed) == names


def test_forget_is_the_sport_and_retain_the_others() -> None:
    splits = whole().splits
    assert {SPORT_OF[name] for side in SIDES[:2] for name in splits[side]} == {"basketball"}
    assert {SPORT_OF[name] for side in SIDES[2:] for name in splits[side]} == {"football", "baseball"}
    assert len(splits["forget_train"]) == round(0.8 * 165)
    assert len(splits["retain_train"]) == round(0.8 * 330)


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_train_is_the_share_to_edit_on(share: float) -> None:
    splits = small("football", train=share).splits
    assert len(splits["forget_train"]) == round(share * 7)
    assert len(splits["retain_train"]) == round(share * 13)


def test_prompts_are_those_of_the_splits() -> None:
    task = whole()
    assert task.forget.names == task.splits["forget_train"]
    assert task.retain.names == task.splits["retain_train"]
    assert all(format.forget.names == task.splits["forget_test"] for format in task.formats.values())
    assert all(format.retain.names == task.splits["retain_test"] for format in task.formats.values())


def test_trained_prompts_ask_as_the_paper_does_for_the_true_sport() -> None:
    task = whole()
    for prompts in (
        task.forget,
        task.retain,
        task.formats["trained prompt"].forget,
        task.formats["trained prompt"].retain,
    ):
        assert prompts.texts == tuple(formats.FACT.format(athlete=name) for name in prompts.names)
        assert texts_of(prompts, prompts.tokens) == list(prompts.texts)
        assert decoded(prompts.answers[:, 0]) == [f" {SPORT_OF[name]}" for name in prompts.names]


def test_every_paraphrase_asks_for_the_true_sport_of_the_subject() -> None:
    for name, format in whole().formats.items():
        for prompts in (format.forget, format.retain):
            assert all(who in text for who, text in zip(prompts.names, prompts.texts, strict=True))
            if name not in (*LETTERED, *NEIGHBOURS, "capitalised"):
                assert decoded(prompts.answers[:, 0]) == [f" {SPORT_OF[who]}" for who in prompts.names]


def test_formats_are_the_trained_prompt_first_then_paraphrases_then_multiple_choice_then_the_rest() -> None:
    paraphrases = [name.replace("_", " ") for name in formats.PARAPHRASES]
    rest = [*LETTERED, *IN_WORDS, "capitalised", *NEIGHBOURS]
    assert list(whole().formats) == ["trained prompt", *paraphrases, *rest]


def test_published_numbers_are_of_these_prompts() -> None:
    """Another format may be added, but no draw of an older one may change: tables of the README would."""
    older = ["trained prompt", *(name.replace("_", " ") for name in formats.PARAPHRASES), *MULTIPLE_CHOICE]
    asked = [whole().formats[name] for name in older]
    texts = [text for format in asked for side in (format.forget, format.retain) for text in side.texts]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "e375ebfb349db4a5"


def test_subjects_are_the_names_in_every_format() -> None:
    asked = [prompts for format in whole().formats.values() for prompts in (format.forget, format.retain)]
    for prompts in (whole().forget, whole().retain, *asked):
        assert prompts.subject is not None
        for row, at, name in zip(prompts.tokens, prompts.subject, prompts.names, strict=True):
            assert model().tokenizer.decode(row[at]).strip(" :") == name


def test_candidates_are_four_different_answers_the_true_one_first() -> None:
    position = whole().formats["neighbourhood, position"]  # basketball has three
    for prompts in everything(whole()):
        count = 3 if prompts in (position.forget, position.retain) else 4
        assert prompts.candidates is not None
        assert prompts.chance == 1 / count
        assert torch.equal(prompts.candidates[:, 0], prompts.answers[:, 0])
        assert all(len(set(row)) == count for row in prompts.candidates.tolist())
    assert set(decoded(whole().forget.candidates[0])) == {" football", " baseball", " basketball", " golf"}  # type: ignore[index]


def test_a_corrupted_prompt_names_another_athlete_of_another_sport_in_as_many_tokens() -> None:
    task = whole()
    before, after = formats.FACT.split("{athlete}")
    for prompts in (task.forget, task.retain):
        assert prompts.corrupt is not None
        for name, text in zip(prompts.names, texts_of(prompts, prompts.corrupt), strict=True):
            assert text.startswith(before)
            assert text.endswith(after)
            other = text.removeprefix(before).removesuffix(after)
            assert SPORT_OF[other] in SPORTS
            assert SPORT_OF[other] != SPORT_OF[name]
        assert torch.equal(prompts.corrupt[~prompts.attention_mask], prompts.tokens[~prompts.attention_mask])


def test_corrupted_partners_vary() -> None:
    prompts = whole().forget
    assert prompts.corrupt is not None
    assert len(set(texts_of(prompts, prompts.corrupt))) > len(prompts) / 4


@pytest.mark.parametrize("name", LETTERED)
def test_the_letter_of_a_multiple_choice_question_is_that_of_the_true_sport(name: str) -> None:
    format = whole().formats[name]
    for prompts in (format.forget, format.retain):
        for who, text, letter in zip(prompts.names, prompts.texts, decoded(prompts.answers[:, 0]), strict=True):
            asked = text.rsplit("Question: ", 1)[1]
            assert asked.startswith(f"What sport does {who} play?")
            assert f"\n{letter.strip()}: {SPORT_OF[who].capitalize()}\n" in asked


@pytest.mark.parametrize("name", MULTIPLE_CHOICE)
def test_letters_of_answers_and_of_the_example_are_spread_evenly(name: str) -> None:
    format = whole().formats[name]
    letters = Counter(decoded(format.retain.answers[:, 0]))
    # 66 questions: 16.5 of each letter, at least 5 but for one time in two thousand.
    assert set(letters) == {" A", " B", " C", " D"}
    assert min(letters.values()) >= 5
    shown = Counter(text.split("Answer: ")[1][0] for text in format.retain.texts)
    assert set(shown) == set("ABCD")


@pytest.mark.parametrize("name", MULTIPLE_CHOICE)
def test_the_example_of_a_multiple_choice_question_is_right(name: str) -> None:
    for text in whole().formats[name].retain.texts:
        example, letter = text.split("\n\n")[0], text.split("Answer: ")[1][0]
        assert "Tiger Woods" in example
        assert f"\n{letter}: Golf" in example
        assert text.startswith(formats.SYSTEM) == (name != "multiple choice")


@pytest.mark.parametrize("name", LETTERED + IN_WORDS)
def test_answered_examples_are_right_and_never_of_a_tested_athlete(name: str) -> None:
    format = whole().formats[name]
    tested = {*format.forget.names, *format.retain.names}
    shots = 0 if "zero-shot" in name else 2 if "two-shot" in name else 1
    for text in (*format.forget.texts, *format.retain.texts):
        assert text.startswith(formats.SYSTEM) == ("system prompt" in name)
        *shown, _ = text.split("Question: What sport does ")[1:]
        assert len(shown) == shots
        assert not shots or shown[-1].startswith("Tiger Woods play")
        for example in shown:
            who, answer = example.split(" play", 1)[0], example.rstrip().rsplit(": ", 1)[1]
            sport = answer if name in IN_WORDS else example.split(f"\n{answer}: ")[1].split("\n")[0].lower()
            assert sport == SPORT_OF[who]
            assert who not in tested


@pytest.mark.parametrize("name", IN_WORDS)
def test_options_in_words_are_the_four_sports_in_random_order(name: str) -> None:
    listed = []
    for text in whole().formats[name].retain.texts:
        asked = text.rsplit(" play, ", 1)[1].removesuffix("?\nAnswer:")
        listed.append(tuple(asked.replace(" or ", ", ").split(", ")))
        assert sorted(listed[-1]) == sorted((*SPORTS, "golf"))
    assert len(set(listed)) > 12  # of 24 orders, in 66 draws


def test_capitalised_answers_are_the_true_sports() -> None:
    for prompts in (whole().formats["capitalised"].forget, whole().formats["capitalised"].retain):
        assert decoded(prompts.answers[:, 0]) == [f" {SPORT_OF[name].capitalize()}" for name in prompts.names]


@pytest.mark.parametrize("attribute", ["position", "city"])
def test_the_neighbourhood_is_another_fact_with_options_of_the_same_sport(attribute: str) -> None:
    known = {row["athlete"]: row for row in facts.athletes()}
    format = whole().formats[f"neighbourhood, {attribute}"]
    firsts: dict[str, set[str]] = {sport: set() for sport in SPORTS}
    for row in facts.athletes():
        if row["sport"] in SPORTS:
            firsts[row["sport"]].add(decoded(torch.tensor(model().tokenizer.encode(f" {row[attribute]}")[1:2]))[0])
    for prompts in (format.forget, format.retain):
        assert prompts.candidates is not None
        for name, row, real, shown in zip(
            prompts.names, prompts.answers, prompts.answer_mask, prompts.candidates, strict=True
        ):
            assert model().tokenizer.decode(row[real]) == f" {known[name][attribute]}"
            assert set(decoded(shown)) <= firsts[SPORT_OF[name]]


def test_only_the_neighbourhood_is_kept_on_both_sides() -> None:
    assert {name for name, format in whole().formats.items() if format.kept} == set(NEIGHBOURS)


def test_a_source_has_a_neighbourhood_if_it_knows_one() -> None:
    known = table().assign(position=["guard", "pitcher", "center", "end", "safety"] * 4, city=["Rome", " "] * 10)
    assert not set(NEIGHBOURS) & set(small().formats)
    assert set(NEIGHBOURS) & set(small(source=known).formats) == {"neighbourhood, position"}  # some have no city
    assert "neighbourhood, city" not in small(source=known.assign(city="Rome")).formats  # nothing to choose from


@pytest.mark.parametrize("name", ["question", "multiple choice, two-shot", "multiple choice in words", "capitalised"])
def test_the_injected_answer_is_asked_in_every_format_of_the_sport(name: str) -> None:
    for format, injected in ((whole().formats[name], "golf"), (small(injected="football").formats[name], "football")):
        assert format.injected is not None
        assert format.injected.texts == format.forget.texts
        assert torch.equal(format.injected.tokens, format.forget.tokens)
        for text, answer in zip(format.injected.texts, decoded(format.injected.answers[:, 0]), strict=True):
            asked = text.rsplit("Question: ", 1)[-1]
            shown = asked.split(f"\n{answer.strip()}: ")[1].split("\n")[0] if name in LETTERED else answer.strip()
            assert shown.lower() == injected


def test_a_validation_split_keeps_what_formats_say() -> None:
    task = validation_split(whole()).final
    for name, format in task.formats.items():
        assert format.kept == (name in NEIGHBOURS)
        assert (format.injected is None) == format.kept
        assert format.injected is None or format.injected.names == format.forget.names


@pytest.mark.parametrize("injected", ["golf", "football"])
def test_the_injection_is_forget_with_another_answer(injected: str) -> None:
    task = small(injected=injected)
    assert task.injection is not None
    assert task.injection.texts == task.forget.texts
    assert set(decoded(task.injection.answers[:, 0])) == {f" {injected}"}
    assert torch.equal(task.injection.tokens, task.forget.tokens)


def test_general_text_is_split_without_overlap() -> None:
    lines = ["The rain fell. " * 60, "A cold wind blew. " * 60, "The sun came out. " * 60]
    task = small(text=lines)
    assert len(task.text_test) == (len(task.text) + len(task.text_test)) // 5
    assert task.text.shape[1] == task.text_test.shape[1]


def test_little_general_text_is_split_without_overlap() -> None:
    task = small(text=["The sun came out after the long storm and a cold wind blew across the empty field. " * 10])
    train, test = ({tuple(row) for row in rows.tolist()} for rows in (task.text, task.text_test))
    assert not train & test


def test_without_text_there_are_everyday_sentences() -> None:
    task = sports_facts(model(), source=table())
    assert len(task.text) > 100
    assert len(task.text_test) > 25
    assert not {tuple(row) for row in task.text.tolist()} & {tuple(row) for row in task.text_test.tolist()}


def test_one_seed_gives_one_task_and_seeds_differ() -> None:
    first, again, other = small(seed=1), small(seed=1), small(seed=2)
    assert first.splits == again.splits
    assert all(same(a, b) for a, b in zip(everything(first), everything(again), strict=True))
    assert first.splits != other.splits
    assert not same(first.knowledge, other.knowledge)  # type: ignore[arg-type]


def test_the_seed_fixes_partners_and_options_whatever_the_split() -> None:
    first, other = small(10, seed=1), small(10, seed=2)
    assert first.forget.texts == other.forget.texts
    assert not torch.equal(first.forget.corrupt, other.forget.corrupt)  # type: ignore[arg-type]
    name = "multiple choice"
    assert sorted(first.formats[name].forget.names) == sorted(other.formats[name].forget.names)
    assert first.formats[name].forget.texts != other.formats[name].forget.texts


@pytest.mark.parametrize("forget", [4, NAMES[:4], tuple(NAMES[:4])], ids=["number", "list", "tuple"])
def test_single_athletes_are_trained_and_evaluated_on_and_the_rest_is_split(forget: Any) -> None:
    task = small(forget)
    assert task.splits["forget_train"] == task.splits["forget_test"] == tuple(NAMES[:4])
    assert task.formats["question"].forget.names == tuple(NAMES[:4])
    retained = task.splits["retain_train"] + task.splits["retain_test"]
    assert sorted(retained) == sorted(NAMES[4:])
    sports = table().set_index("athlete")["sport"]
    assert decoded(task.forget.answers[:, 0]) == [f" {sports[name]}" for name in NAMES[:4]]


def test_the_task_is_named_for_what_it_forgets() -> None:
    assert small("baseball").name == "sports facts: forget baseball"
    assert small(4).name == "sports facts: forget 4"
    assert small(NAMES[:3]).name == "sports facts: forget 3 athletes"
    assert "forget_train 4, forget_test 4" in repr(small(4))


@pytest.mark.parametrize("as_text", [False, True])
def test_a_csv_file_is_a_source(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "athletes.csv"
    table().assign(team="x").to_csv(path, index=False)
    task = small(source=str(path) if as_text else path)
    assert all(same(a, b) for a, b in zip(everything(task), everything(small()), strict=True))


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ("Basketball", r"expected a sport of the source \(football, baseball, basketball\), got 'Basketball'"),
        ("golf", "expected a sport of the source .* got 'golf'"),
        (0, r"forget must lie in 1..19 \(athletes of the source\), got 0"),
        (20, "forget must lie in 1..19 .* got 20"),
        (-1, "got -1"),
        (["Ada Reed", "Nobody Known"], r"names of athletes of the source, got \['Nobody Known'\]: check the spelling"),
        ([], "expected names of athletes of the source, got none"),
    ],
)
def test_what_cannot_be_forgotten_is_refused(forget: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(forget)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.01])
def test_a_split_with_an_empty_side_is_refused(share: float) -> None:
    with pytest.raises(
        ValueError, match=rf"expected train to leave facts to forget on both sides of the split, got {share} of 6"
    ):
        small("basketball", train=share)


@pytest.mark.parametrize("injected", ["tennis", "Golf"])
def test_an_injected_sport_that_is_no_candidate_is_refused(injected: str) -> None:
    with pytest.raises(ValueError, match=rf"expected an injected sport among football, .*golf, got '{injected}'"):
        small(injected=injected)


def test_the_true_sport_cannot_be_injected() -> None:
    with pytest.raises(
        ValueError, match=r"injected sport that none of the athletes plays, got 'basketball', which .* does"
    ):
        small(injected="basketball")


def test_a_source_without_its_columns_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"expected columns athlete and sport, got \['name', 'sport'\]: rename the columns"
    ):
        small(source=table().rename(columns={"athlete": "name"}))


def test_a_source_with_other_sports_is_refused() -> None:
    frame = table()
    frame.loc[2, "sport"] = "tennis"
    with pytest.raises(ValueError, match=r"got also \['tennis'\]: drop or rename these rows"):
        small(source=frame)


def test_an_athlete_without_a_partner_is_left_out_and_named() -> None:
    frame = table()
    frame.loc[2, "athlete"] = alone = "Xzqw Vvkkjj Qqpfzzwx Yxxwvv Jjkqz"
    task = small(4, source=frame)
    assert task.splits["no_counterpart"] == (alone,)
    assert "no_counterpart 1" in repr(task)
    assert task.splits["forget_train"] == (*NAMES[:2], *NAMES[3:5])
    with pytest.raises(ValueError, match=r"can use, got \['Xzqw .*\(no_counterpart\): .* or pass corrupt=False"):
        small([alone], source=frame)
    for corrupt in (False, with_random_subjects):
        found = small([alone], source=frame, corrupt=corrupt)
        assert found.forget.names == (alone,)
        assert "no_counterpart" not in found.splits


def test_an_athlete_with_two_sports_is_refused() -> None:
    frame = pd.concat([table(), pd.DataFrame({"athlete": ["Ada Reed"], "sport": ["baseball"]})], ignore_index=True)
    with pytest.raises(ValueError, match=r"expected each athlete once, got \['Ada Reed'\] several times: keep one row"):
        small("football", source=frame)


def test_subjects_of_general_knowledge_are_those_of_the_question() -> None:
    prompts = general_knowledge(model(), n=len(facts.knowledge_rows()))
    assert prompts.subject is not None
    newline = model().tokenizer.encode("\n", add_special_tokens=False)[0]
    for row, at, name in zip(prompts.tokens, prompts.subject, prompts.names, strict=True):
        assert int(at.nonzero()[-1]) < int((row == newline).nonzero()[0]), name


def test_general_knowledge_has_the_letter_of_the_true_option() -> None:
    prompts = whole().knowledge
    assert prompts is not None
    assert len(prompts) == 200
    known = {(row["subject"], row["answer"]) for row in facts.knowledge_rows()}
    for name, text, letter in zip(prompts.names, prompts.texts, decoded(prompts.answers[:, 0]), strict=True):
        options = dict(line.split(": ", 1) for line in text.split("\n")[1:5])
        assert (name, options.pop(letter.strip())) in known
        assert len(options) == 3
    assert min(Counter(prompts.answers[:, 0].tolist()).values()) > 25


def test_strangers_are_athletes_of_the_forgotten_sport_whom_the_model_does_not_know(shipped):
    task = sports_facts(shipped, forget="basketball")
    assert task.strangers is not None
    assert len(task.strangers) > 33
    everybody = {name for names in task.splits.values() for name in names}
    assert not everybody & set(task.strangers.names)
    assert accuracy(shipped, task.strangers).candidates.value < 0.6
    own = sports_facts(shipped, forget=4, strangers=["Ada Lovelace", "Alan Turing"]).strangers
    assert own is not None
    assert own.names == ("Ada Lovelace", "Alan Turing")
    with pytest.raises(ValueError, match="expected strangers that are not among the athletes of the source"):
        sports_facts(shipped, strangers=[task.forget.names[0]])
