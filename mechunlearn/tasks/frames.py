"""A researcher's own facts: one row each of a table, in templates."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import index
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int
from torch import Tensor

from mechunlearn.model import Model, check_model
from mechunlearn.model.tokens import encode_all, prepending_bos
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
    between: str | Mapping[str, str] = " ",
    corrupt: bool = True,
    split_forget: bool = False,
    train: float = 0.8,
    text: Iterable[str] | Int[Tensor, "row pos"] | None = None,
    knowledge: Prompts | None = None,
    name: str = "own facts",
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> Task:
    """A task of your own facts, one a row: `from_frame(model, frame, prompt="{subject} lives in", forget=[...])`.

    - `prompt`: the trained template, up to the answer. `{subject}` is the subject, `{column}` any column.
    - `formats`: name -> another template. One with {A}, {B}, ... is multiple choice, answered by letter, among the
      answer, the injected one and answers of other rows.
    - `between`: what stands between a prompt and its answer ("" behind a chat template); or title -> that, of formats
      that have another than " ". The title of `prompt` is "trained prompt".
    - `forget`: a column of booleans, a boolean for each row, subjects, or a number of rows, from the first.
    - `train`: the share of the retained rows that is trained on; the rest is tested. Rows to forget are trained on and
      tested, or split likewise with `split_forget`: does forgetting carry over?
    - `injected`: a column, or one answer for all, which `task.injection` puts in place of the true one.
    - `candidates`: the number of possible answers (the true one, the injected one, random ones of other rows), or all
      of them. They differ in their first token. Chance is 1 / candidates; where a row has too few, its format has.
    - `corrupt`: pair each prompt with another subject of as many tokens with another answer. Facts to forget must have
      one; retained facts get theirs if all have one.
    - `text`: strings, or rows by `pack`; default: everyday sentences.
    - `knowledge`: what else to test, such as `general_knowledge(model)`.

    Each subject comes once, no cell is empty, and an injected answer is not the true one: else ValueError.
    """
    check_model(model)
    templates = {
        title: with_subject(template, subject)
        for title, template in {"trained prompt": prompt, **(formats or {})}.items()
    }
    spaces = _spaces(between, list(templates))
    for title, template in templates.items():
        check_template(template, [str(column) for column in frame.columns], between=spaces[title])
    if letters_of(templates["trained prompt"]):
        raise ValueError(f"expected a trained prompt without options, got {prompt!r}: put multiple choice in formats.")
    facts = _facts_of(frame, subject=subject, answer=answer, injected=injected)
    forgotten = _forgotten(frame, facts, forget)
    _check_injected(forgotten)
    retained = [fact for fact in facts if fact not in forgotten]
    train_forget = train if split_forget else None
    sides = Sides.of(forgotten, retained, train=train, train_forget=train_forget, rng=random.Random(index(seed)))
    with prepending_bos(model, prepend_bos):
        questions = _Questions(facts, first_tokens(model), candidates, spaces, seed)
        trained = _trained(model, templates["trained prompt"], questions, sides, corrupt=corrupt)
        text_train, text_test = train_and_test_text(model, text, seed=seed)
        asked = {}
        for title, template in templates.items():
            ask = partial(questions.question, template, title=title)
            asked[title] = format_of(model, [*map(ask, sides.forget_test)], [*map(ask, sides.retain_test)])
        return Task(
            name=f"{name}: forget {len(forgotten)} of {len(facts)}",
            forget=trained.forget,
            retain=trained.retain,
            formats=asked,
            text=text_train,
            text_test=text_test,
            injection=trained.injected,
            knowledge=knowledge,
            splits=sides.names(lambda fact: fact.subject),
        )


def _spaces(between: str | Mapping[str, str], titles: Sequence[str]) -> dict[str, str]:
    """For each format what stands before its answers."""
    if isinstance(between, str):
        return dict.fromkeys(titles, between)
    unknown = sorted(set(between) - set(titles))
    if unknown:
        raise ValueError(f"expected between=... of formats ({', '.join(titles)}), got {unknown[0]!r}: check its title.")
    return {title: between.get(title, " ") for title in titles}


def _trained(model: Model, template: str, questions: "_Questions", sides: "Sides[Fact]", *, corrupt: bool) -> Format:
    """What an editor trains on, with corrupted counterparts if they are wanted."""
    forget = [questions.question(template, fact) for fact in sides.forget_train]
    retain = [questions.question(template, fact) for fact in sides.retain_train]
    if corrupt:
        pair = partial(_with_counterparts, model, template, questions.facts, seed=questions.seed)
        forget, retain = pair(forget, required=True), pair(retain, required=False)
    return format_of(model, forget, retain)


@dataclass(frozen=True)
class Fact:
    """A row of the frame."""

    subject: str
    answer: str
    """The answer, without the space before it."""
    injected: str | None = None
    columns: dict[str, str] = field(default_factory=dict, compare=False)
    """All cells of the row, for templates."""


def _facts_of(frame: "DataFrame", *, subject: str, answer: str, injected: str | None) -> list[Fact]:
    """A fact for each row; `injected` is a column, or the answer itself. ValueError if one is missing."""
    missing = [column for column in (subject, answer) if column not in frame.columns]
    if missing:
        raise ValueError(
            f"expected columns {subject} and {answer}, got {list(frame.columns)}: pass subject=... and answer=..., the "
            f"names of your columns."
        )
    subjects, answers = _cells(frame, subject), _cells(frame, answer)
    twice = sorted({name for name in subjects if subjects.count(name) > 1})
    if twice:
        raise ValueError(
            f"expected each subject once, got {twice[:5]} several times: keep one row of each, or make several tasks."
        )
    injected_answers: list[str | None] = [None if injected is None else injected.strip()] * len(frame)
    if injected is not None and injected in frame.columns:
        injected_answers = [None if cell is None else str(cell).strip() for cell in _or_none(frame, injected)]
    columns = [dict(zip(map(str, frame.columns), map(str, row), strict=True)) for row in frame.itertuples(index=False)]
    facts = [Fact(*row) for row in zip(subjects, answers, injected_answers, columns, strict=True)]
    same = [fact.subject for fact in facts if fact.injected == fact.answer]
    if same:
        raise ValueError(
            f"expected injected answers other than the true ones, got the same for {same[:5]}: change them, or leave "
            f"these rows out."
        )
    return facts


def _forgotten(
    frame: "DataFrame", facts: Sequence[Fact], forget: "str | int | Iterable[str] | Iterable[bool] | Series"
) -> list[Fact]:
    """The facts to forget, in the order of the rows, or in that of a list of subjects."""
    if isinstance(forget, str):
        if forget not in frame.columns:
            raise ValueError(
                f"expected a column that says what to forget, got {forget!r}, which is none of {list(frame.columns)}: "
                f"pass its name, a list of subjects ([{forget!r}]), or a number."
            )
        return _marked(facts, frame[forget].tolist())
    if isinstance(forget, int | np.integer):
        if not 0 < forget < len(facts):
            raise ValueError(f"forget must lie in 1..{len(facts) - 1} (rows of the frame), got {forget}.")
        return list(facts[: index(forget)])
    choices = list(forget)
    if all(isinstance(choice, str) for choice in choices):
        return _named(facts, [str(choice) for choice in choices])
    return _marked(facts, choices)


def _check_injected(facts: Sequence[Fact]) -> None:
    without = [fact.subject for fact in facts if fact.injected is None]
    if 0 < len(without) < len(facts):
        raise ValueError(
            f"expected an injected answer of every fact to forget, got none for {without[:5]}: fill it in."
        )


def _named(facts: Sequence[Fact], subjects: Sequence[str]) -> list[Fact]:
    by_subject = {fact.subject: fact for fact in facts}
    unknown = [name for name in subjects if name not in by_subject]
    if unknown or not subjects:
        raise ValueError(f"expected subjects of the frame, got {unknown[:5] or 'none'}: check the spelling.")
    return [by_subject[name] for name in dict.fromkeys(subjects)]


def _marked(facts: Sequence[Fact], marks: Sequence[object]) -> list[Fact]:
    wrong = [mark for mark in marks if mark not in (True, False)]
    if wrong or len(marks) != len(facts):
        raise ValueError(
            f"expected True or False for each of the {len(facts)} rows, got {len(marks)} values"
            + (f", among them {wrong[0]!r}" if wrong else "")
            + ": compare the column with what is to be forgotten."
        )
    return [fact for fact, mark in zip(facts, marks, strict=True) if mark]


def _cells(frame: "DataFrame", column: str) -> list[str]:
    """The cells of a column as text without spaces around it; ValueError for an empty one."""
    cells = ["" if cell is None else str(cell).strip() for cell in _or_none(frame, column)]
    empty = [row for row, cell in enumerate(cells) if not cell]
    if empty:
        raise ValueError(f"expected something in every cell of {column}, got nothing in rows {empty[:5]}: drop them.")
    return cells


def _or_none(frame: "DataFrame", column: str) -> list[object]:
    return [cell if there else None for cell, there in zip(frame[column], frame[column].notna(), strict=True)]


@dataclass(frozen=True)
class _Questions:
    """The questions of a task: facts in templates, with wrong answers from other facts."""

    facts: Sequence[Fact]
    first: FirstToken
    candidates: int | Sequence[str]
    between: Mapping[str, str]
    """For each format what stands before its answers."""
    seed: int

    def question(self, template: str, fact: Fact, *, title: str = "trained prompt") -> Question:
        """The fact in the template, answered in words, or by letter if the template has letters for options."""
        asked = self._by_letter if letters_of(template) else self._in_a_sentence
        return asked(template, fact, title)

    def _in_a_sentence(self, template: str, fact: Fact, title: str) -> Question:
        before = self.between[title]
        text, place = filled(template, {**fact.columns, SUBJECT: fact.subject})
        own, others = _own_answers(fact), self._others(fact)
        count = len(own) + len(others)
        if isinstance(self.candidates, int | np.integer):
            count = index(self.candidates)
        else:
            own, others = [*own, *others], []
        own, others = ([before + option for option in options] for options in (own, others))
        options = distinct(self.first, text, own, others, count=count, name=fact.subject)
        injected = None if fact.injected is None else before + fact.injected
        return Question(fact.subject, text, before + fact.answer, options, injected, place)

    def _by_letter(self, template: str, fact: Fact, title: str) -> Question:
        letters, before = letters_of(template), self.between[title]
        options = [*_own_answers(fact), *self._others(fact)][: len(letters)]
        if len(options) < len(letters):
            raise ValueError(
                f"expected {len(letters)} different answers to choose from, got {options}: take options out of the "
                f"template {title!r}, or add facts with other answers."
            )
        shown = lettered(options, letters, seed=f"{title} {fact.subject} {self.seed}")
        fields = {letter: option for option, letter in shown.items()}
        text, place = filled(template, {**fact.columns, **fields, SUBJECT: fact.subject})
        own = [before + shown[option] for option in _own_answers(fact)]
        others = [before + letter for letter in letters if before + letter not in own]
        injected = None if fact.injected is None else own[1]
        return Question(fact.subject, text, own[0], (*own, *others), injected, place)

    def _others(self, fact: Fact) -> list[str]:
        """Answers that are not the fact's own: in the order of `candidates`, or of all facts in random order."""
        if isinstance(self.candidates, int | np.integer):
            answers = {other.answer for other in self.facts}
            return drawn(answers, without=_own_answers(fact), seed=f"options {fact.subject} {self.seed}")
        options = [option.strip() for option in self.candidates]
        if fact.answer not in options:
            raise ValueError(f"expected the answer {fact.answer!r} among the candidates, got {options}: add it.")
        return [option for option in options if option not in _own_answers(fact)]


