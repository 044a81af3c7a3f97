"""A researcher's own facts: one row each of a table, in templates."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
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
    Question,
    Wording,
    check_template,
    filled,
    format_of,
    in_random_order,
    lettered,
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
    wordings = {
        title: given if isinstance(given, Wording) else Wording(given)
        for title, given in {"trained prompt": prompt, **(formats or {})}.items()
    }
    templates = {
        title: [with_subject(template, wording.subject or subject) for template in wording.templates]
        for title, wording in wordings.items()
    }
    spaces = _spaces(between, list(templates))
    for title, several in templates.items():
        for template in several:
            check_template(template, [str(column) for column in frame.columns], between=spaces[title])
        if not several or len({letters_of(template) for template in several}) > 1:
            raise ValueError(f"expected templates of {title!r} with the same letters for options, got {several}.")
    if letters_of(templates["trained prompt"][0]):
        raise ValueError(f"expected a trained prompt without options, got {prompt!r}: put multiple choice in formats.")
    facts = _facts_of(frame, subject=subject, answer=answer, injected=injected, aliases=aliases, candidates=candidates)
    _check_answers(facts, templates["trained prompt"])
    own = {
        title: _facts_otherwise(frame, wording, subject, answer, injected, aliases, candidates)
        for title, wording in wordings.items()
        if wording.subject is not None or wording.answer is not None
    }
    for title, (otherwise, _) in own.items():
        _check_answers(otherwise, templates[title])
    rows_to_forget = _forgotten(frame, facts, forget)
    forgotten = [facts[row] for row in rows_to_forget]
    chosen = set(rows_to_forget)
    retained = [fact for row, fact in enumerate(facts) if row not in chosen]
    _check_injected(forgotten)
    rows: dict[str, list[int]] = {}
    for row in (*rows_to_forget, *(row for row in range(len(facts)) if row not in chosen)):
        rows.setdefault(facts[row].subject, []).append(row)
    subjects = [list(dict.fromkeys(fact.subject for fact in side)) for side in (forgotten, retained)]
    both = sorted({*subjects[0]} & {*subjects[1]})
    if both:
        raise ValueError(
            f"expected all rows of a subject on one side, got {both[:5]} on both: forget subjects, or put what is kept "
            f"of them into a task of its own."
        )
    train_forget = train if split_forget else None
    rng = random.Random(index(seed))
    sides = Sides.of(*subjects, train=train, train_forget=train_forget, rng=rng)
    with prepending_bos(model, prepend_bos):
        shared = {title: several for title, several in templates.items() if title not in own}
        questions = dict.fromkeys(shared, _Questions(model, facts, candidates, spaces, seed).deciding(shared))
        for title, (otherwise, choices) in own.items():
            alone = {title: templates[title]}
            questions[title] = _Questions(model, otherwise, choices, spaces, seed).deciding(alone)

        def asked(title: str, subjects: Sequence[str], *, required: bool | None = None) -> list[Question]:
            pairs = [(template, row) for name in subjects for row in rows[name] for template in templates[title]]
            put = questions[title]
            made = [
                replace(put.question(template, put.facts[row], title=title), name=facts[row].subject)
                for template, row in pairs
            ]
            sources = [(template, facts[row]) for template, row in pairs]
            return made if required is None else _with_counterparts(model, facts, made, sources, required, seed)

        needed = (True, False) if corrupt else (None, None)
        trained = [
            asked("trained prompt", names, required=required)
            for names, required in zip((sides.forget_train, sides.retain_train), needed, strict=True)
        ]
        train_format = format_of(model, *trained)
        text_train, text_test = train_and_test_text(model, text, seed=seed)
        return Task(
            name=f"{name}: forget {len(forgotten)} of {len(facts)}",
            forget=train_format.forget,
            retain=train_format.retain,
            formats={
                title: format_of(
                    model, asked(title, sides.forget_test), asked(title, sides.retain_test), kept=wording.kept
                )
                for title, wording in wordings.items()
            },
            text=text_train,
            text_test=text_test,
            injection=train_format.injected,
            knowledge=knowledge,
            splits=sides.names(str),
        )


def _spaces(between: str | Mapping[str, str], titles: Sequence[str]) -> dict[str, str]:
    """For each format what stands before its answers."""
    if isinstance(between, str):
        return dict.fromkeys(titles, between)
    unknown = sorted(set(between) - set(titles))
    if unknown:
        raise ValueError(f"expected between=... of formats ({', '.join(titles)}), got {unknown[0]!r}: check its title.")
    return {title: between.get(title, " ") for title in titles}


@dataclass(frozen=True)
class Fact:
    """A row of the frame."""

    subject: str
    answer: str
    """The answer, without the space before it."""
    injected: str | None = None
    aliases: tuple[str, ...] = ()
    """Other right answers."""
    candidates: tuple[str, ...] | None = None
    """Possible answers, where they are the row's own."""
    columns: dict[str, str] = field(default_factory=dict, compare=False)
    """All cells of the row, for templates."""

    @property
    def own(self) -> list[str]:
        """The answer, and the one to inject."""
        return [self.answer] if self.injected is None else [self.answer, self.injected]


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
    wording: Wording,
    subject: str,
    answer: str,
    injected: str | None,
    aliases: str | None,
    candidates: int | str | Sequence[str] | None,
) -> tuple[list[Fact], int | str | Sequence[str] | None]:
    """The facts as a wording with columns of its own asks about them, and what may be answered."""
    if wording.answer not in (None, answer):  # what was given belongs to the other answer
        injected = aliases = None
        candidates = candidates if candidates is None or isinstance(candidates, int | np.integer) else 4
    columns = {"subject": wording.subject or subject, "answer": wording.answer or answer}
    return _facts_of(frame, **columns, injected=injected, aliases=aliases, candidates=candidates), candidates


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


