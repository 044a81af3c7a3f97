"""Relearning, asked in several formats: facts that are trained on alike are trained on once."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mechunlearn as mu
from mechunlearn.evaluate import Result
from mechunlearn.evaluate.attacks.exam import Asked, worst_case
from mechunlearn.evaluate.attacks.relearning import Tuning, relearning_terms
from mechunlearn.metrics import Metric
from mechunlearn.training import adamw


@dataclass(frozen=True)
class Question:
    """What the attacked model is asked."""

    format: str | None
    metric: Metric
    at: tuple[int, ...]
    """After how many steps."""


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
    """Format -> result. A format may lack facts, and so leave others to be trained on: that is another run."""
    runs: dict[tuple[str, ...], list[tuple[Question, mu.Prompts, mu.Prompts]]] = {}
    for question in attack.questions:
        trained, tested = mu.evaluate.halves(task, format=question.format, seed=seed)
        runs.setdefault(trained.names, []).append((question, trained, tested))
    found = {}
    for alike in runs.values():
        found |= _run(model, task, attack, alike, seed)
    return found


def _run(
    model: Any, task: mu.Task, attack: Attack, alike: list[tuple[Question, mu.Prompts, mu.Prompts]], seed: int
) -> dict[str | None, Result]:
    """Questions for which the same facts are trained on."""
    sizes = (attack.batch_size, attack.batch_size, 1)
    for _, trained, tested in reversed(alike):  # each is checked to be apart from what is tested
        terms = relearning_terms(model, task, trained, tested, coefficients=(1.0, 1.0, 0.0), batch_sizes=sizes)
    asked = [Asked.of(model, task, tested, metric=question.metric, seed=seed) for question, _, tested in alike]
    points = [question.at for question, *_ in alike]
    tuning = Tuning((attack.rate,), 0.1, adamw, attack.micro_batch_size, seed)
    scores = tuning.several_scores(model, terms, list(zip(asked, points, strict=True)), steps=attack.steps)
    formats = [question.format for question, *_ in alike]
    return {f: worst_case(own, about, axis="steps") for f, own, about in zip(formats, scores, asked, strict=True)}
