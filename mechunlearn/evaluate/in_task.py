"""What an edit did to a task: each format on both sides, other knowledge, general text."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, TypeAlias

from mechunlearn.evaluate.accuracy import measure
from mechunlearn.evaluate.result import Result
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
    name: str,
    side: Literal["forget", "retain"],
    metric: Metric = candidate_probability,
) -> Result:
    """Accuracy on one side of the test split in the format `name`; ValueError if the task lacks it."""
    if name not in task.formats:
        raise ValueError(f"expected a format of the task ({', '.join(task.formats)}), got {name!r}.")
    return measure(model, getattr(task.formats[name], side), [metric])[0]


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


def every_format(task: Task) -> dict[str, Test]:
    """A test for each format and side that the task has, other knowledge if it has any, and text loss."""
    tests: dict[str, Test] = {
        f"{side}, {name}": partial(in_format, name=name, side=side)
        for name in task.formats
        for side in ("forget", "retain")
    }
    if task.knowledge is not None:
        tests["other knowledge"] = knowledge
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
