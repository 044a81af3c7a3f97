"""Relearning, asked in several formats, as a test for each: the answers of one run are kept for the next test."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mechunlearn as mu
from mechunlearn.evaluate import Question, Result


@dataclass(frozen=True)
class Attack:
    """What `mu.evaluate.relearn` does with these options, for all the questions."""

    questions: tuple[Question, ...]
    rate: float
    steps: int
    batch_size: int
    micro_batch_size: int | None


def relearned(model: Any, task: mu.Task, *, attack: Attack, format: str | None = None, seed: int = 0) -> Result:
    """Of the attack the question in this format; the others' answers are kept for the next call."""
    return _results(model, mu.fingerprint(model), task, attack, seed)[format]


@lru_cache(maxsize=1)
def _results(model: Any, weights: str, task: mu.Task, attack: Attack, seed: int) -> dict[str | None, Result]:
    """Format -> result."""
    found = mu.evaluate.relearn_and_ask(
        model,
        task,
        attack.questions,
        learning_rates=(attack.rate,),
        steps=attack.steps,
        batch_size=attack.batch_size,
        micro_batch_size=attack.micro_batch_size,
        seed=seed,
    )
    return {question.format: result for question, result in zip(attack.questions, found, strict=True)}
