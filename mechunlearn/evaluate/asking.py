"""Tests that ask: each format on both sides, the injected answer, other knowledge, general text."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.evaluate.generation import generated
from mechunlearn.evaluate.results import Result
from mechunlearn.evaluate.scoring import Side, measure, side_of, whole_answers
from mechunlearn.identity import name_of
from mechunlearn.losses import kl_to_original
from mechunlearn.metrics import Metric, answer_log_probability, candidate_probability
from mechunlearn.model import Model, check_model, preserved
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task, text_test_of
from mechunlearn.tasks.text import as_prompts

Test: TypeAlias = Callable[..., Result]
"""A test or attack: any function `(model, task) -> Result`.

`compare` passes two more keywords to a test that has them: `seed`, a number (with several seeds, the test runs once
with each), and `original`, a function that gives a context: inside `with original() as model:` the model is the
original one, and after it the tested one again.
"""

Original: TypeAlias = Callable[[], AbstractContextManager[Model]]
"""A function whose context gives the original model: `with original() as model:`."""


def in_format(
    model: Model, task: Task, *, name: str | None = None, side: Side = "forget", metric: Metric = candidate_probability
) -> Result:
    """Accuracy on one side of the test split in the format `name` (None: the first, the trained prompt).

    `metric` decides the sense of accuracy, and so what chance is: `candidate_probability` (the paper's),
    `is_top_of_candidates` or `is_top_of_vocabulary`. In a format with `kept`, both sides should stay as they were.
    """
    return measure(model, side_of(task, format=name, side=side), [metric])[0]


def injected(model: Model, task: Task, *, format: str | None = None, metric: Metric = candidate_probability) -> Result:
    """Accuracy of the injected answer on facts to forget, in the sense of `metric`. Chance is 1 / candidates.

    The prompts are `task.injection`, which an edit trains on, or the test split in a `format`. The original model,
    which prefers the true answers, is below chance.
    """
    prompts = task.injection if format is None else side_of(task, format=format, side="injected")
    if prompts is None:
        raise ValueError(
            "expected a task with injected answers, got none: build it with mu.tasks.sports_facts(injected=...), or "
            "set Task.injection, for example to mu.tasks.answered(model, task.forget, ...)."
        )
    result = measure(model, prompts, [metric])[0]
    return replace(result, sense=f"injected answer, {result.sense}")


def knowledge(model: Model, task: Task, *, metric: Metric = candidate_probability) -> Result:
    """Accuracy on `task.knowledge`, multiple choice about other things. Chance is 1/4."""
    if task.knowledge is None:
        raise ValueError(
            "expected a task with knowledge questions, got none: set Task.knowledge or leave the test out."
        )
    return measure(model, task.knowledge, [metric])[0]


def text_loss(model: Model, task: Task, *, rows: int | None = None) -> Result:
    """Mean cross-entropy on `task.text_test`, in nats per token; a uniform guess has log(vocabulary).

    `rows`: read the first ones alone (default: all), where a large model would take long: 1 forward of them.
    """
    result = measure(model, as_prompts(_first_rows(task, rows)), [per_token], batch_size=16)[0]
    return Result(-result.per_example, "cross-entropy", math.log(model.cfg.d_vocab), unit="nats per token")


def per_token(logits: Float[Tensor, "batch answer d_vocab"], prompts: Prompts) -> Float[Tensor, "batch"]:
    """Log probability of the answer per token, in nats."""
    return answer_log_probability(logits, prompts) / prompts.answer_mask.sum(1)


def text_kl(
    model: Model, task: Task, *, original: Original | None = None, rows: int | None = None, batch_size: int = 16
) -> Result:
    """Mean KL(original || tested) over the tokens of `task.text_test`, one value per row, in nats per token.

        sum over v of p0(v) (log p0(v) - log p(v)),   p0 = the original model's prediction of the next token

    It is 0 for the original itself, and larger is worse; there is no chance level. It sees damage that `text_loss`
    misses, where text is about as likely but the model expects other words than before. `compare` passes `original`.

    Cost: 2 forwards over the text (its first `rows`; default: all), and memory for the logits of two batches;
    `original` is entered once per batch.
    """
    original = required(original, text_kl)
    check_model(model)
    text = as_prompts(_first_rows(task, rows))
    kls: list[Tensor] = []
    with torch.no_grad():
        for batch in text.on(model).batches(batch_size):
            with original() as untouched, preserved(untouched):
                before = batch.logits(untouched)
            with preserved(model):
                after = batch.logits(model)
            # Row by row: two more tensors of the size of the logits would double the memory.
            pairs = zip(after, before.to(after.device), batch.answer_mask, strict=True)
            kls += [kl_to_original(a[real], b[real]).mean().cpu() for a, b, real in pairs]
    values = torch.stack(kls)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("expected finite predictions on task.text_test, got NaN or infinity: check the model's dtype.")
    return Result(values, "KL(original || tested)", unit="nats per token")


def _first_rows(task: Task, rows: int | None) -> Int[Tensor, "row pos"]:
    text = text_test_of(task)
    if rows is not None and not 1 <= rows <= len(text):
        raise ValueError(f"rows must lie in 1..{len(text)} (the rows of task.text_test; None: all), got {rows}.")
    return text[:rows]


def every_format(
    task: Task, *, metric: Metric = candidate_probability, text_rows: int | None = None
) -> dict[str, Test]:
    """All that a task can be asked, as tests by name.

    There is a test for each format and side, what the model generates after the trained prompt, the injected answer and
    other knowledge if the task has them, and text loss (of the first `text_rows` rows; default: all). "(keep)" marks
    formats in which the side "forget" should stay as it was too. With the default `metric`, `whole_answers` scores
    formats without candidates.
    """
    tests: dict[str, Test] = {
        f"{side}, {name}{' (keep)' if format.kept else ''}": format_test(task, name, side, metric=metric)
        for name, format in task.formats.items()
        for side in ("forget", "retain")
    }
    tests |= {f"{side}, generated": partial(generated, side=side) for side in ("forget", "retain") if task.formats}
    if task.injection is not None:
        tests["injected answer"] = partial(injected, metric=metric)
    if task.knowledge is not None:
        tests["other knowledge"] = partial(knowledge, metric=metric)
    return {**tests, "text loss": text_loss if text_rows is None else partial(text_loss, rows=text_rows)}


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
"""The columns of the paper's tables and one more format, for `sports_facts`, by name.

Accuracy is the paper's, the mean probability over the candidates. Add tests with `{**paper_metrics, "mine": f}`.
"""


def required(original: Original | None, test: Test) -> Original:
    """The function that gives the original model; ValueError where a test that needs it got none."""
    if original is None:
        raise ValueError(
            f"expected the original model, got none: run {name_of(test)} by mu.evaluate.compare, or pass original=..., "
            f"a function whose result is a context: inside `with original() as model:` is the original."
        )
    return original


def format_test(task: Task, name: str, side: Side, *, metric: Metric = candidate_probability) -> Test:
    """`in_format` of one side, or `whole_answers` for a format without candidates."""
    asked = task.formats[name].forget
    if asked.candidates is None and asked.options is None and metric is candidate_probability:
        return partial(whole_answers, name=name, side=side)
    return partial(in_format, name=name, side=side, metric=metric)
