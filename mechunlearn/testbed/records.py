"""The package's general knowledge as CounterFact records: facts about many things that the shipped model knows."""

import random
from collections.abc import Sequence
from typing import Any

from mechunlearn.tasks import facts

NEIGHBOURS = 10
"""As many neighbourhood prompts as CounterFact has, where there are so many."""


def counterfact(*, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records and multiple-choice questions for `tasks.counterfact`, in the schema of the original dataset.

    `records, questions = mu.testbed.counterfact()` and then `mu.tasks.counterfact(mu.testbed.load(), source=records,
    questions=questions, shots=0)`. A record for each subject of the package's general knowledge (capitals, authors,
    elements, ...), in an order drawn by `seed`; of what is known about a country, one thing, drawn likewise. The prompt
    is the relation's first statement, and its other statements are the paraphrases. Neighbourhood prompts are the first
    statement about other subjects with the same answer, ten at most; a capital has none. `target_new` is another answer
    of the relation; a question has it and two more as wrong options. `case_id` is the row in the package's table,
    whatever the seed.

    The schema is that of Meng et al. 2022, https://arxiv.org/abs/2202.05262.
    """
    rows = list(enumerate(facts.knowledge_rows()))
    random.Random(f"records {seed}").shuffle(rows)
    one_each: dict[str, tuple[int, facts.FactRow]] = {}
    for case, fact in rows:
        one_each.setdefault(fact["subject"], (case, fact))
    records, questions = [], []
    for case, fact in one_each.values():
        rng = random.Random(f"record {case} {seed}")
        answers = _answers(fact["relation"])
        wrong = rng.sample(sorted(set(answers.values()) - {fact["answer"]}), 3)
        alike = [name for name, answer in answers.items() if answer == fact["answer"] and name != fact["subject"]]
        records.append(_record(case, fact, wrong[0], rng.sample(alike, min(NEIGHBOURS, len(alike)))))
        questions.append(_question(case, fact, wrong))
    return records, questions


def _answers(relation: str) -> dict[str, str]:
    """Subject -> answer."""
    return {row["subject"]: row["answer"] for row in facts.knowledge_rows() if row["relation"] == relation}


def _record(case: int, fact: facts.FactRow, injected: str, neighbours: Sequence[str]) -> dict[str, Any]:
    first, *others = (text.removesuffix(" {answer}") for text in facts.relations()[fact["relation"]]["statements"])
    return {
        "case_id": case,
        "requested_rewrite": {
            "prompt": first.format(subject="{}"),
            "relation_id": fact["relation"],
            "subject": fact["subject"],
            "target_true": {"str": fact["answer"]},
            "target_new": {"str": injected},
        },
        "paraphrase_prompts": [text.format(subject=fact["subject"]) for text in others],
        "neighborhood_prompts": [first.format(subject=name) for name in neighbours],
    }


def _question(case: int, fact: facts.FactRow, wrong: Sequence[str]) -> dict[str, Any]:
    asked = facts.relations()[fact["relation"]]["question"].format(subject=fact["subject"])
    return {"case_id": case, "question": asked, "target_true": fact["answer"], "targets_false": list(wrong)}
