"""Answered questions to put before a question, about facts that are not tested."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from mechunlearn.evaluate.halves import check_apart, formatted
from mechunlearn.model import Model, device_of
from mechunlearn.tasks.build import answer_texts, build
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task


@dataclass(frozen=True)
class Demonstration:
    """An answered question."""

    lines: str
    """The question, from the line with its subject on."""
    answer: str

    def __str__(self) -> str:
        return f"{self.lines}{self.answer}" + ("\n\n" if "\n\n" in self.lines else "\n")


def demonstrations_for(
    model: Model, task: Task, trained: Prompts, tested: Prompts, *, format: str | None, balanced: bool
) -> list[Demonstration]:
    """The attack's half in the words of the format; facts to retain too, if all of it has one answer."""
    first = format is None or format == next(iter(task.formats))
    same = [row for row, name in enumerate(formatted(task, format).names) if name in set(trained.names)]
    if same:
        found = demonstrations_of(model, formatted(task, format)[same], tested)
    elif first:
        found = demonstrations_of(model, trained, tested)
    else:
        found = _reworded(model, trained, tested)
    if balanced and len({shown.answer for shown in found}) == 1:
        found += demonstrations_of(model, task.retain if first else task.formats[str(format)].retain, tested)
    return found


def demonstrations_of(model: Model, prompts: Prompts, tested: Prompts) -> list[Demonstration]:
    """The prompts in their own words. ValueError if one is about a fact that is tested."""
    check_apart(prompts, tested)
    answers = zip(_answers(model, prompts), prompts.texts, prompts.names, strict=True)
    return [Demonstration(text[_line(text, name) :], answer) for answer, text, name in answers]


def drawn(found: Sequence[Demonstration], balanced: bool, rng: Random) -> list[Demonstration]:
    """All of them in random order; balanced, with answers taking turns."""
    shuffled = rng.sample(found, len(found))
    if not balanced:
        return shuffled
    turns: dict[str, int] = {}
    places = []
    for shown in shuffled:
        turns[shown.answer] = turns.get(shown.answer, -1) + 1
        places.append(turns[shown.answer])
    order = list(turns)
    ranked = zip(places, (order.index(shown.answer) for shown in shuffled), shuffled, strict=True)
    return [shown for _, _, shown in sorted(ranked, key=lambda each: each[:2])]


def shown_before(model: Model, prompts: Prompts, shown: Sequence[Sequence[Demonstration]]) -> Prompts:
    """The prompts with demonstrations above the line with their subject."""
    answers, texts, ranges = _answers(model, prompts), [], []
    for text, name, demonstrations in zip(prompts.texts, prompts.names, shown, strict=True):
        start = _line(text, name)
        texts.append(text[:start] + "".join(map(str, demonstrations)) + text[start:])
        begin = len(texts[-1]) - len(text) + text.rfind(name)
        ranges.append((begin, begin + len(name)))
    made = build(model, texts, answers, subjects=ranges)
    if not made.answers.equal(prompts.answers.to(made.answers)):
        raise ValueError("expected answers of the same tokens behind demonstrations, got others: use another format.")
    candidates = None if prompts.candidates is None else prompts.candidates.to(device_of(model))
    return replace(made, candidates=candidates)


def _reworded(model: Model, trained: Prompts, tested: Prompts) -> list[Demonstration]:
    """In the words that all tested prompts share, if these have the same answers."""
    _check_texts(tested)
    words = {text.replace(name, "\0") for text, name in zip(tested.texts, tested.names, strict=True)}
    if len(words) > 1 or _choices(trained) != _choices(tested):
        raise ValueError(
            f"expected a format in which prompts differ by their subject alone and have the answers of the trained "
            f"prompt, got {tested.texts[0][-60:]!r} and others: pass demonstrations=..., prompts in that format about "
            f"facts that are not tested."
        )
    names = zip(trained.names, _answers(model, trained), strict=True)
    lines = tested.texts[0][_line(tested.texts[0], tested.names[0]) :]
    return [Demonstration(lines.replace(tested.names[0], name), answer) for name, answer in names]


def _choices(prompts: Prompts) -> set[frozenset[int]] | None:
    return None if prompts.candidates is None else {frozenset(row) for row in prompts.candidates.tolist()}


def _line(text: str, name: str) -> int:
    """Where the line with the subject starts."""
    return text.rfind("\n", 0, text.rfind(name)) + 1


def _answers(model: Model, prompts: Prompts) -> list[str]:
    """The answers as text."""
    _check_texts(prompts)
    return answer_texts(model, prompts)


def _check_texts(prompts: Prompts) -> None:
    if not prompts.texts:
        raise ValueError("expected prompts with their texts, got none: build them with tasks.build.")
