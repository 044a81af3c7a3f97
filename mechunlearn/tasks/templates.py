"""Templates of prompts: the subject's characters are known from filling them in, never searched for."""

from collections.abc import Collection, Mapping
from string import Formatter, ascii_uppercase

SUBJECT = "subject"


def filled(template: str, values: Mapping[str, str]) -> tuple[str, tuple[int, int]]:
    """The template with its fields filled in, and the characters that its last `{subject}` became.

    A subject that is written elsewhere in the prompt too, such as "Ann" in "Anna", cannot be taken for it.
    """
    text, place = "", (0, 0)
    for literal, field, _, _ in Formatter().parse(template):
        text += literal
        if field is not None:
            if field == SUBJECT:
                place = (len(text), len(text) + len(values[field]))
            text += values[field]
    return text, place


def letters_of(template: str) -> tuple[str, ...]:
    """`("A", "B", "C")` of a multiple-choice template with {A}, {B} and {C}; nothing of another template."""
    return tuple(sorted({field for field in _fields(template) if len(field) == 1 and field in ascii_uppercase}))


def check_template(template: str, columns: Collection[str], *, between: str) -> None:
    """ValueError for a template without a subject, with fields that no column fills, or that runs into its answer."""
    found = _fields(template)
    if SUBJECT not in found:
        raise ValueError(f"expected {{subject}} in the template, got {template!r}: write it where the subject stands.")
    letters = letters_of(template)
    missing = sorted(found - {SUBJECT, *letters, *columns})
    if missing:
        raise ValueError(
            f"expected fields that are columns of the frame ({', '.join(columns)}), got {missing} in {template!r}: "
            f"rename them, or double the braces that are meant as text."
        )
    if letters and letters != tuple(ascii_uppercase[: max(2, len(letters))]):
        raise ValueError(
            f"expected options from {{A}} on, at least two, got {letters} in {template!r}: letter them so."
        )
    if template[-1:].isspace() and between[:1].isspace():
        raise ValueError(
            f"expected a template that ends before the space of its answer, got {template!r}: take the space off its "
            f"end, or pass between=''."
        )


def with_subject(template: str, column: str) -> str:
    """`{column}` written as `{subject}`, if that is the column of the subjects."""
    text = ""
    for literal, field, _, _ in Formatter().parse(template):
        text += literal.replace("{", "{{").replace("}", "}}")
        if field is not None:
            text += "{" + (SUBJECT if field == column else field) + "}"
    return text


def _fields(template: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(template) if field is not None}
