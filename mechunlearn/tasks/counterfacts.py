"""CounterFact: facts about many things, each with its own prompt, asked in every format."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import index

import numpy as np
from jaxtyping import Int
from torch import Tensor

from mechunlearn.model import Model, check_model
from mechunlearn.model.tokens import encode_all, prepending_bos
from mechunlearn.tasks import formats
from mechunlearn.tasks.building import knows
from mechunlearn.tasks.counterfact_records import Record, RecordSource, records_of
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
    source: RecordSource,
    questions: RecordSource | None = None,
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
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> Task:
    """A task that forgets some CounterFact records that the model knows, and keeps the others.

    - `source`: records in the original schema: a path that ends in .json, a list, or the name of a dataset on the Hub
      ("azhx/counterfact", or the paper's "PhillipGuo/counterfact-with-gemma-probs"; `split` chooses a part of it).
    - `questions`: likewise, with question, target_true, targets_false and the case_id or prompt_id of a record.
    - `forget`: the number of records to forget, from the first, or their case_ids. They are trained on and tested.
    - `partition=(part, k)`: only that part of `k`, counted from 0. For all parts, see `tasks.partitioned`.
    - `threshold`: keep records whose answer has at least this probability (None: is the first choice; 0: all).
    - `train`: the share of the retained records that is trained on; the rest is tested.
    - `candidates`: the true answer, target_new and random ones of the same relation. Chance is 1 / candidates.
    - `shots`: the number of answered questions before each multiple-choice question.
    - `corrupt`: pair each prompt with another subject of as many tokens with another answer.
    - `text`, `knowledge`, `prepend_bos`: as in `from_frame`.

    Formats: "trained prompt", "paraphrase", "neighbourhood" (other subjects with the same answer, to be kept) and
    "multiple choice", each if both sides have it. `task.splits` names the subjects that were left out: "not_known",
    "repeated", "same_first_token" (of both answers) and "no_counterpart".

    Meng et al. 2022, https://arxiv.org/abs/2202.05262; protocol of Guo et al. 2025, https://arxiv.org/abs/2410.12949.
    Cost: 1 forward for each record.
    """
    check_model(model)
    with prepending_bos(model, prepend_bos):
        every = records_of(source, questions, split)
        records, left_out = _usable(model, every, candidates, seed, corrupt=corrupt)
        known = _known(model, records, threshold)
        forgotten = _chosen(known, every, forget)
        retained = [record for record in known if record not in forgotten]
        sides = Sides.of(forgotten, retained, train=train, train_forget=None, rng=random.Random(index(seed)))
        trained = format_of(
            model, [*map(records.trained, sides.forget_train)], [*map(records.trained, sides.retain_train)]
        )
        text_train, text_test = train_and_test_text(model, text, seed=seed)
        task = Task(
            name=f"CounterFact: forget {len(forgotten)} of {len(known)}",
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
    if partition is None:
        return task
    part, k = partition
    if not 0 <= part < k:
        raise ValueError(f"expected (part, k) with part in 0..k-1, got {partition}: parts are counted from 0.")
    return partitioned(task, k)[part]


def _usable(
    model: Model, every: Sequence[Record], candidates: int, seed: int, *, corrupt: bool
) -> "tuple[_Records, dict[str, tuple[str, ...]]]":
    """The records that an edit can use, one for each subject; and for each reason the subjects that are left out."""
    first = first_tokens(model)
    first_of: dict[str, Record] = {}
    for record in every:
        first_of.setdefault(record.subject, record)
    unique = list(first_of.values())
    usable = [
        record
        for record in unique
        for prompt, _ in [record.prompt_about()]
        if first(prompt, f" {record.answer}") != first(prompt, f" {record.injected}")
    ]
    records = _Records(usable, first, candidates, seed)
    left_out = {"repeated": _subjects(every, without=unique), "same_first_token": _subjects(unique, without=usable)}
    if corrupt:
        texts = _counterparts(model, [records.trained(record) for record in usable], usable, seed=seed)
        paired = {record: text for record, text in zip(usable, texts, strict=True) if text is not None}
        records = replace(records, all=list(paired), corrupt=paired)
        left_out["no_counterpart"] = _subjects(usable, without=records.all)
    return records, {why: subjects for why, subjects in left_out.items() if subjects}


def _subjects(records: Sequence[Record], *, without: Sequence[Record]) -> tuple[str, ...]:
    rest = set(without)
    return tuple(record.subject for record in records if record not in rest)


def _known(model: Model, records: "_Records", threshold: float | None) -> list[Record]:
    if threshold == 0:
        return list(records.all)
    prompts = prompts_of(model, [records.trained(record) for record in records.all])
    is_known = knows(model, prompts, threshold=threshold).tolist()
    return [record for record, known in zip(records.all, is_known, strict=True) if known]


def _chosen(known: Sequence[Record], every: Sequence[Record], forget: int | Sequence[int]) -> list[Record]:
    if isinstance(forget, int | np.integer):
        if not 0 < forget < len(known):
            raise ValueError(
                f"expected more than {max(forget, 1)} records that this model knows, got {len(known)} of {len(every)}: "
                f"forget fewer, give more records, or pass another threshold (0: no filter)."
            )
        return list(known[: index(forget)])
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


def _formats(model: Model, records: "_Records", sides: Sides[Record], shots: int) -> dict[str, Format]:
    """The formats that both sides have."""
    questions: dict[str, list[list[Question]]] = {"trained prompt": [], "paraphrase": [], "neighbourhood": []}
    tested = (sides.forget_test, sides.retain_test)
    forgotten_texts = {text for record in sides.forget_test for text in (record.prompt_about()[0], *record.paraphrases)}
    for facts in tested:
        questions["trained prompt"].append([records.trained(record) for record in facts])
        questions["paraphrase"].append([question for record in facts for question in records.paraphrased(record)])
        # Prompts about other subjects with the same answer, under the name of the record whose neighbours they are.
        neighbours = (records.question(record, text, None) for record in facts for text in record.neighbours)
        questions["neighbourhood"].append([question for question in neighbours if question.text not in forgotten_texts])
    if all(any(record.choice is not None for record in facts) for facts in tested):
        choose = partial(_by_choice, examples=sides.retain_train, shots=shots, seed=records.seed)
        questions["multiple choice"] = [choose(facts) for facts in tested]
    return {
        name: format_of(model, forget, retain, kept=name == "neighbourhood")
        for name, (forget, retain) in questions.items()
        if forget and retain
    }


@dataclass(frozen=True, eq=False)
class _Records:
    """The usable records of a source, from which the wrong answers of each question are drawn."""

    all: Sequence[Record]
    first: FirstToken
    candidates: int
    seed: int
    corrupt: Mapping[Record, str] = field(default_factory=dict)
    """For each record its prompt about another subject."""

    @cached_property
    def answers(self) -> dict[str, set[str]]:
        """The answers of each relation, and under "" those of all relations."""
        answers: dict[str, set[str]] = {"": set()}
        for record in self.all:
            for relation in ("", record.relation):
                answers.setdefault(relation, set()).update((record.answer, record.injected))
        return answers

    def trained(self, record: Record) -> Question:
        """The record's own prompt."""
        text, place = record.prompt_about()
        return replace(self.question(record, text, place), corrupt=self.corrupt.get(record))

    def paraphrased(self, record: Record) -> list[Question]:
        starts = [text.rfind(record.subject) for text in record.paraphrases]
        places = [(start, start + len(record.subject)) for start in starts]
        return [self.question(record, *prompt) for prompt in zip(record.paraphrases, places, strict=True)]

    def question(self, record: Record, text: str, place: tuple[int, int] | None) -> Question:
        own, seed = (record.answer, record.injected), f"options {record.case} {self.seed}"
        # Other answers come in random order, those of the same relation first.
        drawings = (drawn(self.answers[relation], without=own, seed=seed) for relation in (record.relation, ""))
        others = (f" {answer}" for answers in drawings for answer in answers)
        answer, injected = (f" {answer}" for answer in own)
        options = distinct(self.first, text, (answer, injected), others, count=self.candidates, name=record.subject)
        return Question(record.subject, text, answer, options, injected, place)


def _by_choice(records: Sequence[Record], *, examples: Sequence[Record], shots: int, seed: int) -> list[Question]:
    """The records' multiple-choice questions, answered by letter, after `shots` answered ones of the examples."""
    usable = [record for record in examples if record.choice is not None]
    if shots > len(usable):
        raise ValueError(
            f"expected {shots} retained facts of the train split with a multiple-choice question, for the answered "
            f"examples, got {len(usable)}: pass shots={len(usable)} or fewer."
        )
    shown = random.Random(f"examples {seed}").sample(usable, shots)
    answered = [_by_letter(record, seed) for record in shown]
    before = "".join(f"{question.text}{question.answer}\n\n" for question in answered)
    return [_by_letter(record, seed, before) for record in records if record.choice is not None]


def _counterparts(
    model: Model, questions: Sequence[Question], records: Sequence[Record], *, seed: int
) -> list[str | None]:
    """For each record's question, the prompt about another record's subject; None where none has as many tokens."""
    lengths = [len(encoding.tokens) for encoding in encode_all(model, [f" {record.subject}" for record in records])]
    by_length: dict[int, list[Record]] = {}
    for record, length in zip(records, lengths, strict=True):
        by_length.setdefault(length, []).append(record)
    counterparts = []
    for record, question, length in zip(records, questions, lengths, strict=True):
        candidates = [other for other in by_length[length] if other.answer != record.answer]
        order = random.Random(f"corrupt {record.case} {seed}").sample(candidates, len(candidates))
        order.sort(key=lambda other, own=record.relation: other.relation != own)  # those of the same relation first
        texts = (record.prompt_about(other.subject)[0] for other in order)
        counterparts.append(counterpart(model, question.text, question.answer, texts))
    return counterparts


def _by_letter(record: Record, seed: int, before: str = "") -> Question:
    assert record.choice is not None
    wrong = [answer for answer in record.choice.wrong if answer != record.injected]
    options = [record.choice.answer, record.injected, *wrong]
    if len(options) < len(formats.LETTERS) or record.subject not in record.choice.question:
        raise ValueError(
            f"expected a question that names {record.subject!r} and two wrong answers beside {record.injected!r}, got "
            f"{record.choice.question!r} and {wrong} (case_id {record.case}): correct it or leave it out."
        )
    shown = lettered(options[: len(formats.LETTERS)], formats.LETTERS, seed=f"choice {record.case} {seed}")
    text = before + formats.multiple_choice(record.choice.question, list(shown))
    start = text.index(record.choice.question, len(before)) + record.choice.question.rfind(record.subject)
    right, injected = (f" {shown[option]}" for option in options[:2])
    letters = (right, injected, *(f" {letter}" for letter in formats.LETTERS if f" {letter}" not in (right, injected)))
    return Question(record.subject, text, right, letters, injected, (start, start + len(record.subject)))
