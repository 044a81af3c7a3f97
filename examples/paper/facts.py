"""The paper's tasks, by name."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import mechunlearn as mu
from paper.setup import OWN, Setup, load

MODES = ("erase", "inject")

SPORTS = ("football", "baseball", "basketball")

PARTS = 4
"""Of the sequence."""

TEXT_ROWS = 4000
"""Rows of the Pile, of 100 tokens: 50 steps of 64, and some to test on."""


def basketball(model: Any, setup: Setup) -> mu.Task:
    """Forget a whole sport; inject golf."""
    return _sports(model, setup, forget="basketball", injected="golf")


def athletes_16(model: Any, setup: Setup) -> mu.Task:
    """Forget the first 16 athletes; inject another sport at random."""
    return _sports(model, setup, forget=16, injected=SPORTS)


def athletes_64(model: Any, setup: Setup) -> mu.Task:
    return _sports(model, setup, forget=64, injected=SPORTS)


def counterfact_16(model: Any, setup: Setup) -> mu.Task:
    """Forget the first 16 known records; inject their false answers."""
    return _counterfact(model, setup, forget=16)


def counterfact_64(model: Any, setup: Setup) -> mu.Task:
    return _counterfact(model, setup, forget=64)


TASKS: dict[str, Callable[[Any, Setup], mu.Task]] = {
    "sport": basketball,
    "athletes-16": athletes_16,
    "athletes-64": athletes_64,
    "counterfact-16": counterfact_16,
    "counterfact-64": counterfact_64,
    "counterfact-sequential": counterfact_64,
}
"""The last is edited in parts, one after the other."""

PAPER_TASKS = {name: name.replace("-", " ") for name in TASKS} | {"counterfact-sequential": "counterfact 64 sequential"}
"""What `mu.edit.paper_settings` calls them."""

PARAPHRASES = {True: ("question", "statement", "aside"), False: ("paraphrase",)}
"""The formats whose mean is "paraphrases", for sports (True) and CounterFact."""

CHOICE = {True: "multiple choice, system prompt", False: "multiple choice"}
"""The paper's multiple choice."""


def is_sports(name: str) -> bool:
    return not name.startswith("counterfact")


@cache
def divided(setup: Setup, name: str) -> mu.tasks.Validation:
    """The task to choose settings on and the task to report, once in each process. The same for every seed of an edit:
    seeds differ in the order of batches, in random localizations and in what attacks see."""
    model = load(setup.model)
    found = mu.tasks.validation_split(TASKS[name](model, setup))
    return replace(found, final=_shortened(found.final, name, setup))


def parts(setup: Setup, name: str) -> list[mu.Task]:
    """The parts of a sequence; the task itself where there is none."""
    final = divided(setup, name).final
    return mu.tasks.partitioned(final, PARTS) if name.endswith("sequential") else [final]


def _sports(model: Any, setup: Setup, **options: Any) -> mu.Task:
    return mu.tasks.sports_facts(model, source=setup.athletes, text=_text(model, setup), **options)


def _counterfact(model: Any, setup: Setup, forget: int) -> mu.Task:
    source: Any = setup.counterfact
    questions: Any = setup.questions
    if source is None:
        source, questions = mu.testbed.counterfact()
    return mu.tasks.counterfact(
        model,
        source=source,
        questions=questions,
        forget=forget,
        threshold=setup.threshold,
        shots=setup.shots,
        text=_text(model, setup),
        knowledge=_other_knowledge(model, setup),
    )


def _other_knowledge(model: Any, setup: Setup) -> mu.Prompts:
    """What CounterFact records are not about. The package's own are general knowledge: there, sports."""
    if setup.model in OWN:
        return mu.tasks.sports_facts(model, forget=16).formats[CHOICE[True]].retain
    return mu.tasks.general_knowledge(model)


def _text(model: Any, setup: Setup) -> Any:
    """Rows of the Pile, or the default: everyday sentences."""
    return mu.tasks.pack(model, mu.tasks.pile(), length=100, rows=TEXT_ROWS) if setup.pile else None


def _shortened(task: mu.Task, name: str, setup: Setup) -> mu.Task:
    """With the formats that are asked, and at most so many retained facts and rows of text."""
    sports, most = is_sports(name), setup.tested
    asked = ("trained prompt", *PARAPHRASES[sports], CHOICE[sports], "capitalised", "neighbourhood")
    formats = {
        format: replace(found, retain=found.retain[:most]) for format, found in task.formats.items() if format in asked
    }
    knowledge = None if task.knowledge is None else task.knowledge[: 3 * most // 2]
    return replace(task, formats=formats, knowledge=knowledge, text_test=task.text_test[:most])
