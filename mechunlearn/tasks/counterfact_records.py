"""CounterFact in its original schema: read from a file, the Hub or a list, checked, joined with questions."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Source: TypeAlias = str | Path | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question about a record."""

    question: str
    answer: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """A fact with everything that is asked about it; answers are without the space before them."""

    case: int
    subject: str
    prompt: str
    """With {} where the subject stands."""
    relation: str
    answer: str
    injected: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]
    """Prompts about other subjects that have the same answer."""
    choice: Choice | None = None

    def asked(self, subject: str | None = None) -> tuple[str, tuple[int, int]]:
        """The prompt about its subject (or another one), and the characters of that."""
        name = self.subject if subject is None else subject
        start = self.prompt.index("{}")
        return self.prompt.replace("{}", name), (start, start + len(name))


def records_of(source: Source, questions: Source | None) -> list[Record]:
    """In the order of the source. ValueError for records in another schema, ids that come twice, unknown ids."""
    choices = {} if questions is None else _choices(questions)
    records = [_record(row, place, choices) for place, row in enumerate(_rows(source))]
    cases = [record.case for record in records]
    if not records or len(set(cases)) < len(cases):
        raise ValueError(
            f"expected records with an id each, got {len(cases)} with {len(set(cases))} ids: check source."
        )
    unknown = sorted(set(choices) - set(cases))
    if len(choices) and len(unknown) == len(choices):
        raise ValueError(
            f"expected questions about records of the source, got none (case_id {unknown[:5]}, ...): pass the "
            f"questions that belong to it."
        )
    return records


def _rows(source: Source) -> list[Mapping[str, Any]]:
    if isinstance(source, str) and not source.endswith(".json"):
        from datasets import load_dataset

        return [dict(row) for row in load_dataset(source, split="train")]
    if isinstance(source, str | Path):
        if not Path(source).exists():
            raise ValueError(f"expected a JSON file, got {str(source)!r}, which does not exist: check the path.")
        return list(json.loads(Path(source).read_text(encoding="utf-8")))
    return list(source)


def _record(row: Mapping[str, Any], place: int, choices: Mapping[int, Choice]) -> Record:
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
    paraphrases = tuple(row.get("paraphrase_prompts") or ())
    unnamed = [each for each in paraphrases if subject not in each]
    if unnamed:
        raise ValueError(
            f"expected the subject {subject!r} in every paraphrase, got {unnamed[0]!r} in the record with case_id "
            f"{case}: write it the same way, or leave the paraphrase out."
        )
    neighbours = tuple(row.get("neighborhood_prompts") or ())
    relation = str(rewrite.get("relation_id", ""))
    return Record(case, subject, prompt, relation, answer, injected, paraphrases, neighbours, choices.get(case))


def _choices(questions: Source) -> dict[int, Choice]:
    found = {}
    for place, row in enumerate(_rows(questions)):
        missing = [key for key in ("case_id", "question", "target_true", "targets_false") if key not in row]
        if missing:
            raise ValueError(
                f"expected questions with case_id, question, target_true and targets_false, got question {place} with "
                f"{list(row)}: rename its fields."
            )
        wrong = tuple(each.strip() for each in row["targets_false"])
        found[int(row["case_id"])] = Choice(row["question"], row["target_true"].strip(), wrong)
    return found
