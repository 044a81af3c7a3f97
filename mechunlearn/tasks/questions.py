"""Questions about facts in templates, and the prompts that they become."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter, ascii_uppercase

from mechunlearn.model import Model
from mechunlearn.model.tokens import encode
from mechunlearn.tasks.building import build
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Format

SUBJECT = "subject"
"""The field of a template where the subject stands."""


@dataclass(frozen=True)
class Question:
    """A prompt about a fact and its possible answers, each with the space before it."""

    name: str
    """The subject of the fact."""
    text: str
    answer: str
    options: tuple[str, ...]
    """Possible answers, with the right and the injected one; empty if they do not differ in their first token."""
    injected: str | None = None
    subject: tuple[int, int] | None = None
    """Where the subject stands, in characters; None if the text names another subject than the fact's."""
    corrupt: str | None = None
    """A text of as many tokens about another subject."""
    aliases: tuple[str, ...] = ()
    """Other right answers."""
    is_whole: bool = False
    """Whether whole answers are scored, which may begin alike; then `options` may be empty."""


@dataclass(frozen=True)
class Wording:
    """A way to ask about other columns than the trained prompt does, for the formats of `from_frame`.

    The reverse direction is `Wording("{capital} is the capital of", subject="capital", answer="country")`.
    """

    template: str | Sequence[str]
    """A template, or several. `{subject}` is the subject, `{column}` any column."""
    subject: str | None = None
    """The column that the question is about; None: the subjects of the facts."""
    answer: str | None = None
    """The column with its answers, each in words and whole; None: the answers of the facts."""
    kept: bool = False
    """Whether both sides should be kept: another attribute of the same subjects, which forgetting should not touch."""

    @property
    def templates(self) -> list[str]:
        return [self.template] if isinstance(self.template, str) else [*self.template]


def format_of(model: Model, forget: Sequence[Question], retain: Sequence[Question], *, kept: bool = False) -> Format:
    """Both sides with equally many candidates, and `forget` with the injected answers, if every question has one."""
    count = min(len(question.options) for question in (*forget, *retain))
    forget, retain = ([replace(q, options=q.options[:count]) for q in side] for side in (forget, retain))
    injected = None if kept else injected_prompts(model, forget)
    return Format(prompts_of(model, forget), prompts_of(model, retain), injected, kept)


def injected_prompts(model: Model, questions: Sequence[Question]) -> Prompts | None:
    """The questions with the injected answers as the right ones; `None` if any lacks one."""
    injected = [replace(q, answer=q.injected, corrupt=None, aliases=()) for q in questions if q.injected is not None]
    return prompts_of(model, injected) if len(injected) == len(questions) else None


def prompts_of(model: Model, questions: Sequence[Question]) -> Prompts:
    """The questions as prompts, with candidates, subjects and corrupted counterparts if every question has them."""
    count = min(len(question.options) for question in questions)
    whole = any(question.is_whole for question in questions)
    options = [question.options[:count] for question in questions]
    ranges = [question.subject for question in questions if question.subject is not None]
    corrupt = [question.corrupt for question in questions if question.corrupt is not None]
    prompts = build(
        model,
        [question.text for question in questions],
        [question.answer for question in questions],
        candidates=options if count and not whole else None,
        options=options if whole else None,
        aliases=[question.aliases for question in questions] if whole else None,
        subjects=ranges if len(ranges) == len(questions) else None,
        corrupt=corrupt if len(corrupt) == len(questions) else None,
    )
    return replace(prompts, names=tuple(question.name for question in questions))


FirstToken = Callable[[str, str], int]
"""(prompt, answer) -> the first token of the answer."""


def first_tokens(model: Model) -> FirstToken:
    """A function that gives the first token of an answer after a prompt, and remembers what it gave."""
    # By the prompt's last character, since no earlier one matters to the first token of an answer.
    known: dict[tuple[str, str], int] = {}

    def first(text: str, answer: str) -> int:
        key = (text[-1:], answer)
        if key not in known:
            known[key] = encode(model, text + answer).tokens[len(encode(model, text).tokens)]
        return known[key]

    return first


def distinct(
    first: FirstToken, text: str, own: Sequence[str], others: Iterable[str], *, count: int, name: str
) -> tuple[str, ...]:
    """A fact's own answers and then others, up to `count`, all of which differ in their first token after `text`."""
    by_token: dict[int, str] = {}
    for place, option in enumerate(own):
        other = by_token.setdefault(first(text, option), option)
        if len(by_token) == place:
            raise ValueError(
                f"expected answers of {name!r} that differ in their first token, got {other!r} and {option!r}: choose "
                f"another one to inject, or leave this fact out."
            )
    for option in others:
        if len(by_token) >= count:
            break
        by_token.setdefault(first(text, option), option)
    if len(by_token) < 2:
        raise ValueError(
            f"expected another answer than {own[0]!r} (of {name!r}) that differs in its first token, got none: add "
            f"facts with other answers, or pass candidates=[...]."
        )
    return tuple(by_token.values())


def drawn(answers: Collection[str], *, without: Collection[str], seed: str) -> list[str]:
    """The answers in an order of this seed, apart from some."""
    order = sorted(set(answers) - set(without))
    random.Random(seed).shuffle(order)
    return order


def in_random_order(texts: Sequence[str], *, without: Collection[str], seed: str) -> Iterator[str]:
    """The texts in an order of this seed, apart from some; only as many are drawn as are asked for."""
    rng, moved = random.Random(seed), dict[int, int]()
    for end in reversed(range(len(texts))):  # a shuffle that remembers only what it moved
        place = rng.randrange(end + 1)
        chosen = texts[moved.get(place, place)]
        moved[place] = moved.get(end, end)
        if chosen not in without:
            yield chosen


def lettered(options: Sequence[str], letters: Sequence[str], *, seed: str) -> dict[str, str]:
    """Option -> its letter, in an order of this seed."""
    order = list(options)
    random.Random(seed).shuffle(order)
    return dict(zip(order, letters, strict=True))


def counterpart(model: Model, text: str, answer: str, others: Iterable[str]) -> str | None:
    """The first of the other texts that has as many tokens before this answer; `None` if none has."""
    length = len(encode(model, text + answer).tokens)
    return next((other for other in others if len(encode(model, other + answer).tokens) == length), None)


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
    fields = _fields(template)
    if SUBJECT not in fields:
        raise ValueError(f"expected {{subject}} in the template, got {template!r}: write it where the subject stands.")
    letters = letters_of(template)
    missing = sorted(fields - {SUBJECT, *letters, *columns})
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
