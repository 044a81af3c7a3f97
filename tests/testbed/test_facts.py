"""The facts that the shipped model is trained on."""

from collections import Counter
from pathlib import Path

import pytest

from mechunlearn.tasks import facts, formats

SHARED = Path(__file__).parents[3] / "shared" / "data" / "sports_facts.csv"


def test_there_are_hundreds_of_athletes_each_once():
    names = [row["athlete"].lower() for row in facts.athletes()]
    assert len(set(names)) == len(names) >= 400
    sports = Counter(row["sport"] for row in facts.athletes())
    assert sports["football"] == sports["basketball"] == sports["baseball"]
    assert sports["golf"] >= 10


def test_athletes_of_team_sports_have_further_attributes():
    for row in facts.athletes():
        assert bool(row["position"]) == bool(row["city"]) == (row["sport"] in ("football", "basketball", "baseball"))
        assert all(value == value.strip() and value.isascii() for value in row.values())


@pytest.mark.skipif(not SHARED.exists(), reason="the authors' data lies beside the project only in its workplace")
def test_sports_agree_with_the_authors_table_where_both_have_an_athlete():
    import pandas as pd

    theirs = dict(pd.read_csv(SHARED).itertuples(index=False, name=None))
    both = [row for row in facts.athletes() if row["athlete"] in theirs]
    assert len(both) > 100
    assert [row["athlete"] for row in both if theirs[row["athlete"]] != row["sport"]] == []


def test_there_are_hundreds_of_general_facts_each_once_with_answers_to_choose_from():
    rows = facts.knowledge_rows()
    keys = [(row["relation"], row["subject"]) for row in rows]
    assert len(set(keys)) == len(keys) >= 600
    answers = {name: {row["answer"] for row in rows if row["relation"] == name} for name in facts.relations()}
    assert set(answers) == {row["relation"] for row in rows}
    assert all(len(found) >= 4 for found in answers.values())


def test_every_relation_can_be_stated_and_asked():
    for relation in facts.relations().values():
        for statement in relation["statements"]:
            assert statement.count("{subject}") == 1
            assert statement.endswith(" {answer}")
        assert relation["question"].count("{subject}") == 1
        assert relation["question"].endswith("?")


def test_prompts_end_right_before_the_answer_and_name_the_athlete_once():
    others = [prompt for phrasings in formats.ATTRIBUTES.values() for prompt in phrasings.values()]
    for prompt in (formats.FACT, *formats.PARAPHRASES.values(), *others):
        assert prompt.count("{athlete}") == 1
        assert not prompt.endswith(" ")
    assert len(formats.PARAPHRASES) >= 5