@dataclass(frozen=True)
class _Questions:
    """The questions of a task: facts in templates, with wrong answers from other facts."""

    model: Model
    facts: Sequence[Fact]
    candidates: int | str | Sequence[str] | None
    between: Mapping[str, str]
    """For each format what stands before its answers."""
    seed: int
    whole: frozenset[str] = frozenset()
    """The formats in which whole answers are scored."""
    tokens: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    """The last character of a prompt and an answer -> the answer's tokens, as far as they were asked for."""

    @cached_property
    def every(self) -> list[str]:
        """The answers of all facts."""
        return sorted({fact.answer for fact in self.facts})

    @cached_property
    def possible(self) -> list[str]:
        """All that may be answered."""
        given = (
            () if self.candidates is None or isinstance(self.candidates, int | np.integer | str) else self.candidates
        )
        others = {text for fact in self.facts for text in (*fact.own, *fact.aliases, *(fact.candidates or ()))}
        return sorted(others | {option.strip() for option in given})

    def deciding(self, templates: Mapping[str, Sequence[str]]) -> "_Questions":
        """The same, which score whole answers in the formats where first tokens would not do."""
        in_words = [title for title, several in templates.items() if not letters_of(several[0])]
        whole = (title for title in in_words if any(self._must_be_whole(title, one) for one in templates[title]))
        return replace(self, whole=frozenset(whole))

    def _must_be_whole(self, title: str, template: str) -> bool:
        """Whether answers have several tokens, or aliases, or begin alike, or there are no candidates."""
        if self.candidates is None or any(fact.aliases for fact in self.facts):
            return True
        text, _ = filled(template, {**self.facts[0].columns, SUBJECT: self.facts[0].subject})
        tokens = {option: self._tokens(text, self.between[title] + option) for option in self.possible}
        for fact in self.facts:
            options = [*fact.own, *(self._others(fact) if self._are_given else [])]
            if max(len(tokens[own]) for own in fact.own) > 1 or len({tokens[o][:1] for o in options}) < len(options):
                return True
        return False

    @property
    def _are_given(self) -> bool:
        return not (self.candidates is None or isinstance(self.candidates, int | np.integer))

    def question(self, template: str, fact: Fact, *, title: str) -> Question:
        """The fact in the template, answered in words, or by letter if the template has letters for options."""
        asked = self._by_letter if letters_of(template) else self._in_a_sentence
        return asked(template, fact, title)

    def _in_a_sentence(self, template: str, fact: Fact, title: str) -> Question:
        before = self.between[title]
        text, place = filled(template, {**fact.columns, SUBJECT: fact.subject})
        is_whole = title in self.whole
        options = () if self.candidates is None else self._options(text, fact, before, is_whole=is_whole)
        injected = None if fact.injected is None else before + fact.injected
        also = tuple(before + alias for alias in fact.aliases)
        answer = before + fact.answer
        return Question(fact.subject, text, answer, options, injected, place, aliases=also, is_whole=is_whole)

    def _options(self, text: str, fact: Fact, before: str, *, is_whole: bool) -> tuple[str, ...]:
        """The possible answers, the fact's own first; of drawn ones those with other first tokens before the rest."""
        count = None if self._are_given else index(self.candidates)  # type: ignore[arg-type]
        own, alike = [before + option for option in fact.own], []
        firsts = {self._tokens(text, option)[:1] for option in own}
        for option in self._others(fact):
            if count is not None and len(own) >= count:
                break
            first = self._tokens(text, before + option)[:1]
            is_last_resort = first in firsts and not (is_whole and self._are_given)
            (alike if is_last_resort else own).append(before + option)
            firsts.add(first)
            if count is not None and is_whole and len(alike) >= max(count, 32):
                break  # there are enough; the search for others might go through all
        options = [*own, *alike] if is_whole else own
        if len(options) < 2:
            raise ValueError(
                f"expected another answer than {own[0]!r} (of {fact.subject!r}) that differs in its first token, got "
                f"none: add facts with other answers, or pass candidates=[...]."
            )
        return tuple(options[:count])

    def _by_letter(self, template: str, fact: Fact, title: str) -> Question:
        letters, before = letters_of(template), self.between[title]
        options = [*fact.own, *islice(self._others(fact), len(letters))][: len(letters)]
        if len(options) < len(letters):
            raise ValueError(
                f"expected {len(letters)} different answers to choose from, got {options}: take options out of the "
                f"template {title!r}, or add facts with other answers."
            )
        shown = lettered(options, letters, seed=f"{title} {fact.subject} {self.seed}")
        fields = {letter: option for option, letter in shown.items()}
        text, place = filled(template, {**fact.columns, **fields, SUBJECT: fact.subject})
        own = [before + shown[option] for option in fact.own]
        others = [before + letter for letter in letters if before + letter not in own]
        injected = None if fact.injected is None else own[1]
        return Question(fact.subject, text, own[0], (*own, *others), injected, place)

    def _others(self, fact: Fact) -> Iterator[str]:
        """Wrong answers: in the order given, or those of all facts in random order."""
        right = {*fact.own, *fact.aliases}
        if not self._are_given:
            yield from in_random_order(self.every, without=right, seed=f"options {fact.subject} {self.seed}")
            return
        given = fact.candidates if fact.candidates is not None else [str(option).strip() for option in self.candidates]  # type: ignore[union-attr]
        if fact.candidates is None and fact.answer not in given:
            raise ValueError(f"expected the answer {fact.answer!r} among the candidates, got {given}: add it.")
        yield from (option for option in dict.fromkeys(given) if option not in right)

    def _tokens(self, text: str, answer: str) -> tuple[int, ...]:
        """The tokens of an answer after a prompt."""
        # By the prompt's last character, since no earlier one matters; all answers at once, since each may come.
        key = (text[-1:], answer)
        if key not in self.tokens:
            answers = list(
                dict.fromkeys(
                    [answer, *(space + option for space in {*self.between.values()} for option in self.possible)]
                )
            )
            begun, *whole = encode_all(self.model, [text, *(text + each for each in answers)])
            for each, encoding in zip(answers, whole, strict=True):
                self.tokens[text[-1:], each] = encoding.tokens[len(begun.tokens) :]
        return self.tokens[key]


