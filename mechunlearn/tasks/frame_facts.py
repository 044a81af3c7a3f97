"""The rows of a table as facts, checked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame, Series


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
    if isinstance(forget, int):
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
