"""CounterFact: facts about many things, each with its own prompt, asked in every format."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from numbers import Integral
from operator import index

from jaxtyping import Int
from torch import Tensor

from mechunlearn.model import Model, check_model
from mechunlearn.model.tokens import encode
from mechunlearn.tasks import formats
from mechunlearn.tasks.building import knows
from mechunlearn.tasks.counterfact_records import Record, Source, records_of
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.questions import (
    FirstToken,
    Question,
    counterpart,
    distinct,
    drawn,
    first_tokens,
    format_of,
    lettered,
    prompts_of,
)
from mechunlearn.tasks.splits import Sides, partitioned
from mechunlearn.tasks.task import Format, Task
from mechunlearn.tasks.text import train_and_test_text


def counterfact(
    model: Model,
    *,
    source: Source,
    questions: Source | None = None,
    split: str = "train",
    forget: int | Sequence[int] = 16,
    partition: tuple[int, int] | None = None,
    threshold: float | None = None,
    candidates: int = 4,
    shots: int = 8,
    corrupt: bool = True,
    train: float = 0.8,
    text: Iterable[str] | Int[Tensor, "row pos"] | None = None,
    knowledge: Prompts | None = None,
    seed: int = 0,
) -> Task:
    """Unlearn some CounterFact records that this model knows, or inject their false answers; keep the other records.

    `source`: records in the original schema, as a path that ends in .json, a list, or the name of a dataset on the Hub
    ("azhx/counterfact", or the paper's "PhillipGuo/counterfact-with-gemma-probs"; its `split`, by `datasets`).
    `questions`: multiple-choice questions about them, likewise, with fields question, target_true, targets_false, and
    case_id, or prompt_id, as the records have it.

    Kept are records whose true answer the model gives (`threshold=None`: every token is its first choice; a number: the
    probability of the answer is at least that, 0.5 in the paper; 0: all records). The subjects that drop out are
    `task.splits["not_known"]`, so that the task's repr shows how many. `forget`: the first of the kept records, so
    many, or a list of their case_id; they are trained on and tested. The rest is retained: `train` of it to train on,
    the others to test on. `partition=(part, k)`: of the facts to forget, only that part of `k`, counted from 0; the
    other parts are not retained either. For all parts, to edit in sequence: `tasks.partitioned(task, k)`.

    Formats: "trained prompt"; "paraphrase"; "neighbourhood", prompts about other subjects with the same answer, which
    both sides should keep; "multiple choice", answered by letter after `shots` answered questions about facts of
    `task.retain`, for the facts that have a question. A format is left out if no tested fact of a side has it. Every
    prompt is about the fact that its name says; a neighbourhood prompt marks no subject tokens. Neighbourhood prompts
    in the very words of a prompt for a fact to forget are left out.

    `task.injection` has target_new, as has every format that is not to be kept. Candidates are the true answer,
    target_new, and answers of the same relation (of any, if these do not suffice) drawn at random, with different first
    tokens; chance is 1 / candidates. A corrupted prompt names another subject of as many tokens with another answer, of
    the same relation if there is one. `text`, `knowledge`: as in `from_frame`.

    Meng et al. 2022, https://arxiv.org/abs/2202.05262; the protocol is that of Guo et al. 2025,
    https://arxiv.org/abs/2410.12949. Also left out, and named in `task.splits`, are later records of a subject
    ("repeated"), since names tell facts apart; records whose two answers begin with the same token of this tokenizer
    ("same_first_token"); and, with `corrupt`, records without such another subject ("no_counterpart"). Cost: 1 forward
    for each record. ValueError for another schema, ids of records that are left out or not in the source, too few known
    records, and a subject that its prompt does not name.
    """
    check_model(model)
    every = records_of(source, questions, split)
    records, left_out = _usable(model, every, candidates, seed, corrupt=corrupt)
    known = _known(model, records, threshold)
    gone = _chosen(known, every, forget)
    kept = [record for record in known if record not in gone]
    sides = Sides.of(gone, kept, train=train, train_forget=None, rng=random.Random(index(seed)))
    trained = format_of(model, [*map(records.trained, sides.forget_train)], [*map(records.trained, sides.retain_train)])
    text_train, text_test = train_and_test_text(model, text, seed=seed)
    task = Task(
        name=f"CounterFact: forget {len(gone)} of {len(known)}",
        forget=trained.forget,
        retain=trained.retain,
        formats=_formats(model, records, sides, shots),
        text=text_train,
        text_test=text_test,
        injection=trained.injected,
        knowledge=knowledge,
        splits={
            **sides.names(lambda record: record.subject),
            "not_known": _subjects(records.all, without=known),
            **left_out,
        },
    )
    return task if partition is None else _part(task, partition)


def _usable(
    model: Model, every: Sequence[Record], candidates: int, seed: int, *, corrupt: bool
) -> "tuple[Records, dict[str, tuple[str, ...]]]":
    """The first record of each subject, if an edit can use it; and, for each reason, the subjects that are left out."""
    first = first_tokens(model)
    first_of: dict[str, Record] = {}
    for record in every:
        first_of.setdefault(record.subject, record)
    unique = list(first_of.values())
    able = [r for r in unique if first(r.asked()[0], f" {r.answer}") != first(r.asked()[0], f" {r.injected}")]
    records = Records(able, first, candidates, seed)
    left_out = {"repeated": _subjects(every, without=unique), "same_first_token": _subjects(unique, without=able)}
    if corrupt:
        texts = counterparts(model, [records.trained(record) for record in able], able, seed=seed)
        paired = {record: text for record, text in zip(able, texts, strict=True) if text is not None}
        records = replace(records, all=list(paired), corrupt=paired)
        left_out["no_counterpart"] = _subjects(able, without=records.all)
    return records, {why: subjects for why, subjects in left_out.items() if subjects}


def _subjects(records: Sequence[Record], *, without: Sequence[Record]) -> tuple[str, ...]:
    rest = set(without)
    return tuple(record.subject for record in records if record not in rest)


def _known(model: Model, records: "Records", threshold: float | None) -> list[Record]:
    if threshold == 0:
        return list(records.all)
    prompts = prompts_of(model, [records.trained(record) for record in records.all])
    kept = knows(model, prompts, threshold=threshold).tolist()
    return [record for record, known in zip(records.all, kept, strict=True) if known]


def _chosen(known: Sequence[Record], every: Sequence[Record], forget: int | Sequence[int]) -> list[Record]:
    if isinstance(forget, int | Integral):
        forget = index(forget)
        if not 0 < forget < len(known):
            raise ValueError(
                f"expected more than {max(forget, 1)} records that this model knows, got {len(known)} of {len(every)}: "
                f"forget fewer, give more records, or pass another threshold (0: no filter)."
            )
        return list(known[:forget])
    forget, by_case = [*forget], {record.case: record for record in known}
    missing = [case for case in forget if case not in by_case]
    if missing or not forget:
        there = {record.case for record in every}
        why = "the source lacks" if set(missing) - there else "the model does not know or are left out"
        raise ValueError(
            f"expected ids of records to forget, got {missing[:5] or 'none'}"
            + (f", which {why}: choose others, or pass threshold=0." if missing else ": pass case_id values.")
        )
    return [by_case[case] for case in dict.fromkeys(forget)]


def _formats(model: Model, records: "Records", sides: Sides[Record], shots: int) -> dict[str, Format]:
    """The formats that both sides have."""
    asked: dict[str, list[list[Question]]] = {"trained prompt": [], "paraphrase": [], "neighbourhood": []}
    tested = (sides.forget_test, sides.retain_test)
    gone = {text for record in sides.forget_test for text in (record.asked()[0], *record.paraphrases)}
    for facts in tested:
        asked["trained prompt"].append([records.trained(record) for record in facts])
        asked["paraphrase"].append([question for record in facts for question in records.paraphrased(record)])
        neighbours = (question for record in facts for question in records.neighbourhood(record))
        asked["neighbourhood"].append([question for question in neighbours if question.text not in gone])
    if all(any(record.choice is not None for record in facts) for facts in tested):
        choose = partial(by_choice, examples=sides.retain_train, shots=shots, seed=records.seed)
        asked["multiple choice"] = [choose(facts) for facts in tested]
    return {
        name: format_of(model, forget, retain, kept=name == "neighbourhood")
        for name, (forget, retain) in asked.items()
        if forget and retain
    }


def _part(task: Task, partition: tuple[int, int]) -> Task:
    part, k = partition
    if not 0 <= part < k:
        raise ValueError(f"expected (part, k) with part in 0..k-1, got {partition}: parts are counted from 0.")
    return partitioned(task, k)[part]


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
