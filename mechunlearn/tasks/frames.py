"""A researcher's own facts: one row each of a table, in templates."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from jaxtyping import Int
from torch import Tensor

from mechunlearn.model import Model, check_model
from mechunlearn.model.tokens import prepending_bos
from mechunlearn.tasks.fact_questions import Fact, FactQuestions, with_counterparts
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.questions import (
    SUBJECT,
    Question,
    Wording,
    check_template,
    filled,
    format_of,
    letters_of,
    with_subject,
)
from mechunlearn.tasks.splits import Sides
from mechunlearn.tasks.task import Task
from mechunlearn.tasks.text import train_and_test_text

if TYPE_CHECKING:
    from pandas import DataFrame, Series


def from_frame(
    model: Model,
    frame: "DataFrame",
    *,
    prompt: str | Sequence[str],
    forget: "str | int | Iterable[str] | Iterable[bool] | Series",
    subject: str = "subject",
    answer: str = "answer",
    formats: Mapping[str, str | Sequence[str] | Wording] | None = None,
    injected: str | None = None,
    candidates: int | str | Sequence[str] | None = 4,
    aliases: str | None = None,
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
    """A task of your facts, one a row: `from_frame(model, frame, prompt="{subject} lives in", forget=[...])`.

    - `prompt`: the trained template, up to the answer, or several. `{column}` is any column.
    - `formats`: title -> another template, or several; with {A}, {B}, ... multiple choice by letter. A `Wording` asks
      about other columns.
    - `between`: what stands between a prompt and its answer ("" behind a chat template), or title -> that. The title of
      `prompt` is "trained prompt".
    - `forget`: a column of booleans, a boolean a row, subjects, or a number of rows.
    - `train`: the share of retained subjects that is trained on. Those to forget are trained on and tested, or split
      likewise with `split_forget`.
    - `injected`: a column, or one answer for all, which `task.injection` puts in place of the true one.
    - `candidates`: how many answers are possible (true, injected, random ones of other rows), all of them, or a column
      with a list a row. None: any words.
    - `aliases`: a column with other right answers (a list, a string or nothing).
    - `corrupt`: pair each prompt with a subject of as many tokens with another answer, which facts to forget must have.
    - `text`: strings, or rows by `pack`; default: everyday sentences. `knowledge`: what else to test.
    - `prepend_bos`: as for `build`.

    Whole answers are scored where one has several tokens or aliases, where they begin alike, and without candidates.
    ValueError for an empty cell or an injected answer that is right.
    """
    check_model(model)
    given = {"trained prompt": prompt, **(formats or {})}
    wordings = {title: how if isinstance(how, Wording) else Wording(how) for title, how in given.items()}
    spaces = _spaces(between, list(wordings))
    templates = _checked_templates(frame, wordings, subject, spaces)
    columns: _Columns = {"subject": subject, "answer": answer, "injected": injected, "aliases": aliases}
    facts = _facts_of(frame, **columns, candidates=candidates)
    _check_answers(facts, templates["trained prompt"])
    others = _facts_otherwise(frame, wordings, templates, columns, candidates)
    to_forget = _forgotten(frame, facts, forget)
    _check_injected([facts[row] for row in to_forget])
    rows, subjects = _by_subject(facts, to_forget)
    train_forget = train if split_forget else None
    sides = Sides.of(*subjects, train=train, train_forget=train_forget, rng=random.Random(index(seed)))
    with prepending_bos(model, prepend_bos):
        shared = {title: several for title, several in templates.items() if title not in others}
        questions = dict.fromkeys(shared, FactQuestions(model, facts, candidates, spaces, seed).deciding(shared))
        for title, (own, choices) in others.items():
            questions[title] = FactQuestions(model, own, choices, spaces, seed).deciding({title: templates[title]})
        table = _Table(facts, rows, templates, questions)
        trained = [
            table.paired(model, names, required, seed) if corrupt else table.asked("trained prompt", names)
            for names, required in ((sides.forget_train, True), (sides.retain_train, False))
        ]
        tested = {
            title: [table.asked(title, names) for names in (sides.forget_test, sides.retain_test)] for title in wordings
        }
        train_format = format_of(model, *trained)
        text_train, text_test = train_and_test_text(model, text, seed=seed)
        return Task(
            name=f"{name}: forget {len(to_forget)} of {len(facts)}",
            forget=train_format.forget,
            retain=train_format.retain,
            formats={title: format_of(model, *asked, kept=wordings[title].kept) for title, asked in tested.items()},
            text=text_train,
            text_test=text_test,
            injection=train_format.injected,
            knowledge=knowledge,
            splits=sides.names(str),
        )


class _Columns(TypedDict):
    """The columns that a frame's facts are read from; `injected` may be the answer itself."""

    subject: str
    answer: str
    injected: str | None
    aliases: str | None


