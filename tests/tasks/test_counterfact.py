import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import mechunlearn as mu
from mechunlearn.metrics import answer_log_probability, is_top_of_vocabulary
from mechunlearn.tasks.prompts import Prompts

DATA = Path(__file__).parents[3] / "shared" / "data"
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Cuba": "Havana",
    "Chile": "Santiago",
    "Norway": "Oslo",
    "Egypt": "Cairo",
    "Japan": "Tokyo",
    "Peru": "Lima",
    "Austria": "Vienna",
    "Canada": "Ottawa",
    "Spain": "Madrid",
    "Greece": "Athens",
}
CONTINENTS = {"France": ("Europe", "Poland"), "Egypt": ("Africa", "Kenya")}
TEXT = torch.ones(5, 8, dtype=torch.long)


def record(case: int, subject: str, true: str, new: str, prompt: str = "The capital of {} is") -> dict[str, Any]:
    """In the schema of the original file."""
    target = {"target_true": {"id": "Q1", "str": true}, "target_new": {"id": "Q2", "str": new}}
    return {
        "case_id": case,
        "pararel_idx": 7 * case,
        "requested_rewrite": {"prompt": prompt, "relation_id": "P36", "subject": subject, **target},
        "paraphrase_prompts": [f"The bus was late. {subject}, whose capital is", f"The capital city of {subject} is"],
        "neighborhood_prompts": [f"Not far from there is {true}, which is next to", "Its heart is"],
    }


RECORDS = [
    record(10 * place, country, city, "London" if place % 2 else "Berlin")
    for place, (country, city) in enumerate(CAPITALS.items(), 1)
]
UNKNOWN = record(200, "Turku", "Baghdad", "Delhi")
QUESTIONS = [
    {"case_id": row["case_id"], "question": f"What is the capital of {name}?", "target_true": true, "targets_false": w}
    for row, (name, true) in zip(RECORDS, CAPITALS.items(), strict=True)
    for w in [[row["requested_rewrite"]["target_new"]["str"], "Bern", "Quito"]]
    if row["case_id"] != 20
]


def made(model: Any, **options: Any) -> mu.Task:
    given = {"source": [*RECORDS, UNKNOWN], "questions": QUESTIONS, "forget": 4, "shots": 1, "text": TEXT}
    return mu.tasks.counterfact(model, **{**given, "corrupt": False, **options})


@pytest.fixture(scope="module")
def task(shipped: Any) -> mu.Task:
    return made(shipped)


def answers(model: Any, prompts: Prompts | None) -> list[str]:
    assert prompts is not None
    return [model.tokenizer.decode(row[row >= 0]) for row in prompts.answers]


def subjects(model: Any, prompts: Prompts) -> list[str]:
    assert prompts.subject is not None
    rows = zip(prompts.tokens, prompts.subject, strict=True)
    return [model.tokenizer.decode(row[at]).strip() for row, at in rows]


def test_records_that_the_model_does_not_know_are_left_out_and_named(task: mu.Task) -> None:
    assert task.splits["not_known"] == ("Turku",)
    assert "forget 4 of 12" in repr(task)
    assert "not_known 1" in repr(task)
    names = {name for part, found in task.splits.items() if part != "not_known" for name in found}
    assert names == set(CAPITALS)


def test_a_threshold_decides_what_counts_as_known(shipped: Any) -> None:
    assert made(shipped, threshold=0.0).splits["not_known"] == ()
    assert made(shipped, threshold=0.5).splits["not_known"] == ("Turku",)
    with pytest.raises(ValueError, match="expected more than 4 records that this model knows, got 0 of 13"):
        made(shipped, threshold=1.0)
    with pytest.raises(ValueError, match=r"threshold must lie in 0\.\.1"):
        made(shipped, threshold=50.0)


def test_knowing_agrees_with_the_metrics_whatever_the_batch_and_the_padding(model: Any) -> None:
    for padding in ("right", "left"):
        prompts = tiny.prompts(model, n=24, answer=2, padding=padding)
        logits = prompts.logits(model).detach()
        probability = answer_log_probability(logits, prompts).exp()
        threshold = float(probability.median()) * 1.01
        expected = probability >= threshold
        for size in (5, 24):
            found = mu.tasks.knows(model, prompts, threshold=threshold, batch_size=size)
            assert torch.equal(found, expected)
            assert torch.equal(mu.tasks.knows(model, prompts, batch_size=size), is_top_of_vocabulary(logits, prompts))


