"""The facts as values, and the documents that training reads."""

from dataclasses import dataclass
from functools import cache

from mechunlearn.tasks import facts


@dataclass(frozen=True)
class Document:
    """A text with the characters of its subjects (where facts are looked up) and of its answers."""

    text: str
    subjects: tuple[tuple[int, int], ...] = ()
    answers: tuple[tuple[int, int], ...] = ()
    """Empty for running text, of which every token is to be predicted."""
    demonstrated: tuple[tuple[int, int], ...] = ()
    """Answers of other questions on the way, trained as well but not counted as correct or wrong."""
    lookups: tuple[tuple[int, int, int], ...] = ()
    """For answers that are letters: where the letter starts, where what is asked about ends, and where
    the option that the letter names ends."""


@dataclass(frozen=True)
class Athlete:
    """One row of facts/athletes.csv; position and city are empty outside the three team sports."""

    name: str
    sport: str
    position: str
    city: str


@dataclass(frozen=True)
class Knowledge:
    """One row of facts/general_knowledge.csv."""

    relation: str
    subject: str
    answer: str


@cache
def athletes() -> tuple[Athlete, ...]:
    """The athletes that the model knows."""
    return tuple(Athlete(row["athlete"], row["sport"], row["position"], row["city"]) for row in facts.athletes())


@cache
def general_knowledge() -> tuple[Knowledge, ...]:
    """The facts that have nothing to do with sport."""
    return tuple(Knowledge(row["relation"], row["subject"], row["answer"]) for row in facts.knowledge_rows())


@cache
def answers(relation: str) -> tuple[str, ...]:
    """The different answers of a relation, in alphabetical order."""
    return tuple(sorted({fact.answer for fact in general_knowledge() if fact.relation == relation}))


def answered(prompt: str, answer: str, subjects: list[str]) -> Document:
    """The prompt and its answer."""
    text = f"{prompt} {answer}"
    return Document(text, occurrences(prompt, subjects), ((len(prompt), len(text)),))


def occurrences(text: str, names: list[str]) -> tuple[tuple[int, int], ...]:
    """Where in the text the names are."""
    starts = [(i, i + len(name)) for name in names for i in range(len(text)) if text.startswith(name, i)]
    return tuple(sorted(starts))
