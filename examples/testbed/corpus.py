"""What the shipped model reads: documents about athletes, general knowledge and everyday text.

`held_out_pairs` and `held_out_choices` are recomputable from the seed: the model card's bars are
measured on exactly these (person, format) pairs and facts, of which training never sees a document.
"""

import random
from collections.abc import Iterator, Sequence
from functools import cache

from mechunlearn.tasks import facts, formats
from testbed.choices import attribute_choice, bare_choice, knowledge_choice, lettered, lettered_list, sport_choice
from testbed.documents import Athlete, Document, Knowledge, answered, answers, athletes, general_knowledge, occurrences

SPORT_FORMATS = ("fact", *formats.PARAPHRASES, "multiple_choice", "system_multiple_choice")
ATTRIBUTE_FORMATS = tuple(
    (attribute, phrasing) for attribute, prompts in formats.ATTRIBUTES.items() for phrasing in prompts
)
HELD_OUT = 0.2


@cache
def held_out_pairs(seed: int = 0) -> frozenset[tuple[str, str]]:
    """(athlete, format) pairs never trained: a fifth of each athlete's sport formats and attribute phrasings.

    An attribute's format is named "position/statement".
    """
    rng = random.Random(f"held-out pairs {seed}")
    pairs = set()
    for athlete in athletes():
        for group in (SPORT_FORMATS, [f"{attribute}/{phrasing}" for attribute, phrasing in ATTRIBUTE_FORMATS]):
            count = int(HELD_OUT * len(group) + rng.random())
            pairs.update((athlete.name, name) for name in rng.sample(group, count))
    return frozenset(pairs)


@cache
def held_out_choices(seed: int = 0) -> frozenset[Knowledge]:
    """The fifth of general knowledge that is never asked as multiple choice."""
    rng = random.Random(f"held-out choices {seed}")
    known = general_knowledge()
    return frozenset(rng.sample(known, int(HELD_OUT * len(known))))


def sport_document(athlete: Athlete, name: str, rng: random.Random) -> Document:
    """The athlete's sport in the format of that name; options of multiple choice are shuffled."""
    if "multiple_choice" in name:
        return sport_choice(athlete, rng, system=name.startswith("system"))
    prompt = formats.FACT if name == "fact" else formats.PARAPHRASES[name]
    return answered(prompt.format(athlete=athlete.name), athlete.sport, [athlete.name])


def attribute_document(athlete: Athlete, attribute: str, phrasing: str) -> Document:
    """The athlete's position or city in one phrasing."""
    prompt = formats.ATTRIBUTES[attribute][phrasing].format(athlete=athlete.name)
    return answered(prompt, getattr(athlete, attribute), [athlete.name])


def knowledge_documents(fact: Knowledge) -> list[Document]:
    """The fact in every statement of its relation and as a question."""
    relation = facts.relations()[fact.relation]
    prompts = [text.removesuffix(" {answer}") for text in relation["statements"]]
    prompts.append(f"Question: {relation['question']}\nAnswer:")
    return [answered(text.format(subject=fact.subject), fact.answer, [fact.subject]) for text in prompts]


def held_out_text(documents: int = 64, seed: int = 0) -> list[str]:
    """Running text in sentence orders and with fillings that training does not draw."""
    rng = random.Random(f"held-out text {seed}")
    return [facts.running_text(rng) for _ in range(documents)]


def epoch(number: int, *, stage: int = 1, without: str | None = None, seed: int = 0) -> list[Document]:
    """All training documents once, with fresh options and partners, in random order.

    In the second stage more is asked as multiple choice, and answers that are never right there are no
    wrong options either. Without a sport, its athletes are left out entirely: the twin that never knew them.
    """
    rng = random.Random(f"epoch {number} {seed}" if stage == 1 else f"epoch {number} {seed} stage {stage}")
    avoid = frozenset() if stage == 1 else _never_right(seed)
    people = [athlete for athlete in athletes() if athlete.sport != without]
    documents = [document for athlete in people for document in _about(athlete, people, rng, seed, stage)]
    for fact in general_knowledge():
        documents += rng.sample(knowledge_documents(fact), 3)
        words = answers(fact.relation)
        documents += [lettered(words, rng), lettered_list(words, rng)]
        if fact not in held_out_choices(seed):
            documents += [knowledge_choice(fact, rng, avoid=avoid) for _ in range(2)]
    documents += [Document(facts.running_text(rng)) for _ in range(len(documents) // 20)]
    rng.shuffle(documents)
    return documents


def _about(
    athlete: Athlete, people: Sequence[Athlete], rng: random.Random, seed: int, stage: int
) -> Iterator[Document]:
    held_out = held_out_pairs(seed)
    for name in SPORT_FORMATS:
        if (athlete.name, name) not in held_out and rng.random() < 0.6:
            yield sport_document(athlete, name, rng)
    if athlete.city:
        for attribute, phrasing in ATTRIBUTE_FORMATS:
            if (athlete.name, f"{attribute}/{phrasing}") not in held_out and rng.random() < 0.7:
                yield attribute_document(athlete, attribute, phrasing)
    yield _entry(athlete)
    if stage == 1:
        yield _comparison(athlete, people, rng)
    elif athlete.city:
        attribute = rng.choice(list(formats.ATTRIBUTES))
        if (athlete.name, f"{attribute}/question") not in held_out:
            yield attribute_choice(athlete, attribute, _values(attribute), rng)
    yield lettered(formats.SPORT_OPTIONS, rng)
    yield lettered_list(formats.SPORT_OPTIONS, rng)
    if not {(athlete.name, name) for name in SPORT_FORMATS if "multiple_choice" in name} & held_out:
        yield bare_choice(athlete, rng)


@cache
def _never_right(seed: int) -> frozenset[str]:
    """The answers of held-out choices that answer no other question."""
    held_out = held_out_choices(seed)
    right = {fact.answer for fact in general_knowledge() if fact not in held_out}
    return frozenset(fact.answer for fact in held_out if fact.answer not in right)


@cache
def _values(attribute: str) -> tuple[str, ...]:
    return tuple(sorted({getattr(athlete, attribute) for athlete in athletes()} - {""}))


def _entry(athlete: Athlete) -> Document:
    """The attributes right after the name, so that they are needed there already."""
    attributes = [value for value in (athlete.sport, athlete.position, athlete.city) if value]
    text = f"In the register: {athlete.name} ({', '.join(attributes)})"
    start = text.index("(") + 1
    return Document(text, occurrences(text, [athlete.name]), ((start, len(text) - 1),))


def _comparison(athlete: Athlete, people: Sequence[Athlete], rng: random.Random) -> Document:
    """A question that needs the sports of two people; half of the answers are yes."""
    same = rng.random() < 0.5
    other = rng.choice([p for p in people if (p.sport == athlete.sport) == same and p != athlete])
    names = [athlete.name, other.name]
    prompt = f"Question: Do {names[0]} and {names[1]} play the same sport?\nAnswer:"
    return answered(prompt, "yes" if same else "no", names)
