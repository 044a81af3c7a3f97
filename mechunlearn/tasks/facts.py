"""The facts that come with the package: athletes, general knowledge, and sentences for running text."""

import csv
import json
import random
from functools import cache
from importlib.resources import files
from typing import Any

from mechunlearn.model.classes import Model
from mechunlearn.tasks import formats
from mechunlearn.tasks.building import build
from mechunlearn.tasks.prompts import Prompts

FOLDER = files("mechunlearn") / "testbed" / "facts"
TOKENIZER = files("mechunlearn") / "testbed" / "weights" / "tokenizer.json"

FactRow = dict[str, str]
"""A row of a shipped table: column -> value."""


def general_knowledge(model: Model, *, n: int = 200, prepend_bos: bool | None = None, seed: int = 0) -> Prompts:
    """`n` of the package's questions (capitals, authors, ...), each with four lettered options. Chance is 1/4.

    `prepend_bos` is as for `build`.
    """
    rng = random.Random(f"general knowledge {seed}")
    texts, letters, subjects = [], [], []
    for fact in rng.sample(knowledge_rows(), n):
        options = options_of(fact, rng)
        question = relations()[fact["relation"]]["question"].format(subject=fact["subject"])
        texts.append(formats.multiple_choice(question, options))
        letters.append(formats.LETTERS[options.index(fact["answer"])])
        start = texts[-1].index(question) + question.index(fact["subject"])  # an option may contain the subject
        subjects.append((start, start + len(fact["subject"])))
    answers, candidates = [f" {letter}" for letter in letters], [[f" {o}" for o in formats.LETTERS]] * n
    return build(model, texts, answers, candidates=candidates, subjects=subjects, prepend_bos=prepend_bos)


@cache
def athletes() -> tuple[FactRow, ...]:
    """Rows with athlete, sport, position and city; the last two are empty outside the three team sports."""
    return _rows("athletes.csv")


@cache
def strangers() -> tuple[FactRow, ...]:
    """Rows with athlete and sport, of athletes that the shipped models were not trained on."""
    return _rows("strangers.csv")


@cache
def knowledge_rows() -> tuple[FactRow, ...]:
    """Rows with relation, subject and answer."""
    return _rows("general_knowledge.csv")


@cache
def relations() -> dict[str, Any]:
    """For each relation its `statements`, which end in the answer, and its `question`."""
    return json.loads((FOLDER / "relations.json").read_text())


@cache
def stories() -> dict[str, Any]:
    """Everyday `sentences`, and `templates` with the fillings of their `slots`."""
    return json.loads((FOLDER / "stories.json").read_text())


@cache
def vocabulary() -> dict[str, int]:
    """The shipped tokenizer's vocabulary: token -> id."""
    return json.loads(TOKENIZER.read_text(encoding="utf-8"))["model"]["vocab"]


def options_of(fact: FactRow, rng: random.Random) -> list[str]:
    """Four answers of the fact's relation in random order, of which one is true of its subject."""
    same_relation = [other for other in knowledge_rows() if other["relation"] == fact["relation"]]
    true = {other["answer"] for other in same_relation if other["subject"] == fact["subject"]}
    options = [fact["answer"], *rng.sample(sorted({other["answer"] for other in same_relation} - true), 3)]
    rng.shuffle(options)
    return options


def running_text(rng: random.Random, *, sentences: int = 8) -> str:
    """Everyday sentences and little stories with random names, places and things."""
    material = stories()
    pieces = rng.sample(material["sentences"], sentences // 2)
    fillings = {slot: rng.choice(values) for slot, values in material["slots"].items()}
    pieces += [template.format(**fillings) for template in rng.sample(material["templates"], sentences // 2)]
    if rng.random() < 0.5:
        rng.shuffle(pieces)
    return " ".join(pieces)


def _rows(name: str) -> tuple[FactRow, ...]:
    return tuple(csv.DictReader((FOLDER / name).read_text().splitlines()))
