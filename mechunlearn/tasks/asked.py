"""Every way in which the sports facts are asked: sentences, multiple choice, and other facts of the same athletes."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mechunlearn.model import Model
from mechunlearn.model.tokens import encode
from mechunlearn.tasks import formats
from mechunlearn.tasks.build import build
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Format

SPORTS = ("football", "baseball", "basketball")
CANDIDATES = (*SPORTS, "golf")

Athlete = tuple[str, str]
"""Name and sport."""

EXAMPLE: Athlete = ("Tiger Woods", "golf")


@dataclass(frozen=True)
class Question:
    """A prompt with its answers, without the space that they start with."""

    subject: str
    text: str
    answer: str
    options: tuple[str, ...]
    injected: str = ""


Ask = Callable[[Athlete], Question]


def sport_formats(
    model: Model,
    forget: Sequence[Athlete],
    retain: Sequence[Athlete],
    *,
    injected: str,
    examples: Sequence[Athlete],
    rng: random.Random,
    seed: int,
) -> dict[str, Format]:
    """The sport of these athletes in every format; `examples` are the athletes whose answers a prompt may show.

    The first formats draw from `rng`, later ones from generators of their own: another format changes no other.
    """
    templates = {"trained prompt": formats.FACT, **formats.PARAPHRASES}
    asks: dict[str, Ask] = {
        name.replace("_", " "): partial(_in_a_sentence, template=template, injected=injected)
        for name, template in templates.items()
    }
    options = {"injected": injected, "examples": examples}
    for name, (put, shots, system) in _choices().items():
        first = put is _by_letter and shots == 1
        own = rng if first else random.Random(f"{name} {seed}")
        asks[name] = partial(_by_choice, put=put, shots=shots, system=system, rng=own, **options)
    asks["capitalised"] = partial(_capitalised, injected=injected)
    return {name: _format(model, ask, forget, retain) for name, ask in asks.items()}


def neighbourhood(
    model: Model,
    forget: Sequence[Athlete],
    retain: Sequence[Athlete],
    *,
    attributes: Mapping[str, Mapping[str, str]],
    people: Sequence[Athlete],
    seed: int,
) -> dict[str, Format]:
    """Other facts of the same athletes, which forgetting their sport should not touch: a format for each attribute.

    `attributes`: attribute -> athlete -> value. The options are values of athletes of the same sport, so that who knows
    the sport alone is at chance. Left out is an attribute that a tested athlete lacks, or that has no two values.
    """
    found = {}
    for attribute, values in attributes.items():
        question = formats.ATTRIBUTES[attribute]["question"]
        if all(name in values for name, _ in (*forget, *retain)):
            rng = random.Random(f"{attribute} {seed}")
            groups = _groups(model, question, people, values)
            count = min(4, *(len(groups[sport]) for _, sport in (*forget, *retain)))
            ask = partial(_of_the_sport, question=question, values=values, groups=groups, count=count, rng=rng)
            if count > 1:
                found[f"neighbourhood, {attribute}"] = _format(model, ask, forget, retain, kept=True)
    return found


def _format(
    model: Model, ask: Ask, forget: Sequence[Athlete], retain: Sequence[Athlete], *, kept: bool = False
) -> Format:
    gone, stays = [ask(person) for person in forget], [ask(person) for person in retain]
    instead = None if kept else _built(model, [replace(question, answer=question.injected) for question in gone])
    return Format(_built(model, gone), _built(model, stays), instead, kept)


def _built(model: Model, questions: Sequence[Question]) -> Prompts:
    return build(
        model,
        [question.text for question in questions],
        [f" {question.answer}" for question in questions],
        candidates=[[f" {option}" for option in question.options] for question in questions],
        subjects=[question.subject for question in questions],
    )


def _in_a_sentence(person: Athlete, *, template: str, injected: str) -> Question:
    name, sport = person
    return Question(name, template.format(athlete=name), sport, CANDIDATES, injected)


def _capitalised(person: Athlete, *, injected: str) -> Question:
    name, sport = person
    options = tuple(each.capitalize() for each in CANDIDATES)
    text = formats.CAPITALISED.format(athlete=name)
    return Question(name, text, sport.capitalize(), options, injected.capitalize())


Put = Callable[[str, random.Random], tuple[str, dict[str, str]]]
"""A question about a person with its options in random order, and the answer that stands for each sport."""


def _choices() -> dict[str, tuple[Put, int, bool]]:
    """Name -> how it is put, the number of answered examples, whether the system prompt comes first."""
    kinds: dict[str, tuple[Put, int]] = {
        "multiple choice": (_by_letter, 1),
        "multiple choice, zero-shot": (_by_letter, 0),
        "multiple choice, two-shot": (_by_letter, 2),
        "multiple choice in words": (_by_word, 1),
        "multiple choice in words, zero-shot": (_by_word, 0),
    }
    systems = {"": False, ", system prompt": True}
    found = {name + said: (*kind, system) for name, kind in kinds.items() for said, system in systems.items()}
    del found["multiple choice, two-shot, system prompt"]  # the longest prompts of all, for nothing new
    return found


def _by_choice(
    person: Athlete,
    *,
    put: Put,
    shots: int,
    system: bool,
    rng: random.Random,
    examples: Sequence[Athlete],
    injected: str,
) -> Question:
    text = formats.SYSTEM + "\n" if system else ""
    others = rng.sample(examples, min(shots - 1, len(examples))) if shots > 1 else []
    for name, sport in [*others, EXAMPLE] if shots else []:
        asked, answers = put(name, rng)
        text += f"{asked} {answers[sport]}\n\n"
    asked, answers = put(person[0], rng)
    return Question(person[0], text + asked, answers[person[1]], tuple(sorted(answers.values())), answers[injected])


def _by_letter(name: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    options = rng.sample(formats.SPORT_OPTIONS, len(formats.LETTERS))
    text = formats.multiple_choice(formats.SPORT_QUESTION.format(athlete=name), options)
    return text, {sport.lower(): letter for sport, letter in zip(options, formats.LETTERS, strict=True)}


def _by_word(name: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    options = rng.sample(CANDIDATES, len(formats.LETTERS))
    text = formats.CHOICE_IN_WORDS.format(athlete=name, **dict(zip(formats.LETTERS, options, strict=True)))
    return text, {sport: sport for sport in CANDIDATES}


def _groups(
    model: Model, question: str, people: Sequence[Athlete], values: Mapping[str, str]
) -> dict[str, dict[int, list[str]]]:
    """Sport -> first token -> values that start with it: options have to differ in their first token."""
    before = question.format(athlete=people[0][0])
    start = len(encode(model, before).tokens)
    first = {value: encode(model, f"{before} {value}").tokens[start] for value in sorted(set(values.values()))}
    found: dict[str, dict[int, list[str]]] = {sport: {} for _, sport in people}
    for sport, value in sorted({(sport, values[name]) for name, sport in people if name in values}):
        found[sport].setdefault(first[value], []).append(value)
    return found


def _of_the_sport(
    person: Athlete,
    *,
    question: str,
    values: Mapping[str, str],
    groups: Mapping[str, Mapping[int, list[str]]],
    count: int,
    rng: random.Random,
) -> Question:
    name, sport = person
    others = [group for group in groups[sport].values() if values[name] not in group]
    options = [values[name], *(rng.choice(group) for group in rng.sample(others, count - 1))]
    return Question(name, question.format(athlete=name), values[name], tuple(options))
