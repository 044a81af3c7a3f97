"""Sports Facts: which sport does an athlete play, asked in every format of the paper and more."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.model import Model, check_model
from mechunlearn.model.tokens import encode_all, prepending_bos
from mechunlearn.tasks import facts, formats
from mechunlearn.tasks.athletes import (
    CANDIDATES,
    Athlete,
    athletes_from,
    athletes_to_forget,
    injected_sports,
    is_shipped,
)
from mechunlearn.tasks.building import knows
from mechunlearn.tasks.facts import general_knowledge
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.questions import SUBJECT, Question, filled, format_of, injected_prompts, prompts_of
from mechunlearn.tasks.splits import Sides
from mechunlearn.tasks.task import Format, Task
from mechunlearn.tasks.text import train_and_test_text

if TYPE_CHECKING:
    from pandas import DataFrame


EXAMPLE: Athlete = ("Tiger Woods", "golf")
"""The athlete of the answered example in a prompt."""

Ask: TypeAlias = Callable[[Athlete], Question]
"""A format: from an athlete to a question."""

Corrupt: TypeAlias = bool | Callable[..., Prompts]
"""Whether prompts get corrupted counterparts, or a function (model, prompts) -> the prompts with theirs."""


def sports_facts(
    model: Model,
    *,
    forget: str | int | Sequence[str] = "basketball",
    source: "str | Path | DataFrame | None" = None,
    sha256: str | None = None,
    forget_seed: int | None = None,
    injected: str | Sequence[str] = "golf",
    corrupt: Corrupt = True,
    threshold: float | None = 0.0,
    dashed: bool = False,
    text: Iterable[str] | Int[Tensor, "row pos"] | None = None,
    train: float = 0.8,
    train_forget: float | None = None,
    shuffle: bool = True,
    strangers: Sequence[str] | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> Task:
    """A task that forgets a sport or some athletes and keeps the others of football, baseball and basketball.

    - `forget`: a sport, names, or a number of athletes, the first (random ones with `forget_seed`).
    - `source`: a table, or the path or address of a CSV file (with its `sha256`), of athlete and sport.
      Default: what the shipped model knows, for its vocabulary; else `authors_athletes`.
    - `injected`: a sport, a column, or several sports, a random wrong one for each.
    - `corrupt`: True pairs each prompt with one of as many tokens about another sport, or leaves it out; or a function.
    - `threshold`: the least probability of an athlete's sport (None: it is the first choice).
    - `dashed`: add spelled answers, f-o-o-t-b-a-l-l, scored by `evaluate.whole_answers`.
    - `train`: the share of retained athletes and of a whole sport to train on; single athletes are trained on and
      tested, unless `train_forget` is given. `shuffle=False` takes the first (ICML version, with 0.5).
    - `strangers`: athletes whom the model does not know. Default: of forgotten sports, those below the threshold;
      of the shipped model, some that it did not see.
    - `prepend_bos`: as for `build`.

    Formats: the paper's one-shot prompt, paraphrases, capitals, multiple choice by letter or in words, 0 to 2 examples
    and a system prompt before it. Chance is 1/4: three sports and golf. "neighbourhood, position" (1/3) and
    "neighbourhood, city" (1/4) are there if all tested athletes have them.

    Guo et al. 2025, https://arxiv.org/abs/2410.12949. Cost: 1F per athlete with a threshold.
    """
    check_model(model)
    with prepending_bos(model, prepend_bos):
        rng = random.Random(index(seed))
        rows = athletes_from(model, source, sha256)
        people, partners, left_out = _usable(model, rows, threshold, paired=corrupt is True)
        forgotten = athletes_to_forget(people, forget, forget_seed, left_out)
        injected_of = injected_sports(forgotten, rows, injected, seed)
        if train_forget is None and isinstance(forget, str):
            train_forget = train
        retained = [person for person in people if person not in set(forgotten)]
        sides = Sides.of(forgotten, retained, train=train, train_forget=train_forget, shuffle=shuffle, rng=rng)
        lines = [facts.running_text(rng) for _ in range(400)] if text is None else text
        text_train, text_test = train_and_test_text(model, lines)
        trained = [_trained(person, injected_of) for person in sides.forget_train]
        tested = _Tested(model, sides.forget_test, sides.retain_test, injected_of, sides.retain_train, seed)
        what = forget if isinstance(forget, str | int | np.integer) else f"{len(forgotten)} athletes"
        return Task(
            name=f"sports facts: forget {what}",
            forget=_with_counterparts(model, trained, corrupt, partners, rng),
            retain=_with_counterparts(model, [_trained(p, {}) for p in sides.retain_train], corrupt, partners, rng),
            formats={
                **_sport_formats(tested, rng=rng, dashed=dashed),
                **_neighbourhood(tested, rows, people),
            },
            text=text_train,
            text_test=text_test,
            injection=injected_prompts(model, trained),
            knowledge=general_knowledge(model, seed=seed),
            strangers=_strangers(model, strangers, rows, forgotten, left_out),
            splits={**sides.names(lambda person: person[0]), **left_out},
        )


def _strangers(
    model: Model,
    names: Sequence[str] | None,
    rows: Sequence[facts.FactRow],
    forgotten: Sequence[Athlete],
    left_out: Mapping[str, Sequence[str]],
) -> Prompts | None:
    """Prompts about them; None where the data has fewer than eight, which would say little."""
    sports, unknown = {sport for _, sport in forgotten}, set(left_out.get("not_known", ()))
    source = facts.strangers() if is_shipped(model) else [row for row in rows if row["athlete"] in unknown]
    people = [(row["athlete"], row["sport"]) for row in source if row["sport"] in sports]
    if names is not None:
        people = [(name, forgotten[0][1]) for name in dict.fromkeys(names)]
        known = sorted(set(names) & {row["athlete"] for row in rows} - unknown)
        if known:
            raise ValueError(f"expected strangers that are not among the athletes of the source, got {known[:5]}.")
    return prompts_of(model, [_trained(person, {}) for person in people]) if names or len(people) >= 8 else None


def with_random_subjects(model: Model, prompts: Prompts, *, seed: int = 0) -> Prompts:
    """The prompts with corrupted counterparts in which each token of the subject is another, random one.

    They are drawn evenly from the vocabulary without its special tokens. Such a subject has no answer of its own, where
    another subject has a wrong one. Pass it as `sports_facts(..., corrupt=with_random_subjects)`, or apply it to any
    prompts: `replace(task, forget=with_random_subjects(model, task.forget))`. ValueError for prompts without subjects.
    """
    if prompts.subject is None or model.tokenizer is None:
        raise ValueError("expected prompts with subjects, got none: pass subjects=... to mu.tasks.build.")
    special = set(model.tokenizer.all_special_ids)
    known = {token for token in model.tokenizer.get_vocab().values() if token < model.cfg.d_vocab}
    tokens = torch.tensor(sorted(known - special))
    places = prompts.subject.cpu()
    before = prompts.tokens.cpu()[places]
    generator = torch.Generator().manual_seed(index(seed))
    drawn = torch.randint(len(tokens) - 1, before.shape, generator=generator)
    same = torch.searchsorted(tokens, before)  # of all but the token itself: those from it on move up by one
    is_known = tokens[same.clamp(max=len(tokens) - 1)] == before
    corrupt = prompts.tokens.cpu().clone()
    corrupt[places] = tokens[drawn + ((drawn >= same) & is_known).long()]
    return replace(prompts, corrupt=corrupt.to(prompts.tokens))


def _usable(
    model: Model, rows: Sequence[facts.FactRow], threshold: float | None, *, paired: bool
) -> tuple[list[Athlete], dict[str, list[str]], dict[str, tuple[str, ...]]]:
    """The athletes that the task can use, the partners of each, and for each reason the names that are left out."""
    people = [(row["athlete"], row["sport"]) for row in rows]
    left_out: dict[str, tuple[str, ...]] = {}
    if threshold != 0:
        prompts = prompts_of(model, [_trained(person, {}) for person in people])
        known = knows(model, prompts, threshold=threshold).tolist()
        left_out["not_known"] = tuple(name for (name, _), kept in zip(people, known, strict=True) if not kept)
        people = [person for person, kept in zip(people, known, strict=True) if kept]
    partners = partners_of(model, people) if paired else {}
    unpaired = tuple(name for name, others in partners.items() if not others)
    if unpaired:
        left_out["no_counterpart"] = unpaired
    return [person for person in people if person[0] not in unpaired], partners, left_out


def _with_counterparts(
    model: Model, questions: Sequence[Question], corrupt: Corrupt, partners: dict[str, list[str]], rng: random.Random
) -> Prompts:
    if callable(corrupt):
        return corrupt(model, prompts_of(model, questions))
    if corrupt:
        others = [formats.FACT.format(athlete=rng.choice(partners[question.name])) for question in questions]
        questions = [replace(q, corrupt=other) for q, other in zip(questions, others, strict=True)]
    return prompts_of(model, questions)


def partners_of(model: Model, people: Sequence[Athlete]) -> dict[str, list[str]]:
    """For each athlete those of another sport whose prompt has as many tokens."""
    by_length: dict[int, list[Athlete]] = {}
    encodings = encode_all(model, [formats.FACT.format(athlete=name) for name, _ in people])
    lengths = {name: len(encoding.tokens) for (name, _), encoding in zip(people, encodings, strict=True)}
    for person in people:
        by_length.setdefault(lengths[person[0]], []).append(person)
    return {name: [other for other, its in by_length[lengths[name]] if its != sport] for name, sport in people}


@dataclass(frozen=True)
class _Tested:
    """The athletes of the test split, and what their questions are made from."""

    model: Model
    forget: Sequence[Athlete]
    retain: Sequence[Athlete]
    injected: Mapping[str, str]
    """Athlete -> the injected sport."""
    examples: Sequence[Athlete]
    """The athletes whose answers a prompt may show."""
    seed: int

    def format(self, ask: Ask, *, kept: bool = False) -> Format:
        return format_of(self.model, [*map(ask, self.forget)], [*map(ask, self.retain)], kept=kept)


def _trained(person: Athlete, injected: Mapping[str, str]) -> Question:
    """The prompt that an editor trains on."""
    return _in_a_sentence(person, template=formats.FACT, injected=injected)


def _sport_formats(tested: _Tested, *, rng: random.Random, dashed: bool) -> dict[str, Format]:
    templates = {"trained prompt": formats.FACT, **formats.PARAPHRASES}
    injected = tested.injected
    asks: dict[str, Ask] = {
        name.replace("_", " "): partial(_in_a_sentence, template=template, injected=injected)
        for name, template in templates.items()
    }
    for name, (put, shots, system) in _choices().items():
        first = put is _by_letter and shots == 1
        # The first formats draw from the task's generator, later ones from their own: adding one changes no other.
        own = rng if first else random.Random(f"{name} {tested.seed}")
        asks[name] = partial(_by_choice, put=put, shots=shots, system=system, rng=own, tested=tested)
    asks["capitalised"] = partial(
        _in_a_sentence, template=formats.CAPITALISED, injected=injected, written=str.capitalize
    )
    if dashed:
        # Spelled sports begin with the same tokens, so whole answers are compared, and there are no candidates.
        asks["dashed"] = partial(
            _in_a_sentence, template=formats.DASHED, injected=injected, written="-".join, candidates=()
        )
    return {name: tested.format(ask) for name, ask in asks.items()}


def _neighbourhood(tested: _Tested, rows: Sequence[facts.FactRow], people: Sequence[Athlete]) -> dict[str, Format]:
    """A format for each attribute that the source has of all tested athletes and that has several values."""
    asks = {attribute: _about_attribute(tested, attribute, rows, people) for attribute in formats.ATTRIBUTES}
    return {f"neighbourhood, {name}": tested.format(ask, kept=True) for name, ask in asks.items() if ask is not None}


def _about_attribute(
    tested: _Tested, attribute: str, rows: Sequence[facts.FactRow], people: Sequence[Athlete]
) -> Ask | None:
    question, everyone = formats.ATTRIBUTES[attribute]["question"], (*tested.forget, *tested.retain)
    values = {row["athlete"]: row[attribute].strip() for row in rows if row.get(attribute, "").strip()}
    if not all(name in values for name, _ in everyone):
        return None
    rng = random.Random(f"{attribute} {tested.seed}")
    groups = _groups(tested.model, question, people, values)
    count = min(4, *(len(groups[sport]) for _, sport in everyone))

    def ask(person: Athlete) -> Question:
        name, sport = person
        # The options are values of athletes of the same sport: a model that knows the sport alone is at chance.
        others = [group for group in groups[sport].values() if values[name] not in group]
        options = [values[name], *(rng.choice(group) for group in rng.sample(others, count - 1))]
        text, place = _about(question, name)
        return Question(name, text, f" {values[name]}", tuple(f" {option}" for option in options), subject=place)

    return ask if count > 1 else None


def _in_a_sentence(
    person: Athlete,
    *,
    template: str,
    injected: Mapping[str, str],
    written: Callable[[str], str] = str,
    candidates: Sequence[str] = CANDIDATES,
) -> Question:
    name, sport = person
    text, place = _about(template, name)
    instead = f" {written(injected[name])}" if name in injected else None
    options = tuple(f" {written(option)}" for option in candidates)
    return Question(name, text, f" {written(sport)}", options, instead, place)


_Choice: TypeAlias = Callable[[str, random.Random], tuple[str, dict[str, str]]]
"""A way to put a choice: from a name to the question and the answer that stands for each sport."""


def _choices() -> dict[str, tuple[_Choice, int, bool]]:
    """Name -> way to put the choice, number of answered examples, whether the system prompt comes first."""
    kinds: dict[str, tuple[_Choice, int]] = {
        "multiple choice": (_by_letter, 1),
        "multiple choice, zero-shot": (_by_letter, 0),
        "multiple choice, two-shot": (_by_letter, 2),
        "multiple choice in words": (_by_word, 1),
        "multiple choice in words, zero-shot": (_by_word, 0),
    }
    systems = {"": False, ", system prompt": True}
    choices = {name + suffix: (*kind, system) for name, kind in kinds.items() for suffix, system in systems.items()}
    del choices["multiple choice, two-shot, system prompt"]  # the longest prompts of all, for nothing new
    return choices


def _by_choice(
    person: Athlete, *, put: _Choice, shots: int, system: bool, rng: random.Random, tested: _Tested
) -> Question:
    text = formats.SYSTEM + "\n" if system else ""
    others = rng.sample(tested.examples, min(shots - 1, len(tested.examples))) if shots > 1 else []
    for name, sport in [*others, EXAMPLE] if shots else []:
        asked, answers = put(name, rng)
        text += f"{asked} {answers[sport]}\n\n"
    name, sport = person
    asked, answers = put(name, rng)
    start = len(text) + formats.CHOICE_IN_WORDS.index("{athlete}")  # either way of putting it begins so
    instead = f" {answers[tested.injected[name]]}" if name in tested.injected else None
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
    """Sport -> first token -> the values that start with it, since options have to differ in their first token."""
    before = question.format(athlete=people[0][0])
    every = sorted(set(values.values()))
    start, *encodings = encode_all(model, [before, *(f"{before} {value}" for value in every)])
    first = {value: e.tokens[len(start.tokens)] for value, e in zip(every, encodings, strict=True)}
    groups: dict[str, dict[int, list[str]]] = {sport: {} for _, sport in people}
    for sport, value in sorted({(sport, values[name]) for name, sport in people if name in values}):
        groups[sport].setdefault(first[value], []).append(value)
    return groups


def _about(template: str, name: str) -> tuple[str, tuple[int, int]]:
    return filled(template.replace("{athlete}", "{subject}"), {SUBJECT: name})
