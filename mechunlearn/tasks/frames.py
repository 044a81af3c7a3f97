"""A researcher's own facts: one row each of a table, in templates."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from operator import index
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from mechunlearn.model import Model, check_model
from mechunlearn.model.tokens import encode
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.questions import (
    SUBJECT,
    FirstToken,
    Question,
    check_template,
    counterpart,
    distinct,
    drawn,
    filled,
    first_tokens,
    format_of,
    lettered,
    letters_of,
    with_subject,
)
from mechunlearn.tasks.splits import Sides
from mechunlearn.tasks.task import Format, Task
from mechunlearn.tasks.text import train_and_test_text

if TYPE_CHECKING:
    from pandas import DataFrame, Series


def from_frame(
    model: Model,
    frame: "DataFrame",
    *,
    prompt: str,
    forget: "str | int | Iterable[str] | Iterable[bool] | Series",
    subject: str = "subject",
    answer: str = "answer",
    formats: Mapping[str, str] | None = None,
    injected: str | None = None,
    candidates: int | Sequence[str] = 4,
    between: str = " ",
    corrupt: bool = True,
    split_forget: bool = False,
    train: float = 0.8,
    text: Iterable[str] | Int[Tensor, "row pos"] | None = None,
    knowledge: Prompts | None = None,
    name: str = "own facts",
    seed: int = 0,
) -> Task:
    """Facts of your own, a row each, as a task: `from_frame(model, frame, prompt="{subject} lives in", forget=[...])`.

    `prompt`, the trained one, and `formats` (name -> template) end right before the answer. `{subject}` stands for the
    column `subject`, whatever its name; `{column}` for any column. A template with {A}, {B}, ... is multiple choice:
    the options are the answer, the injected one and answers of other rows, in random order, and a letter is the answer.
    `between` stands between a prompt and its answer.

    `forget`: the name of a column of booleans, a boolean for each row, a list of subjects, or the number of rows to
    forget, from the first. The other rows are retained: `train` of them to train on, the rest to test on. What is
    forgotten is tested on the very facts that are trained on, or, with `split_forget`, split likewise: for facts of a
    kind, when the claim is that all of the kind is gone.

    `injected`: a column, or one answer for all (such as "unknown"), which `task.injection` puts in place of the true
    answer. `candidates`: how many possible answers a prompt has (or all of them, the same for every prompt): the true
    one, the injected one and answers of other rows, drawn at random among those that differ in their first token; fewer
    for all prompts of a format, where a row has too few. Chance is 1 / candidates.

    `corrupt`: a corrupted prompt names another subject of as many tokens that has another answer. A fact to forget for
    which there is none is an error; retained facts have them if all of them find one. `text`: strings, or rows by
    `pack`; default: everyday sentences. `knowledge`: what else to test, such as `general_knowledge(model)`, which has
    facts of its own (capitals, authors, ...) that should not be among yours.

    Each subject is one fact. ValueError for missing columns, subjects that come twice, empty cells, a template without
    the subject, equal true and injected answers, and nothing to forget or to retain.
    """
    check_model(model)
    templates = {
        title: with_subject(template, subject)
        for title, template in {"trained prompt": prompt, **(formats or {})}.items()
    }
    for template in templates.values():
        check_template(template, [str(column) for column in frame.columns], between=between)
    if letters_of(templates["trained prompt"]):
        raise ValueError(f"expected a trained prompt without options, got {prompt!r}: put multiple choice in formats.")
    facts = facts_of(frame, subject=subject, answer=answer, injected=injected)
    gone = chosen(frame, facts, forget)
    check_injected(gone)
    kept = [fact for fact in facts if fact not in gone]
    train_forget = train if split_forget else None
    sides = Sides.of(gone, kept, train=train, train_forget=train_forget, rng=random.Random(index(seed)))
    asking = Asking(facts, first_tokens(model), candidates, between, seed)
    trained = _trained(model, templates["trained prompt"], asking, sides, corrupt=corrupt)
    text_train, text_test = train_and_test_text(model, text, seed=seed)
    return Task(
        name=f"{name}: forget {len(gone)} of {len(facts)}",
        forget=trained.forget,
        retain=trained.retain,
        formats={
            title: format_of(
                model,
                [asking.ask(template, fact, title=title) for fact in sides.forget_test],
                [asking.ask(template, fact, title=title) for fact in sides.retain_test],
            )
            for title, template in templates.items()
        },
        text=text_train,
        text_test=text_test,
        injection=trained.injected,
        knowledge=knowledge,
        splits=sides.names(lambda fact: fact.subject),
    )


def _trained(model: Model, template: str, asking: "Asking", sides: "Sides[Fact]", *, corrupt: bool) -> Format:
    """What an editor trains on, with corrupted counterparts."""
    forget = [asking.ask(template, fact) for fact in sides.forget_train]
    retain = [asking.ask(template, fact) for fact in sides.retain_train]
    if corrupt:
        pair = partial(corrupted, model, template, asking.facts, seed=asking.seed)
        forget, retain = pair(forget, required=True), pair(retain, required=False)
    return format_of(model, forget, retain)


@dataclass(frozen=True)
class Fact:
    """A row: what it is about, its answer, and the other columns for templates."""

    subject: str
    answer: str
    """Without the space before it."""
    injected: str | None = None
    columns: dict[str, str] = field(default_factory=dict, compare=False)


def facts_of(frame: "DataFrame", *, subject: str, answer: str, injected: str | None) -> list[Fact]:
    """A fact for each row; `injected` is a column, or the answer itself. ValueError if one is missing."""
    missing = [column for column in (subject, answer) if column not in frame.columns]
    if missing:
        raise ValueError(
            f"expected columns {subject} and {answer}, got {list(frame.columns)}: pass subject=... and answer=..., the "
            f"names of your columns."
        )
    subjects, answers = _cells(frame, subject), _cells(frame, answer)
    twice = sorted({each for each in subjects if subjects.count(each) > 1})
    if twice:
        raise ValueError(
            f"expected each subject once, got {twice[:5]} several times: keep one row of each, or make several tasks."
        )
    instead = _injected(frame, injected)
    columns = [dict(zip(map(str, frame.columns), map(str, row), strict=True)) for row in frame.itertuples(index=False)]
    facts = [Fact(*row) for row in zip(subjects, answers, instead, columns, strict=True)]
    same = [fact.subject for fact in facts if fact.injected == fact.answer]
    if same:
        raise ValueError(
            f"expected injected answers other than the true ones, got the same for {same[:5]}: change them, or leave "
            f"these rows out."
        )
    return facts


def chosen(
    frame: "DataFrame", facts: Sequence[Fact], forget: "str | int | Iterable[str] | Iterable[bool] | Series"
) -> list[Fact]:
    """The facts to forget, in the order of the rows (of a list of subjects: in its order)."""
    if isinstance(forget, str):
        if forget not in frame.columns:
            raise ValueError(
                f"expected a column that says what to forget, got {forget!r}, which is none of {list(frame.columns)}: "
                f"pass its name, a list of subjects ([{forget!r}]), or a number."
            )
        return _marked(facts, frame[forget].tolist())
    if isinstance(forget, int | Integral):
        forget = index(forget)
        if not 0 < forget < len(facts):
            raise ValueError(f"forget must lie in 1..{len(facts) - 1} (rows of the frame), got {forget}.")
        return list(facts[:forget])
    given = list(forget)
    if all(isinstance(each, str) for each in given):
        return _named(facts, [str(each) for each in given])
    return _marked(facts, given)


def check_injected(facts: Sequence[Fact]) -> None:
    """ValueError if some of the facts to forget have an injected answer and others have none."""
    without = [fact.subject for fact in facts if fact.injected is None]
    if 0 < len(without) < len(facts):
        raise ValueError(
            f"expected an injected answer of every fact to forget, got none for {without[:5]}: fill it in."
        )


def _named(facts: Sequence[Fact], subjects: Sequence[str]) -> list[Fact]:
    by_subject = {fact.subject: fact for fact in facts}
    unknown = [each for each in subjects if each not in by_subject]
    if unknown or not subjects:
        raise ValueError(f"expected subjects of the frame, got {unknown[:5] or 'none'}: check the spelling.")
    return [by_subject[each] for each in dict.fromkeys(subjects)]


def _marked(facts: Sequence[Fact], marks: Sequence[object]) -> list[Fact]:
    wrong = [mark for mark in marks if mark not in (True, False)]
    if wrong or len(marks) != len(facts):
        raise ValueError(
            f"expected True or False for each of the {len(facts)} rows, got {len(marks)} values"
            + (f", among them {wrong[0]!r}" if wrong else "")
            + ": compare the column with what is to be forgotten."
        )
    return [fact for fact, mark in zip(facts, marks, strict=True) if mark]


def _injected(frame: "DataFrame", injected: str | None) -> list[str | None]:
    if injected is None:
        return [None] * len(frame)
    if injected not in frame.columns:
        return [injected.strip()] * len(frame)
    return [None if cell is None else str(cell).strip() for cell in _or_none(frame, injected)]


def _cells(frame: "DataFrame", column: str) -> list[str]:
    """As text without spaces around it."""
    cells = ["" if cell is None else str(cell).strip() for cell in _or_none(frame, column)]
    empty = [row for row, cell in enumerate(cells) if not cell]
    if empty:
        raise ValueError(f"expected something in every cell of {column}, got nothing in rows {empty[:5]}: drop them.")
    return cells


def _or_none(frame: "DataFrame", column: str) -> list[object]:
    return [cell if there else None for cell, there in zip(frame[column], frame[column].notna(), strict=True)]


@dataclass(frozen=True)
class Asking:
    """How facts are asked, and with which other answers."""

    facts: Sequence[Fact]
    first: FirstToken
    candidates: int | Sequence[str]
    between: str
    seed: int

    def ask(self, template: str, fact: Fact, *, title: str = "") -> Question:
        """The fact in the template: with its answer, or, where the template has letters for options, with a letter."""
        letters = letters_of(template)
        return self._by_letter(template, fact, letters, title) if letters else self._in_a_sentence(template, fact)

    def _in_a_sentence(self, template: str, fact: Fact) -> Question:
        text, place = filled(template, {**fact.columns, SUBJECT: fact.subject})
        given, others = _given(fact), self._others(fact)
        count = len(given) + len(others)
        if isinstance(self.candidates, int | Integral):
            count = index(self.candidates)
        else:
            given, others = [*given, *others], []
        options = distinct(
            self.first,
            text,
            [self.between + each for each in given],
            [self.between + each for each in others],
            count=count,
            name=fact.subject,
        )
        injected = None if fact.injected is None else self.between + fact.injected
        return Question(fact.subject, text, self.between + fact.answer, options, injected, place)

    def _by_letter(self, template: str, fact: Fact, letters: Sequence[str], title: str) -> Question:
        options = [*_given(fact), *self._others(fact)][: len(letters)]
        if len(options) < len(letters):
            raise ValueError(
                f"expected {len(letters)} different answers to choose from, got {options}: take options out of the "
                f"template {title!r}, or add facts with other answers."
            )
        shown = lettered(options, letters, seed=f"{title} {fact.subject} {self.seed}")
        fields = {letter: option for option, letter in shown.items()}
        text, place = filled(template, {**fact.columns, **fields, SUBJECT: fact.subject})
        injected = None if fact.injected is None else self.between + shown[fact.injected]
        answers = tuple(self.between + letter for letter in letters)
        answer = self.between + shown[fact.answer]
        return Question(fact.subject, text, answer, _leading(answers, answer, injected), injected, place)

    def _others(self, fact: Fact) -> list[str]:
        """Answers apart from the fact's own, in the given order or in a random one."""
        if isinstance(self.candidates, int | Integral):
            answers = {other.answer for other in self.facts}
            return drawn(answers, without=_given(fact), seed=f"options {fact.subject} {self.seed}")
        given = [each.strip() for each in self.candidates]
        if fact.answer not in given:
            raise ValueError(f"expected the answer {fact.answer!r} among the candidates, got {given}: add it.")
        return [each for each in given if each not in _given(fact)]


