"""CounterFact records in every way in which they are asked."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mechunlearn.model import Model
from mechunlearn.model.tokens import encode
from mechunlearn.tasks import formats
from mechunlearn.tasks.counterfact_records import Record
from mechunlearn.tasks.questions import FirstToken, Question, counterpart, distinct, drawn, lettered


@dataclass(frozen=True, eq=False)
class Records:
    """All records of a source, from which other answers and other subjects are drawn."""

    all: Sequence[Record]
    first: FirstToken
    candidates: int
    seed: int
    corrupt: Mapping[Record, str] = field(default_factory=dict)
    """The record's prompt about another subject."""

    @cached_property
    def answers(self) -> dict[str, set[str]]:
        """Relation -> answers; under "" those of every relation."""
        found: dict[str, set[str]] = {"": set()}
        for record in self.all:
            for relation in ("", record.relation):
                found.setdefault(relation, set()).update((record.answer, record.injected))
        return found

    def trained(self, record: Record) -> Question:
        """The record's own prompt."""
        text, place = record.asked()
        return replace(self._question(record, text, place), corrupt=self.corrupt.get(record))

    def paraphrased(self, record: Record) -> list[Question]:
        starts = [text.rfind(record.subject) for text in record.paraphrases]
        places = [(start, start + len(record.subject)) for start in starts]
        return [self._question(record, *asked) for asked in zip(record.paraphrases, places, strict=True)]

    def neighbourhood(self, record: Record) -> list[Question]:
        """Prompts about other subjects: the record's name says whose neighbours they are."""
        return [self._question(record, text, None) for text in record.neighbours]

    def _question(self, record: Record, text: str, place: tuple[int, int] | None) -> Question:
        given = (f" {record.answer}", f" {record.injected}")
        others = self._others(record)
        options = distinct(self.first, text, given, others, count=self.candidates, name=record.subject)
        return Question(record.subject, text, *given[:1], options, given[1], place)

    def _others(self, record: Record) -> Iterator[str]:
        """First answers of the same relation, then any."""
        for relation in (record.relation, ""):
            seed = f"options {record.case} {self.seed}"
            yield from (
                f" {answer}"
                for answer in drawn(self.answers[relation], without=(record.answer, record.injected), seed=seed)
            )


def by_choice(records: Sequence[Record], *, examples: Sequence[Record], shots: int, seed: int) -> list[Question]:
    """The records' multiple-choice questions, answered by letter, after `shots` answered ones of the examples."""
    able = [record for record in examples if record.choice is not None]
    if shots > len(able):
        raise ValueError(
            f"expected {shots} retained facts of the train split with a multiple-choice question, for the answered "
            f"examples, got {len(able)}: pass shots={len(able)} or fewer."
        )
    shown = random.Random(f"examples {seed}").sample(able, shots)
    before = "".join(f"{asked.text}{asked.answer}\n\n" for asked in (_by_letter(each, seed) for each in shown))
    return [_after(before, _by_letter(record, seed)) for record in records if record.choice is not None]


def counterparts(model: Model, asked: Sequence[Question], records: Sequence[Record], *, seed: int) -> list[str | None]:
    """For each record, asked so, the prompt about the subject of another; `None` where none has as many tokens."""
    by_length: dict[int, list[Record]] = {}
    for record in records:
        by_length.setdefault(_length(model, record), []).append(record)
    found = []
    for record, question in zip(records, asked, strict=True):
        texts = _about_others(record, by_length[_length(model, record)], seed)
        found.append(counterpart(model, question.text, question.answer, texts))
    return found


def _about_others(record: Record, others: Sequence[Record], seed: int) -> Iterator[str]:
    """First subjects of the same relation, which certainly have another answer, then any."""
    able = [other for other in others if other.answer != record.answer]
    order = random.Random(f"corrupt {record.case} {seed}").sample(able, len(able))
    order.sort(key=lambda other: other.relation != record.relation)
    return (record.asked(other.subject)[0] for other in order)


def _by_letter(record: Record, seed: int) -> Question:
    assert record.choice is not None
    wrong = [each for each in record.choice.wrong if each != record.injected]
    options = [record.choice.answer, record.injected, *wrong]
    if len(options) < len(formats.LETTERS) or record.subject not in record.choice.question:
        raise ValueError(
            f"expected a question that names {record.subject!r} and two wrong answers beside {record.injected!r}, got "
            f"{record.choice.question!r} and {wrong} (case_id {record.case}): correct it or leave it out."
        )
    shown = lettered(options[: len(formats.LETTERS)], formats.LETTERS, seed=f"choice {record.case} {seed}")
    text = formats.multiple_choice(record.choice.question, list(shown))
    start = text.index(record.choice.question) + record.choice.question.rfind(record.subject)
    right, injected = (f" {shown[each]}" for each in options[:2])
    letters = (right, injected, *(f" {letter}" for letter in formats.LETTERS if f" {letter}" not in (right, injected)))
    return Question(record.subject, text, right, letters, injected, (start, start + len(record.subject)))


def _after(before: str, question: Question) -> Question:
    assert question.subject is not None
    start, end = (len(before) + place for place in question.subject)
    return replace(question, text=before + question.text, subject=(start, end))


def _length(model: Model, record: Record) -> int:
    return len(encode(model, f" {record.subject}").tokens)