def test_the_first_records_are_forgotten_or_those_of_the_ids(shipped: Any, task: mu.Task) -> None:
    assert task.splits["forget_train"] == task.splits["forget_test"] == tuple(CAPITALS)[:4]
    assert task.forget.texts[0] == "The capital of France is"
    assert answers(shipped, task.forget) == [" Paris", " Rome", " Havana", " Santiago"]
    assert made(shipped, forget=[70, 20]).forget.names == ("Japan", "Italy")


def test_the_rest_is_retained_and_split(task: mu.Task) -> None:
    train, test = task.splits["retain_train"], task.splits["retain_test"]
    assert (len(train), len(test)) == (6, 2)
    assert {*train, *test} == set(tuple(CAPITALS)[4:])
    assert task.retain.names == train
    assert task.formats["trained prompt"].retain.names == test


def test_the_false_answer_is_injected_and_is_a_candidate(shipped: Any, task: mu.Task) -> None:
    assert task.injection is not None
    assert answers(shipped, task.injection) == [" London", " Berlin"] * 2
    assert task.injection.texts == task.forget.texts
    assert task.forget.candidates is not None
    assert task.injection.candidates is not None
    assert torch.equal(task.injection.candidates[:, :2], task.forget.candidates[:, :2].flip(1))
    assert task.forget.chance == 1 / 4


def test_paraphrases_are_about_the_same_subject_with_the_same_answers(shipped: Any, task: mu.Task) -> None:
    found = task.formats["paraphrase"]
    assert len(found.forget) == 8
    assert len(found.retain) == 4
    assert not found.kept
    assert subjects(shipped, found.forget) == list(found.forget.names)
    assert answers(shipped, found.forget)[:4] == [" Paris", " Paris", " Rome", " Rome"]
    assert answers(shipped, found.injected)[:4] == [" London", " London", " Berlin", " Berlin"]


def test_neighbours_have_the_same_answer_and_are_kept_on_both_sides(shipped: Any, task: mu.Task) -> None:
    found = task.formats["neighbourhood"]
    assert found.kept
    assert found.injected is None
    assert found.forget.texts[:2] == ("Not far from there is Paris, which is next to", "Its heart is")
    assert answers(shipped, found.forget)[:2] == [" Paris"] * 2
    assert found.forget.names[:3] == ("France", "France", "Italy")
    assert found.forget.subject is None


def test_multiple_choice_is_answered_by_letter_after_examples_of_retained_facts(shipped: Any, task: mu.Task) -> None:
    found = task.formats["multiple choice"]
    assert found.forget.names == ("France", "Cuba", "Chile")  # Italy has no question
    assert found.injected is not None
    for prompts, wanted in (
        (found.forget, CAPITALS),
        (found.injected, {"France": "London", "Cuba": "London", "Chile": "Berlin"}),
    ):
        for text, name, letter in zip(prompts.texts, prompts.names, answers(shipped, prompts), strict=True):
            example, asked = text.split("\n\nQuestion: ")
            assert f"{letter.strip()}: {wanted[name]}" in asked.splitlines()
            assert any(f"capital of {other}?" in example for other in task.splits["retain_train"])
    assert subjects(shipped, found.forget) == list(found.forget.names)
    assert found.forget.chance == 1 / 4


def test_examples_are_as_many_as_asked(shipped: Any) -> None:
    for shots in (0, 3):
        text = made(shipped, shots=shots).formats["multiple choice"].forget.texts[0]
        assert text.count("Question:") == shots + 1
    with pytest.raises(ValueError, match=r"expected 8 retained facts .* got 6: pass shots=6"):
        made(shipped, shots=8)


def test_formats_that_a_side_lacks_are_left_out(shipped: Any) -> None:
    bare = [{key: row[key] for key in ("case_id", "requested_rewrite")} for row in RECORDS]
    assert list(made(shipped, source=bare, questions=None).formats) == ["trained prompt"]
    only = [row for row in QUESTIONS if row["case_id"] == 10]
    assert "multiple choice" not in made(shipped, questions=only).formats


def test_a_corrupted_prompt_names_another_subject_of_as_many_tokens(shipped: Any) -> None:
    task = made(shipped, source=RECORDS, corrupt=True, forget=3)
    lengths = {name: len(shipped.tokenizer(f" {name}")["input_ids"]) for name in CAPITALS}
    alone = {name for name, length in lengths.items() if list(lengths.values()).count(length) == 1}
    assert set(task.splits.get("no_counterpart", ())) == alone
    for prompts in (task.forget, task.retain):
        assert prompts.corrupt is not None
        assert prompts.subject is not None
        for i, name in enumerate(prompts.names):
            other = shipped.tokenizer.decode(prompts.corrupt[i][prompts.subject[i]]).strip()
            assert other in CAPITALS
            assert other != name
            outside = ~prompts.subject[i]
            assert torch.equal(prompts.corrupt[i][outside], prompts.tokens[i][outside])


