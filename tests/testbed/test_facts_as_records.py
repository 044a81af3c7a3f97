"""The shipped model's own CounterFact."""

from collections import Counter
from typing import Any

import pytest
import torch

import mechunlearn as mu
from mechunlearn.tasks import facts

RECORDS, QUESTIONS = mu.testbed.counterfact()
ROWS = facts.knowledge_rows()
TRUE = {(row["relation"], row["subject"]): row["answer"] for row in ROWS}
TEXT = torch.ones(5, 8, dtype=torch.long)


def test_there_is_a_record_for_each_subject_and_all_relations_are_there() -> None:
    subjects = [record["requested_rewrite"]["subject"] for record in RECORDS]
    assert len(subjects) == len(set(subjects))
    assert set(subjects) == {row["subject"] for row in ROWS}
    relations = Counter(record["requested_rewrite"]["relation_id"] for record in RECORDS)
    assert set(relations) == set(facts.relations())
    assert min(relations.values()) >= 10


def test_a_record_says_what_the_table_says() -> None:
    for record, question in zip(RECORDS, QUESTIONS, strict=True):
        rewrite, row = record["requested_rewrite"], ROWS[record["case_id"]]
        relation, subject = row["relation"], row["subject"]
        assert (rewrite["relation_id"], rewrite["subject"], rewrite["target_true"]["str"]) == tuple(row.values())
        answers = {answer for (other, _), answer in TRUE.items() if other == relation}
        assert rewrite["target_new"]["str"] in answers - {row["answer"]}
        first, *others = facts.relations()[relation]["statements"]
        assert f"{rewrite['prompt'].format(subject)} {row['answer']}" == first.format(**row)
        assert [f"{text} {row['answer']}" for text in record["paraphrase_prompts"]] == [s.format(**row) for s in others]
        same = {first.format(**other).removesuffix(f" {row['answer']}") for other in ROWS if TRUE[relation, subject]
                == other["answer"] and other["relation"] == relation and other["subject"] != subject}  # fmt: skip
        assert set(record["neighborhood_prompts"]) <= same
        assert len(record["neighborhood_prompts"]) == min(10, len(same))
        assert question["case_id"] == record["case_id"]
        assert question["target_true"] == row["answer"]
        assert question["targets_false"][0] == rewrite["target_new"]["str"]
        assert len({row["answer"], *question["targets_false"]}) == 4
        assert set(question["targets_false"]) < answers


def test_the_seed_draws_the_order_and_the_answers_to_inject() -> None:
    assert mu.testbed.counterfact() == (RECORDS, QUESTIONS)
    other = mu.testbed.counterfact(seed=1)[0]
    assert [row["case_id"] for row in other] != [row["case_id"] for row in RECORDS]
    assert {row["requested_rewrite"]["subject"] for row in other} == {
        row["requested_rewrite"]["subject"] for row in RECORDS
    }


@pytest.fixture(scope="module")
def task(shipped: Any) -> mu.Task:
    options = {"source": RECORDS, "questions": QUESTIONS, "shots": 0, "text": TEXT}
    return mu.tasks.counterfact(shipped, forget=100, **options)


def test_the_shipped_model_knows_hundreds_of_them_in_every_format(shipped: Any, task: mu.Task) -> None:
    assert task.splits["not_known"] == ()
    assert len(task.splits["forget_train"]) + len(task.splits["retain_train"]) + len(task.splits["retain_test"]) > 600
    assert list(task.formats) == ["trained prompt", "paraphrase", "neighbourhood", "multiple choice"]
    for name in task.formats:
        for side in ("forget", "retain"):
            assert mu.evaluate.in_format(shipped, task, name=name, side=side).value > 0.95, (name, side)
    assert mu.evaluate.injected(shipped, task).value < 0.01


def test_no_neighbourhood_prompt_asks_for_what_is_to_be_forgotten(task: mu.Task) -> None:
    found = task.formats["neighbourhood"]
    assert not {*found.forget.texts, *found.retain.texts} & set(task.forget.texts)
    neighbours = {text for record in RECORDS for text in record["neighborhood_prompts"]}
    assert neighbours & set(task.forget.texts)  # there were some to leave out