@dataclass(frozen=True)
class _Table:
    """The facts of a frame, and how each format asks about them."""

    facts: Sequence[Fact]
    rows: Mapping[str, Sequence[int]]
    """Of each subject."""
    templates: Mapping[str, Sequence[str]]
    """Of each format."""
    questions: Mapping[str, FactQuestions]

    def asked(self, title: str, subjects: Sequence[str]) -> list[Question]:
        """Every fact of the subjects in every template of the format, named by its subject."""
        put = self.questions[title]
        return [
            replace(put.question(template, put.facts[row], title=title), name=self.facts[row].subject)
            for template, row in self._pairs(title, subjects)
        ]

    def paired(self, model: Model, subjects: Sequence[str], required: bool, seed: int) -> list[Question]:
        """The trained prompts with counterparts."""
        title = "trained prompt"
        sources = [(template, self.facts[row]) for template, row in self._pairs(title, subjects)]
        return with_counterparts(model, self.facts, self.asked(title, subjects), sources, required, seed)

    def _pairs(self, title: str, subjects: Sequence[str]) -> list[tuple[str, int]]:
        return [(template, row) for name in subjects for row in self.rows[name] for template in self.templates[title]]


def _checked_templates(
    frame: "DataFrame", wordings: Mapping[str, Wording], subject: str, spaces: Mapping[str, str]
) -> dict[str, list[str]]:
    """The templates of each format, with the subject's column in its place; ValueError for one that cannot be asked."""
    templates = {
        title: [with_subject(template, wording.subject or subject) for template in wording.templates]
        for title, wording in wordings.items()
    }
    for title, several in templates.items():
        for template in several:
            check_template(template, [str(column) for column in frame.columns], between=spaces[title])
        if not several or len({letters_of(template) for template in several}) > 1:
            raise ValueError(f"expected templates of {title!r} with the same letters for options, got {several}.")
    trained = templates["trained prompt"]
    if letters_of(trained[0]):
        raise ValueError(f"expected a trained prompt without options, got {trained}: put multiple choice in formats.")
    return templates


def _by_subject(facts: Sequence[Fact], to_forget: Sequence[int]) -> tuple[dict[str, list[int]], list[list[str]]]:
    """Subject -> its rows, those to forget first; and the subjects of either side."""
    chosen = set(to_forget)
    kept = [row for row in range(len(facts)) if row not in chosen]
    rows: dict[str, list[int]] = {}
    for row in (*to_forget, *kept):
        rows.setdefault(facts[row].subject, []).append(row)
    subjects = [list(dict.fromkeys(facts[row].subject for row in side)) for side in (to_forget, kept)]
    both = sorted({*subjects[0]} & {*subjects[1]})
    if both:
        raise ValueError(
            f"expected all rows of a subject on one side, got {both[:5]} on both: forget subjects, or put what is kept "
            f"of them into a task of its own."
        )
    return rows, subjects


def _spaces(between: str | Mapping[str, str], titles: Sequence[str]) -> dict[str, str]:
    """For each format what stands before its answers."""
    if isinstance(between, str):
        return dict.fromkeys(titles, between)
    unknown = sorted(set(between) - set(titles))
    if unknown:
        raise ValueError(f"expected between=... of formats ({', '.join(titles)}), got {unknown[0]!r}: check its title.")
    return {title: between.get(title, " ") for title in titles}


def _facts_of(
    frame: "DataFrame",
    *,
    subject: str,
    answer: str,
    injected: str | None,
    aliases: str | None,
    candidates: int | str | Sequence[str] | None,
) -> list[Fact]:
    """A fact for each row; `injected` is a column, or the answer itself. ValueError if one is missing."""
    own = [column for column in (aliases, candidates) if isinstance(column, str)]
    missing = [column for column in (subject, answer, *own) if column not in frame.columns]
    if missing:
        raise ValueError(
            f"expected columns {' and '.join([subject, answer, *own])}, got {list(frame.columns)}: pass subject=..., "
            f"answer=..., the names of your columns."
        )
    subjects, answers = _cells(frame, subject), _cells(frame, answer)
    injected_answers: list[str | None] = [None if injected is None else injected.strip()] * len(frame)
    if injected is not None and injected in frame.columns:
        injected_answers = [None if cell is None else str(cell).strip() for cell in _or_none(frame, injected)]
    also = _lists(frame, aliases) if aliases is not None else [()] * len(frame)
    choices = _lists(frame, candidates) if isinstance(candidates, str) else [None] * len(frame)
    columns = [dict(zip(map(str, frame.columns), map(str, row), strict=True)) for row in frame.itertuples(index=False)]
    rows = zip(subjects, answers, injected_answers, also, choices, columns, strict=True)
    facts = [Fact(*row) for row in rows]
    same = [fact.subject for fact in facts if fact.injected in (fact.answer, *fact.aliases)]
    if same:
        raise ValueError(
            f"expected injected answers other than the true ones, got the same for {same[:5]}: change them, or leave "
            f"these rows out."
        )
    return facts


