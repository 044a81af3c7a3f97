"""Accuracy, which says what it means: over the vocabulary, over the candidates, or the paper's."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from mechunlearn.evaluate.result import Result
from mechunlearn.metrics import (
    Metric,
    candidate_probability,
    checked,
    is_top_of_candidates,
    is_top_of_vocabulary,
    name_of,
)
from mechunlearn.model import Model, check_model, device_of, preserved
from mechunlearn.tasks.prompts import Prompts

SENSES: dict[Metric, str] = {
    is_top_of_vocabulary: "argmax over the vocabulary",
    is_top_of_candidates: "argmax over the candidates",
    candidate_probability: "mean probability over the candidates (the paper's accuracy)",
}


@dataclass(frozen=True)
class Accuracy:
    """The three senses of accuracy on the same prompts."""

    vocabulary: Result
    """Share of prompts whose answer is the argmax over the vocabulary, every token of it. Chance is about 0."""
    candidates: Result
    """Share whose answer is the argmax over the candidates. Chance is 1 / candidates."""
    probability: Result
    """Mean probability of the answer after a softmax over the candidates: what the paper calls accuracy."""


def accuracy(model: Model, prompts: Prompts, *, batch_size: int = 64) -> Accuracy:
    """Accuracy of the model on prompts with candidates, in its three senses. Cost: 1 forward."""
    return Accuracy(*measure(model, prompts, tuple(SENSES), batch_size=batch_size))


def measure(model: Model, prompts: Prompts, metrics: Sequence[Metric], *, batch_size: int = 64) -> tuple[Result, ...]:
    """One result per metric, from one forward over the prompts in batches (answers are teacher-forced)."""
    check_model(model)
    values: list[list[torch.Tensor]] = [[] for _ in metrics]
    order = prompts.attention_mask.sum(1).cpu().argsort(stable=True)  # rows of about one length need little padding
    with preserved(model), torch.no_grad():
        for batch in prompts.to(device_of(model)).rows(order).batches(batch_size):
            logits = batch.logits(model)
            for kept, metric in zip(values, metrics, strict=True):
                kept.append(checked(metric, logits, batch).float().cpu())
    back = order.argsort()
    return tuple(
        result_of(torch.cat(kept)[back], metric, prompts) for kept, metric in zip(values, metrics, strict=True)
    )


def result_of(values: Float[torch.Tensor, "prompt"], metric: Metric, prompts: Prompts) -> Result:
    """What a metric gave for each prompt, with what it means."""
    sense, unit = SENSES.get(metric, name_of(metric)), "share" if metric in SENSES else ""
    return Result(values, sense, _chance(metric, prompts), unit=unit, names=prompts.names)


def _chance(metric: Metric, prompts: Prompts) -> float | None:
    return prompts.chance if metric in (is_top_of_candidates, candidate_probability) else None
