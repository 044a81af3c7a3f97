"""The facts that come with the package: athletes, general knowledge, and sentences for running text."""

import csv
import json
import random
from functools import cache
from importlib.resources import files
from typing import Any

FOLDER = files("mechunlearn") / "testbed" / "facts"
TOKENIZER = files("mechunlearn") / "testbed" / "weights" / "tokenizer.json"

Row = dict[str, str]


@cache
def athletes() -> tuple[Row, ...]:
    """Rows with athlete, sport, position and city; the last two are empty outside the three team sports."""
    return _rows("athletes.csv")


@cache
def general_knowledge() -> tuple[Row, ...]:
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
    """The shipped tokenizer's: token -> id."""
    return json.loads(TOKENIZER.read_text(encoding="utf-8"))["model"]["vocab"]


def options_of(fact: Row, rng: random.Random) -> list[str]:
    """Four answers of the fact's relation in random order, one of them true of its subject."""
    known = [other for other in general_knowledge() if other["relation"] == fact["relation"]]
    true = {other["answer"] for other in known if other["subject"] == fact["subject"]}
    options = [fact["answer"], *rng.sample(sorted({other["answer"] for other in known} - true), 3)]
    rng.shuffle(options)
    return options


def running_text(rng: random.Random, *, sentences: int = 8) -> str:
    """Everyday sentences and little stories with random names, places and things."""
    known = stories()
    pieces = rng.sample(known["sentences"], sentences // 2)
    fillings = {slot: rng.choice(values) for slot, values in known["slots"].items()}
    pieces += [template.format(**fillings) for template in rng.sample(known["templates"], sentences // 2)]
    if rng.random() < 0.5:
        rng.shuffle(pieces)
    return " ".join(pieces)


def _rows(name: str) -> tuple[Row, ...]:
    return tuple(csv.DictReader((FOLDER / name).read_text().splitlines()))