def _with_counterparts(
    model: Model,
    facts: Sequence[Fact],
    questions: Sequence[Question],
    sources: Sequence[tuple[str, Fact]],
    required: bool,
    seed: int,
) -> list[Question]:
    """The questions with a corrupted text about another subject; without any if one has none and it may lack it.

    `sources` has the template and the fact of each question.
    """
    answers: dict[str, set[str]] = {}
    for fact in facts:
        answers.setdefault(fact.subject, set()).update((fact.answer, *fact.aliases))
    subjects = sorted(answers)
    by_length: dict[int, list[str]] = {}
    for name, encoding in zip(subjects, encode_all(model, [f" {name}" for name in subjects]), strict=True):
        by_length.setdefault(len(encoding.tokens), []).append(name)
    lengths = {name: length for length, names in by_length.items() for name in names}
    wholes = encode_all(model, [question.text + question.answer for question in questions])
    waiting = {
        place: in_random_order(by_length[lengths[q.name]], without={q.name}, seed=f"corrupt {q.name} {seed}")
        for place, q in enumerate(questions)
    }
    paired = list(questions)
    while waiting:  # each round tries one more subject for every question that has none
        tried = {}
        for place, others in list(waiting.items()):
            template, fact = sources[place]
            other = next((name for name in others if fact.answer not in answers[name]), None)
            if other is None:
                del waiting[place]
            else:
                tried[place], _ = filled(template, {**fact.columns, SUBJECT: other})
        answered = [text + questions[place].answer for place, text in tried.items()]
        for (place, text), encoding in zip(tried.items(), encode_all(model, answered), strict=True):
            if len(encoding.tokens) == len(wholes[place].tokens):
                paired[place] = replace(questions[place], corrupt=text)
                del waiting[place]
    unpaired = [question.name for question in paired if question.corrupt is None]
    if unpaired and required:
        raise ValueError(
            f"expected for each fact to forget another subject of as many tokens with another answer, got none for "
            f"{unpaired[:5]}: add such rows, or pass corrupt=False (methods that patch will not run)."
        )
    return list(questions) if unpaired else paired