def _with_counterparts(
    model: Model, template: str, facts: Sequence[Fact], questions: Sequence[Question], *, required: bool, seed: int
) -> list[Question]:
    """The questions with a corrupted text about another fact each; without any if one has none and it may lack it."""
    encodings = encode_all(model, [f" {fact.subject}" for fact in facts])
    lengths = {fact.subject: len(encoding.tokens) for fact, encoding in zip(facts, encodings, strict=True)}
    by_subject = {fact.subject: fact for fact in facts}
    paired = []
    for question in questions:
        fact = by_subject[question.name]
        of_same_length = [o for o in facts if o.answer != fact.answer and lengths[o.subject] == lengths[fact.subject]]
        subjects = drawn([o.subject for o in of_same_length], without=(), seed=f"corrupt {fact.subject} {seed}")
        texts = (filled(template, {**fact.columns, SUBJECT: subject})[0] for subject in subjects)
        paired.append(replace(question, corrupt=counterpart(model, question.text, question.answer, texts)))
    unpaired = [question.name for question in paired if question.corrupt is None]
    if unpaired and required:
        raise ValueError(
            f"expected for each fact to forget another subject of as many tokens with another answer, got none for "
            f"{unpaired[:5]}: add such rows, or pass corrupt=False (methods that patch will not run)."
        )
    return list(questions) if unpaired else paired


def _own_answers(fact: Fact) -> list[str]:
    return [fact.answer] if fact.injected is None else [fact.answer, fact.injected]