def corrupted(
    model: Model, template: str, facts: Sequence[Fact], asked: Sequence[Question], *, required: bool, seed: int
) -> list[Question]:
    """The questions with a counterpart about another of the facts, or without any if one has none."""
    lengths = {fact.subject: len(encode(model, f" {fact.subject}").tokens) for fact in facts}
    by_subject = {fact.subject: fact for fact in facts}
    found = []
    for question in asked:
        fact = by_subject[question.name]
        same = [o for o in facts if o.answer != fact.answer and lengths[o.subject] == lengths[fact.subject]]
        texts = _about_others(template, fact, same, seed)
        found.append(replace(question, corrupt=counterpart(model, question.text, question.answer, texts)))
    alone = [question.name for question in found if question.corrupt is None]
    if alone and required:
        raise ValueError(
            f"expected for each fact to forget another subject of as many tokens with another answer, got none for "
            f"{alone[:5]}: add such rows, or pass corrupt=False (methods that patch will not run)."
        )
    return list(asked) if alone else found


def _about_others(template: str, fact: Fact, others: Sequence[Fact], seed: int) -> Iterator[str]:
    subjects = drawn([other.subject for other in others], without=(), seed=f"corrupt {fact.subject} {seed}")
    return (filled(template, {**fact.columns, SUBJECT: subject})[0] for subject in subjects)


def _given(fact: Fact) -> list[str]:
    return [fact.answer] if fact.injected is None else [fact.answer, fact.injected]


def _leading(answers: Sequence[str], answer: str, injected: str | None) -> tuple[str, ...]:
    """All of them, the right and the injected one first."""
    first = [answer] if injected is None else [answer, injected]
    return (*first, *(each for each in answers if each not in first))
