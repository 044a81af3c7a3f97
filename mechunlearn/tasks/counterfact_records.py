"""CounterFact in its original schema: read from a file, the Hub or a list, checked, joined with questions."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

RecordSource: TypeAlias = str | Path | Iterable[Mapping[str, Any]]
"""The path of a JSON file, the name of a dataset on the Hub, or the records themselves."""

IDS = ("case_id", "prompt_id")
"""The fields that join questions with records: the original dataset's, and that of the file of Guo et al. 2025."""

Key: TypeAlias = tuple[str, str]
"""A field of `IDS` and its value as text."""


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question about a record."""

    question: str
    answer: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """A fact with all that is asked about it. Answers are written without the space before them."""

    case: int
    subject: str
    prompt: str
    """The prompt with {} where the subject stands."""
    relation: str
    answer: str
    injected: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]
    """Prompts about other subjects that have the same answer."""
    choice: Choice | None = None

    def prompt_about(self, subject: str | None = None) -> tuple[str, tuple[int, int]]:
        """The prompt about its subject (or another one), and the characters where that subject stands."""
        name = self.subject if subject is None else subject
        start = self.prompt.index("{}")
        return self.prompt.replace("{}", name), (start, start + len(name))


def records_of(source: RecordSource, questions: RecordSource | None, split: str = "train") -> list[Record]:
    """The records, in the order of the source, with their questions."""
    choices = {} if questions is None else _choices(questions)
    rows = _rows(source, split)
    records = [_record(row, place, choices) for place, row in enumerate(rows)]
    cases = {record.case for record in records}
    if not records or len(cases) < len(records):
        raise ValueError(f"expected records with an id each, got {len(records)} with {len(cases)} ids: check source.")
    if choices and not any(record.choice for record in records):
        raise ValueError(
            f"expected questions about records of the source, got none ({next(iter(choices))}, ...): pass the "
            f"questions that belong to it."
        )
    return records


def _rows(source: RecordSource, split: str) -> list[Mapping[str, Any]]:
    if isinstance(source, str) and not source.endswith(".json"):
        from datasets import load_dataset

        return [dict(row) for row in load_dataset(source, split=split)]
    if isinstance(source, str | Path):
        if not Path(source).exists():
            raise ValueError(f"expected a JSON file, got {str(source)!r}, which does not exist: check the path.")
        return list(json.loads(Path(source).read_text(encoding="utf-8")))
    return list(source)


def _record(row: Mapping[str, Any], place: int, choices: Mapping[Key, Choice]) -> Record:
    try:
        case, rewrite = int(row["case_id"]), row["requested_rewrite"]
        prompt, subject = rewrite["prompt"], rewrite["subject"]
        answer, injected = (rewrite[target]["str"].strip() for target in ("target_true", "target_new"))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"expected records with case_id and requested_rewrite (prompt, subject, target_true.str, target_new.str), "
            f"got record {place} with {list(row)} ({error} is missing): pass CounterFact in its original schema."
        ) from error
    if prompt.count("{}") != 1 or not subject or answer == injected or not (answer and injected):
        raise ValueError(
            f"expected a prompt with one {{}} for its subject and two different answers, got {prompt!r}, {subject!r}, "
            f"{answer!r} and {injected!r} in the record with case_id {case}: correct it or leave it out."
        )
    # Compared with None, since the array that a table has in this place has no truth value.
    columns = (row.get(column) for column in ("paraphrase_prompts", "neighborhood_prompts"))
    paraphrases, neighbours = (() if texts is None else tuple(texts) for texts in columns)
    unnamed = [text for text in paraphrases if subject not in text]
    if unnamed:
        raise ValueError(
            f"expected the subject {subject!r} in every paraphrase, got {unnamed[0]!r} in the record with case_id "
            f"{case}: write it the same way, or leave the paraphrase out."
        )
    relation = str(rewrite.get("relation_id", ""))
    choice = next((choices[name, str(row[name])] for name in IDS if (name, str(row.get(name))) in choices), None)
    return Record(case, subject, prompt, relation, answer, injected, paraphrases, neighbours, choice)


def _choices(questions: RecordSource) -> dict[Key, Choice]:
    choices: dict[Key, Choice] = {}
    for place, row in enumerate(_rows(questions, "train")):
        id_field = next((name for name in IDS if name in row), None)
        if id_field is None or not {"question", "target_true", "targets_false"} <= set(row):
            raise ValueError(
                f"expected questions with case_id, question, target_true and targets_false, got question {place} with "
                f"{list(row)}: rename its fields."
            )
        wrong = tuple(answer.strip() for answer in row["targets_false"])
        choices[id_field, str(row[id_field])] = Choice(row["question"], row["target_true"].strip(), wrong)
    return choices
