"""Asking a task: each format on both sides, other knowledge, general text."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from mechunlearn.evaluate.generation import generated
from mechunlearn.evaluate.results import Result
from mechunlearn.evaluate.scoring import Side, measure, side_of, whole_answers
from mechunlearn.metrics import Metric, answer_log_probability, candidate_probability
from mechunlearn.model import Model
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task
from mechunlearn.tasks.text import as_prompts

Test: TypeAlias = Callable[..., Result]
"""A test or attack `(model, task) -> Result`; any function of this signature is one.

Two more keywords are given to those that name them: `seed` (a number; with several seeds, the test runs once with
each), and `original`, a function without arguments whose result is a context: inside `with original() as model:` is the
original model, and after it the tested one again.
"""


def in_format(
    model: Model,
    task: Task,
    *,
    name: str | None = None,
    side: Side = "forget",
    metric: Metric = candidate_probability,
) -> Result:
    """Accuracy on one side of the test split in the format `name` (`None`: the first, the trained prompt).

    In which sense, and what chance is, `metric` decides: `candidate_probability`, the paper's; `is_top_of_candidates`;
    `is_top_of_vocabulary`. Where `task.formats[name].kept`, both sides should stay as they were. Cost: 1 forward.
    ValueError if the task lacks the format.
    """
    return measure(model, side_of(task, format=name, side=side), [metric])[0]


def injected(model: Model, task: Task, *, format: str | None = None, metric: Metric = candidate_probability) -> Result:
    """Accuracy of the injected answer, in the sense of `metric`, on facts to forget. Chance: 1 / candidates.

    Without a `format` on `task.injection`, the prompts that an edit trains on; with one on the test split asked so. The
    original model, which prefers the true answers, is below chance. Cost: 1 forward.
    ValueError for a task without injected answers, or without them in that format.
    """
    prompts = task.injection if format is None else side_of(task, format=format, side="injected")
    if prompts is None:
        raise ValueError(
            "expected a task with injected answers, got none: build it with mu.tasks.sports_facts(injected=...), or "
            "set Task.injection, for example to mu.tasks.answered(model, task.forget, ...)."
        )
    found = measure(model, prompts, [metric])[0]
    return replace(found, sense=f"injected answer, {found.sense}")


def knowledge(model: Model, task: Task, *, metric: Metric = candidate_probability) -> Result:
    """Accuracy on `task.knowledge`, multiple choice about other things. Chance is 1/4."""
    if task.knowledge is None:
        raise ValueError(
            "expected a task with knowledge questions, got none: set Task.knowledge or leave the test out."
        )
    return measure(model, task.knowledge, [metric])[0]


def text_loss(model: Model, task: Task) -> Result:
    """Mean cross-entropy on `task.text_test`, in nats per token; a uniform guess has log(vocabulary)."""

    def per_token(logits, prompts: Prompts):
        return -answer_log_probability(logits, prompts) / prompts.answer_mask.sum(1)

    found = measure(model, as_prompts(task.text_test), [per_token], batch_size=16)[0]
    return Result(found.per_example, "cross-entropy", math.log(model.cfg.d_vocab), unit="nats per token")


def format_test(task: Task, name: str, side: Side, *, metric: Metric = candidate_probability) -> Test:
    """`in_format` of one side, or `whole_answers` where the answers have no candidates to be told from."""
    if task.formats[name].forget.candidates is None and metric is candidate_probability:
        return partial(whole_answers, name=name, side=side)
    return partial(in_format, name=name, side=side, metric=metric)


def every_format(task: Task, *, metric: Metric = candidate_probability) -> dict[str, Test]:
    """A test for each format and side that the task has; what the model says on its own to the trained prompt; the
    injected answer and other knowledge, if the task has them; and text loss.

    `metric`: the sense of accuracy, but of what is generated; a format without candidates is scored by `whole_answers`
    where the metric is the default one. "(keep)" marks formats that ask for other facts about the same subjects: there,
    "forget" too should stay as it was.
    """
    tests: dict[str, Test] = {
        f"{side}, {name}{' (keep)' if found.kept else ''}": format_test(task, name, side, metric=metric)
        for name, found in task.formats.items()
        for side in ("forget", "retain")
    }
    tests |= {f"{side}, generated": partial(generated, side=side) for side in ("forget", "retain") if task.formats}
    if task.injection is not None:
        tests["injected answer"] = partial(injected, metric=metric)
    if task.knowledge is not None:
        tests["other knowledge"] = partial(knowledge, metric=metric)
    return {**tests, "text loss": text_loss}


paper_metrics: Mapping[str, Test] = {
    "forget, trained prompt": partial(in_format, name="trained prompt", side="forget"),
    "retain, trained prompt": partial(in_format, name="trained prompt", side="retain"),
    "forget, multiple choice": partial(in_format, name="multiple choice, system prompt", side="forget"),
    "retain, multiple choice": partial(in_format, name="multiple choice, system prompt", side="retain"),
    "forget, paraphrase": partial(in_format, name="question", side="forget"),
    "retain, paraphrase": partial(in_format, name="question", side="retain"),
    "other knowledge": knowledge,
    "text loss": text_loss,
}
"""The columns of the paper's tables and one more format, all of `sports_facts`; accuracy is the paper's (mean
probability over the candidates). A mapping from column to test: add your own with `{**paper_metrics, "mine": f}`."""
