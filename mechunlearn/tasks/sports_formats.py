"""Every way in which the sports facts are asked."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mechunlearn.model import Model
from mechunlearn.model.tokens import encode
from mechunlearn.tasks import formats
from mechunlearn.tasks.athletes import CANDIDATES, Athlete
from mechunlearn.tasks.questions import SUBJECT, Question, filled, format_of
from mechunlearn.tasks.task import Format

EXAMPLE: Athlete = ("Tiger Woods", "golf")

Ask = Callable[[Athlete], Question]


@dataclass(frozen=True)
class Asking:
    """Who is asked about, and what may be said."""

    model: Model
    forget: Sequence[Athlete]
    """Of the test split, like `retain`."""
    retain: Sequence[Athlete]
    injected: Mapping[str, str]
    """Athlete -> the sport in place of the true one."""
    examples: Sequence[Athlete]
    """The athletes whose answers a prompt may show."""
    seed: int

    def format(self, ask: Ask, *, kept: bool = False) -> Format:
        return format_of(self.model, [*map(ask, self.forget)], [*map(ask, self.retain)], kept=kept)


def trained(person: Athlete, injected: Mapping[str, str]) -> Question:
    """The prompt that an editor trains on."""
    return _in_a_sentence(person, template=formats.FACT, injected=injected)


def sport_formats(asking: Asking, *, rng: random.Random, dashed: bool) -> dict[str, Format]:
    """The sport of the athletes in every format.

    The first formats draw from `rng`, later ones from generators of their own: another format changes no other.
    """
    templates = {"trained prompt": formats.FACT, **formats.PARAPHRASES}
    injected = asking.injected
    asks: dict[str, Ask] = {
        name.replace("_", " "): partial(_in_a_sentence, template=template, injected=injected)
        for name, template in templates.items()
    }
    for name, (put, shots, system) in _choices().items():
        first = put is _by_letter and shots == 1
        own = rng if first else random.Random(f"{name} {asking.seed}")
        asks[name] = partial(_by_choice, put=put, shots=shots, system=system, rng=own, asking=asking)
    asks["capitalised"] = partial(
        _in_a_sentence, template=formats.CAPITALISED, injected=injected, written=str.capitalize
    )
    if dashed:
        asks["dashed"] = partial(_dashed, injected=injected)
    return {name: asking.format(ask) for name, ask in asks.items()}


def neighbourhood(
    asking: Asking, *, attributes: Mapping[str, Mapping[str, str]], people: Sequence[Athlete]
) -> dict[str, Format]:
    """Other facts of the same athletes, which forgetting their sport should not touch: a format for each attribute.

    `attributes`: attribute -> athlete -> value. The options are values of athletes of the same sport, so that who knows
    the sport alone is at chance. Left out is an attribute that a tested athlete lacks, or that has no two values.
    """
    found = {}
    tested = (*asking.forget, *asking.retain)
    for attribute, values in attributes.items():
        question = formats.ATTRIBUTES[attribute]["question"]
        if all(name in values for name, _ in tested):
            rng = random.Random(f"{attribute} {asking.seed}")
            groups = _groups(asking.model, question, people, values)
            count = min(4, *(len(groups[sport]) for _, sport in tested))
            ask = partial(_of_the_sport, question=question, values=values, groups=groups, count=count, rng=rng)
            if count > 1:
                found[f"neighbourhood, {attribute}"] = asking.format(ask, kept=True)
    return found


def _in_a_sentence(
    person: Athlete, *, template: str, injected: Mapping[str, str], written: Callable[[str], str] = str
) -> Question:
    name, sport = person
    text, place = _about(template, name)
    instead = f" {written(injected[name])}" if name in injected else None
    options = tuple(f" {written(each)}" for each in CANDIDATES)
    return Question(name, text, f" {written(sport)}", options, instead, place)


def _dashed(person: Athlete, *, injected: Mapping[str, str]) -> Question:
    """Spelled sports begin alike, and it takes whole answers to tell them apart: no candidates."""
    name, sport = person
    text, place = _about(formats.DASHED, name)
    instead = f" {'-'.join(injected[name])}" if name in injected else None
    return Question(name, text, f" {'-'.join(sport)}", (), instead, place)


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


def _by_choice(person: Athlete, *, put: Put, shots: int, system: bool, rng: random.Random, asking: Asking) -> Question:
    text = formats.SYSTEM + "\n" if system else ""
    others = rng.sample(asking.examples, min(shots - 1, len(asking.examples))) if shots > 1 else []
    for name, sport in [*others, EXAMPLE] if shots else []:
        asked, answers = put(name, rng)
        text += f"{asked} {answers[sport]}\n\n"
    name, sport = person
    asked, answers = put(name, rng)
    start = len(text) + formats.CHOICE_IN_WORDS.index("{athlete}")  # either way of putting it begins so
    instead = f" {answers[asking.injected[name]]}" if name in asking.injected else None
    options = tuple(f" {answer}" for answer in sorted(answers.values()))
    return Question(name, text + asked, f" {answers[sport]}", options, instead, (start, start + len(name)))


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
    text, place = _about(question, name)
    return Question(name, text, f" {values[name]}", tuple(f" {option}" for option in options), subject=place)


def _about(template: str, name: str) -> tuple[str, tuple[int, int]]:
    return filled(template.replace("{athlete}", "{subject}"), {SUBJECT: name})