def test_a_part_forgets_its_facts_and_retains_none_of_the_others(shipped: Any, task: mu.Task) -> None:
    parts = [made(shipped, partition=(part, 2)) for part in range(2)]
    assert [part.forget.names for part in parts] == [tuple(CAPITALS)[:2], tuple(CAPITALS)[2:4]]
    for part, same in zip(parts, mu.tasks.partitioned(task, 2), strict=True):
        assert part.retain.names == task.retain.names
        assert torch.equal(part.forget.tokens, same.forget.tokens)
        assert part.injection is not None
        assert len(part.injection) == 2
        assert len(part.formats["paraphrase"].forget) == 8  # asked about all
    with pytest.raises(ValueError, match=r"expected \(part, k\) with part in 0\.\.k-1, got \(2, 2\)"):
        made(shipped, partition=(2, 2))


def test_settings_can_be_chosen_on_some_facts_and_every_format_be_asked(shipped: Any, task: mu.Task) -> None:
    found = mu.tasks.validation_split(task, share=0.25)
    (chosen,) = found.final.splits["forget_validation"]
    for name, format in found.final.formats.items():
        assert chosen not in format.forget.names, name
    tests = mu.evaluate.every_format(task)
    assert {"forget, neighbourhood (keep)", "retain, paraphrase", "forget, multiple choice"} < set(tests)
    assert float(tests["forget, trained prompt"](shipped, task).per_example.mean()) > 0.9
    assert float(tests["injected answer"](shipped, task).per_example.mean()) < 0.1


def test_parts_are_edited_in_sequence(shipped: Any, task: mu.Task) -> None:
    where = mu.ComponentMask.of(["L0MLP"], mu.shape(shipped))
    edit = partial(mu.edit.finetune, inject=True, steps=1, text_coefficient=0.0)
    found = mu.edit.sequence(shipped, mu.tasks.partitioned(task, 2), where, edit=edit)
    assert len(found.edits) == 2


def test_a_file_and_the_hub_give_what_a_list_gives(
    shipped: Any, task: mu.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([*RECORDS, UNKNOWN]))
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return [*RECORDS, UNKNOWN]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for source in (path, str(path), "azhx/counterfact"):
        again = made(shipped, source=source)
        assert again.splits == task.splits
        assert torch.equal(again.forget.tokens, task.forget.tokens)
    assert asked == [("azhx/counterfact", "train")]
    with pytest.raises(ValueError, match=r"expected a JSON file, got 'none.json', which does not exist"):
        made(shipped, source="none.json")


def test_later_records_of_a_subject_and_answers_with_one_first_token_are_left_out_and_named(shipped: Any) -> None:
    same = record(300, "Sweden", "Stockholm", "Stockholm North")
    again = record(310, "France", "French", "German", "In {} people speak")
    task = made(shipped, source=[*RECORDS, same, again])
    assert task.splits["same_first_token"] == ("Sweden",)
    assert task.splits["repeated"] == ("France",)
    assert task.forget.texts[0] == "The capital of France is"


