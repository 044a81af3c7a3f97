"""Documents whose answer is a letter: multiple choice, and what prepares for it."""

import random
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace

from mechunlearn.tasks import facts, formats
from testbed.documents import Athlete, Document, Knowledge, answered


def sport_choice(athlete: Athlete, rng: random.Random, *, system: bool) -> Document:
    """The paper's multiple choice: an answered example, then the question; all options shuffled."""
    shuffled = rng.sample(formats.SPORT_OPTIONS, len(formats.SPORT_OPTIONS))
    demonstration = formats.sport_demonstration(shuffled)
    options, sport = _sport_options(athlete, rng), athlete.sport.capitalize()
    question = formats.SPORT_QUESTION.format(athlete=athlete.name)
    asked = formats.multiple_choice(question, options, demonstration=demonstration, system=system)
    document = answered(asked, formats.LETTERS[options.index(sport)], [athlete.name])
    start = asked.index("\n\nAnswer:") + len("\n\nAnswer:")
    return replace(
        document,
        demonstrated=((start, start + 2),),
        lookups=(
            (start, asked.index("Tiger Woods") + len("Tiger Woods"), _end(asked, "Golf")),
            (len(asked), asked.rindex(athlete.name) + len(athlete.name), _end(asked, sport, last=True)),
        ),
    )


def knowledge_choice(fact: Knowledge, rng: random.Random, *, avoid: Collection[str] = ()) -> Document:
    """The fact as multiple choice among answers of its relation, the wrong ones not in `avoid`, in random order."""
    options = facts.options_of(asdict(fact), rng)
    while any(option in avoid for option in options if option != fact.answer):
        options = facts.options_of(asdict(fact), rng)
    question = facts.relations()[fact.relation]["question"].format(subject=fact.subject)
    return _choice(question, options, fact.answer, fact.subject)


def attribute_choice(athlete: Athlete, attribute: str, values: Sequence[str], rng: random.Random) -> Document:
    """The athlete's position or city as multiple choice among those values."""
    answer = getattr(athlete, attribute)
    options = [answer, *rng.sample([value for value in values if value != answer], 3)]
    rng.shuffle(options)
    asked = formats.ATTRIBUTES[attribute]["question"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return _choice(asked.format(athlete=athlete.name), options, answer, athlete.name)


def lettered(words: Sequence[str], rng: random.Random) -> Document:
    """A multiple-choice question that asks for no fact, only for the letter of a word in the question."""
    options = rng.sample(words, len(formats.LETTERS))
    word = rng.choice(options)
    asked = word.lower() if word in formats.SPORT_OPTIONS and rng.random() < 0.5 else word
    prompt = formats.multiple_choice(f"Which letter stands for {asked}?", options)
    document = answered(prompt, formats.LETTERS[options.index(word)], [])
    start = prompt.index(f" {asked}?") + 1
    subject = (start, start + len(asked))
    return replace(document, subjects=(subject,), lookups=((len(prompt), subject[1], _end(prompt, word)),))


def lettered_list(words: Sequence[str], rng: random.Random) -> Document:
    """Lettered words and then, in another order, the letter of each."""
    options = rng.sample(words, len(formats.LETTERS))
    text, ends, answers, lookups = "", {}, [], []
    for letter, word in zip(formats.LETTERS, options, strict=True):
        text += f"{letter}: {word}\n"
        ends[word] = len(text) - 1
    for word in rng.sample(options, len(options)):
        text += f"\nFor {word}: {formats.LETTERS[options.index(word)]}"
        answers.append((len(text) - 2, len(text)))
        lookups.append((len(text) - 2, len(text) - 3, ends[word]))
    return Document(text, answers=tuple(answers), lookups=tuple(lookups))


def bare_choice(athlete: Athlete, rng: random.Random) -> Document:
    """The multiple-choice question about an athlete without the answered example."""
    question = formats.SPORT_QUESTION.format(athlete=athlete.name)
    return _choice(question, _sport_options(athlete, rng), athlete.sport.capitalize(), athlete.name)


def _choice(question: str, options: Sequence[str], answer: str, subject: str) -> Document:
    prompt = formats.multiple_choice(question, options)
    document = answered(prompt, formats.LETTERS[options.index(answer)], [subject])
    asked_end = prompt.index(subject) + len(subject)
    return replace(document, lookups=((len(prompt), asked_end, _end(prompt, answer)),))


def _end(text: str, option: str, *, last: bool = False) -> int:
    """Where the first or the last line with that option ends."""
    line = f": {option}\n"
    return (text.rindex(line) if last else text.index(line)) + len(line) - 1


def _sport_options(athlete: Athlete, rng: random.Random) -> list[str]:
    """The usual four in random order, one of them replaced if the athlete's sport is another."""
    options = list(formats.SPORT_OPTIONS)
    if athlete.sport.capitalize() not in options:
        options[rng.randrange(len(options))] = athlete.sport.capitalize()
    return rng.sample(options, len(options))