def _facts_otherwise(
    frame: "DataFrame",
    wordings: Mapping[str, Wording],
    templates: Mapping[str, Sequence[str]],
    columns: _Columns,
    candidates: int | str | Sequence[str] | None,
) -> dict[str, tuple[list[Fact], int | str | Sequence[str] | None]]:
    """For formats with columns of their own: the facts that they ask about, and what may be answered."""
    others = {}
    for title, wording in wordings.items():
        if wording.subject is None and wording.answer is None:
            continue
        own, choices = columns.copy(), candidates
        own["subject"] = wording.subject or columns["subject"]
        if wording.answer not in (None, columns["answer"]):  # what was given belongs to the other answer
            own["answer"], own["injected"], own["aliases"] = wording.answer, None, None
            choices = candidates if candidates is None or isinstance(candidates, int | np.integer) else 4
        facts = _facts_of(frame, **own, candidates=choices)
        _check_answers(facts, templates[title])
        others[title] = facts, choices
    return others


def _lists(frame: "DataFrame", column: str) -> list[tuple[str, ...]]:
    """The cells of a column as several texts each: a list, an array, one text, or nothing."""
    cells = []
    for cell in _or_none(frame, column):
        several = list(cell) if isinstance(cell, Iterable) and not isinstance(cell, str) else [cell]
        texts = [str(text).strip() for text in several if text is not None]
        cells.append(tuple(dict.fromkeys(text for text in texts if text)))
    return cells


def _check_answers(facts: Sequence[Fact], templates: Sequence[str]) -> None:
    """ValueError for one prompt with two answers."""
    answers: dict[str, str] = {}
    for fact in facts:
        for template in templates:
            text, _ = filled(template, {**fact.columns, SUBJECT: fact.subject})
            if answers.setdefault(text, fact.answer) != fact.answer:
                raise ValueError(
                    f"expected one answer to {text[-60:]!r}, got {answers[text]!r} and {fact.answer!r}: put others "
                    f"that are right into a column (aliases=...), or tell rows apart by a column in the prompt."
                )


def _forgotten(
    frame: "DataFrame", facts: Sequence[Fact], forget: "str | int | Iterable[str] | Iterable[bool] | Series"
) -> list[int]:
    """The rows to forget, in their order, or in that of a list of subjects."""
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
        return list(range(forget))
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


def _named(facts: Sequence[Fact], subjects: Sequence[str]) -> list[int]:
    rows: dict[str, list[int]] = {}
    for row, fact in enumerate(facts):
        rows.setdefault(fact.subject, []).append(row)
    unknown = [name for name in subjects if name not in rows]
    if unknown or not subjects:
        raise ValueError(f"expected subjects of the frame, got {unknown[:5] or 'none'}: check the spelling.")
    return [row for name in dict.fromkeys(subjects) for row in rows[name]]


def _marked(facts: Sequence[Fact], marks: Sequence[object]) -> list[int]:
    wrong = [mark for mark in marks if mark not in (True, False)]
    if wrong or len(marks) != len(facts):
        raise ValueError(
            f"expected True or False for each of the {len(facts)} rows, got {len(marks)} values"
            + (f", among them {wrong[0]!r}" if wrong else "")
            + ": compare the column with what is to be forgotten."
        )
    return [row for row, mark in enumerate(marks) if mark]


def _cells(frame: "DataFrame", column: str) -> list[str]:
    """The cells of a column as text without spaces around it; ValueError for an empty one."""
    cells = ["" if cell is None else str(cell).strip() for cell in _or_none(frame, column)]
    empty = [row for row, cell in enumerate(cells) if not cell]
    if empty:
        raise ValueError(f"expected something in every cell of {column}, got nothing in rows {empty[:5]}: drop them.")
    return cells


def _or_none(frame: "DataFrame", column: str) -> list[object]:
    return [cell if there else None for cell, there in zip(frame[column], frame[column].notna(), strict=True)]