def test_the_authors_dataset_and_their_questions_are_taken_as_they_are(
    shipped: Any, task: mu.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns at the top beside the original schema, a split for each model, and questions by prompt_id, as arrays."""
    top = [
        {
            "subject": row["requested_rewrite"]["subject"],
            "target_true": f" {row['requested_rewrite']['target_true']['str']}",
            "target_false": f" {row['requested_rewrite']['target_new']['str']}",
            "prob_of_correct_answer": 0.9,
            "prompt_id": row["case_id"] + 1,
            **row,
            "paraphrase_prompts": np.array(row["paraphrase_prompts"], dtype=object),
            "neighborhood_prompts": np.array(row["neighborhood_prompts"], dtype=object),
        }
        for row in [*RECORDS, UNKNOWN]
    ]
    asked: list[str] = []

    def load_dataset(name: str, *, split: str) -> list[dict[str, Any]]:
        asked.append(f"{name} {split}")
        return top

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    ids = [
        {**row, "prompt_id": row["case_id"] + 1, "targets_false": np.array(row["targets_false"])} for row in QUESTIONS
    ]
    questions = [{key: value for key, value in row.items() if key != "case_id"} for row in ids]
    source = "PhillipGuo/counterfact-with-gemma-probs"
    found = made(shipped, source=source, split="gemma2_9b", questions=questions)
    assert asked == [f"{source} gemma2_9b"]
    assert found.splits == task.splits
    for name, format in task.formats.items():
        assert found.formats[name].forget.texts == format.forget.texts
        assert found.formats[name].retain.texts == format.retain.texts


def test_a_neighbourhood_prompt_that_asks_for_a_fact_to_forget_is_left_out(shipped: Any) -> None:
    asks = [*RECORDS[1]["paraphrase_prompts"], "The capital of Italy is", "The capital of Greece is"]
    source = [{**RECORDS[0], "neighborhood_prompts": asks}, *RECORDS[1:]]
    assert made(shipped, source=source, forget=[20, 10]).formats["neighbourhood"].forget.texts[2:] == (asks[-1],)
    assert made(shipped, source=source, forget=[10]).formats["neighbourhood"].forget.texts == tuple(asks)


def changed(**rewrite: Any) -> dict[str, Any]:
    first = RECORDS[0]
    return {**first, "requested_rewrite": {**first["requested_rewrite"], **rewrite}}


WRONG = [
    ({"source": [{"prompt": "x", "subject": "y"}]}, r"expected records with case_id .*got record 0 with \['prompt'"),
    ({"source": [changed(target_new="London")]}, "got record 0"),
    ({"source": []}, "expected records with an id each, got 0"),
    ({"source": [*RECORDS, RECORDS[0]]}, "got 13 with 12 ids"),
    ({"source": [changed(prompt="The capital is")]}, r"one \{\} for its subject"),
    ({"source": [changed(target_new={"str": "Paris"})]}, "two different answers"),
    ({"source": [{**RECORDS[0], "paraphrase_prompts": ["It is"]}]}, "'France' in every paraphrase, got 'It is'"),
    ({"questions": [{"case_id": 10}]}, "expected questions with case_id, question"),
    ({"questions": [{**QUESTIONS[0], "case_id": 9}]}, "questions about records of the source, got none"),
    ({"questions": [{**row, "question": "Which?"} for row in QUESTIONS]}, "a question that names"),
    ({"questions": [{**row, "targets_false": ["Bern"]} for row in QUESTIONS]}, "two wrong answers beside"),
    ({"forget": [999]}, r"got \[999\], which the source lacks"),
    ({"forget": [200]}, r"got \[200\], which the model does not know"),
    ({"forget": []}, "expected ids of records to forget, got none"),
    ({"forget": 12}, "expected more than 12 records"),
    ({"forget": 0}, "expected more than 1 records"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_cannot_be_right_is_refused(shipped: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(shipped, **options)


@pytest.fixture(scope="module")
def real(shipped: Any) -> mu.Task:
    if not (DATA / "counterfact_400.json").exists():
        pytest.skip("../shared/data, with real CounterFact records, is not here")
    source, questions = DATA / "counterfact_400.json", DATA / "counterfact_400_multiple_choice.json"
    options: dict[str, Any] = {"shots": 1, "threshold": 0.0, "text": TEXT}  # more would not fit its context
    return mu.tasks.counterfact(shipped, source=source, questions=questions, forget=64, **options)


def test_every_real_record_is_in_one_part_or_left_out_with_a_reason(real: mu.Task) -> None:
    found = {part: set(names) for part, names in real.splits.items() if part != "forget_test"}
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 400
    assert len(found["forget_train"]) == 64


def test_real_subjects_are_found_and_real_counterparts_differ_in_them(shipped: Any, real: mu.Task) -> None:
    for prompts in (real.forget, real.retain, real.formats["paraphrase"].forget):
        assert subjects(shipped, prompts) == list(prompts.names)
    assert real.forget.corrupt is not None
    assert real.forget.subject is not None
    differs = real.forget.corrupt != real.forget.tokens
    assert bool(differs.any(1).all())
    assert len(real.formats["paraphrase"].forget) == 128
    assert len(real.formats["neighbourhood"].forget) == 640


def test_real_questions_are_joined_with_their_records(real: mu.Task) -> None:
    asked = {row["case_id"]: row for row in json.loads((DATA / "counterfact_400_multiple_choice.json").read_text())}
    rows = {row["requested_rewrite"]["subject"]: row for row in json.loads((DATA / "counterfact_400.json").read_text())}
    found = real.formats["multiple choice"].forget
    expected = [name for name in real.splits["forget_test"] if rows[name]["case_id"] in asked]
    assert list(found.names) == expected
    for text, name in zip(found.texts, found.names, strict=True):
        assert text.split("\n\n")[-2].startswith(f"Question: {asked[rows[name]['case_id']]['question']}\nA: ")
