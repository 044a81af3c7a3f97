"""Accuracy in its senses: over the vocabulary, over the candidates, or the paper's; of a token or of whole answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float

from mechunlearn.evaluate.results import Result
from mechunlearn.identity import name_of
from mechunlearn.metrics import (
    Metric,
    answer_log_probability,
    answer_probability,
    candidate_probability,
    is_top_of_candidates,
    is_top_of_vocabulary,
    scored,
)
from mechunlearn.model import Model, check_model, preserved
from mechunlearn.tasks.building import answer_texts, answered
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task

SENSES: dict[Metric, str] = {
    is_top_of_vocabulary: "argmax over the vocabulary",
    is_top_of_candidates: "argmax over the candidates",
    candidate_probability: "mean probability over the candidates (the paper's accuracy)",
    answer_probability: "mean probability of the whole answer",
}
"""Metrics whose values are shares of 1, and what their mean is called."""


Side: TypeAlias = Literal["forget", "retain", "injected"]
"""Facts to forget, facts to keep, or the facts to forget with the injected answers in place of the true ones."""


@dataclass(frozen=True)
class Accuracy:
    """The three senses of accuracy on the same prompts."""

    vocabulary: Result
    """Share of prompts of whose answer every token is the argmax over the vocabulary. Chance is about 0."""
    candidates: Result
    """Share whose answer is the argmax over the candidates. Chance is 1 / candidates."""
    probability: Result
    """Mean probability of the answer after a softmax over the candidates: what the paper calls accuracy."""


def accuracy(model: Model, prompts: Prompts, *, batch_size: int = 64) -> Accuracy:
    """Accuracy of the model on prompts with candidates, in its three senses. Cost: 1 forward."""
    senses = (is_top_of_vocabulary, is_top_of_candidates, candidate_probability)
    return Accuracy(*measure(model, prompts, senses, batch_size=batch_size))


def measure(model: Model, prompts: Prompts, metrics: Sequence[Metric], *, batch_size: int = 64) -> tuple[Result, ...]:
    """One result per metric, from one forward over the prompts in batches (answers are teacher-forced).

    Prompts with `options` are scored by whole answers, which takes a forward for each option.
    """
    check_model(model)
    values: list[list[torch.Tensor]] = []
    order = prompts.attention_mask.sum(1).cpu().argsort(stable=True)  # rows of about one length need little padding
    with preserved(model), torch.no_grad():
        for batch in prompts.on(model).rows(order).batches(batch_size):
            logits = _logits_once(model, batch)
            values.append([scored(metric, logits, batch).float().cpu() for metric in metrics])
    pairs = zip(zip(*values, strict=True), metrics, strict=True)
    return tuple(result_of(torch.cat(batches)[order.argsort()], metric, prompts) for batches, metric in pairs)


def _logits_once(model: Model, batch: Prompts) -> Callable[[Prompts], torch.Tensor]:
    """The logits of prompts; those of the batch, which every metric asks for, are computed once."""

    own: list[torch.Tensor] = []

    def logits(asked: Prompts) -> torch.Tensor:
        if asked is not batch:
            return asked.logits(model)
        if not own:
            own.append(batch.logits(model))
        return own[0]

    return logits


def whole_answers(
    model: Model, task: Task, *, name: str | None = None, side: Side = "forget", answers: Sequence[str] | None = None
) -> Result:
    """Probability of the right answer among whole answers, for formats whose answers begin alike, such as "dashed".

        p = exp(l) / sum over answers a of exp(l_a),   l_a = the log probability of all tokens of a

    `answers`: the texts to choose from, each with the space before it; default: every answer that the format has on any
    side. Chance is 1 / answers. For answers of one token, `in_format` gives the same. Guo et al. 2025
    (https://arxiv.org/abs/2410.12949) score spelled sports in this way. Cost: 1 forward for each answer.
    """
    prompts = side_of(task, format=name, side=side)
    right = answer_texts(model, prompts)
    if answers is None:
        format = task.formats[next(iter(task.formats)) if name is None else name]
        sides = (format.forget, format.retain, *([] if format.injected is None else [format.injected]))
        answers = sorted({answer for prompts_of in sides for answer in answer_texts(model, prompts_of)})
    options = list(dict.fromkeys(answers))
    unknown = sorted(set(right) - set(options))
    if unknown or len(options) < 2:
        raise ValueError(f"expected two answers or more, the right ones among them, got {options}: add {unknown}.")
    by_option = [measure(model, answered(model, prompts, a), [answer_log_probability])[0] for a in options]
    column = torch.tensor([options.index(answer) for answer in right])
    scores = torch.stack([result.per_example for result in by_option], 1)
    probability = scores.softmax(1).gather(1, column[:, None])[:, 0]
    sense = "mean probability over whole answers"
    return Result(probability, sense, 1 / len(options), unit="share", names=prompts.names)


def side_of(task: Task, *, format: str | None = None, side: Side = "forget") -> Prompts:
    """One side of the test split in a format (default: the first, the trained prompt); ValueError if there is none."""
    name = next(iter(task.formats), "") if format is None else format
    if name not in task.formats:
        raise ValueError(
            f"expected a format of the task ({', '.join(task.formats) or 'it has none'}), got {name!r}: "
            f"mu.tasks.sports_facts, .counterfact and .from_frame build some; for one more, dataclasses.replace(task, "
            f"formats={{**task.formats, {name!r}: mu.tasks.Format(forget, retain)}})."
        )
    prompts = getattr(task.formats[name], side)
    if prompts is None:
        with_injected = [other for other, format in task.formats.items() if format.injected is not None]
        raise ValueError(
            f"expected a format with injected answers ({', '.join(with_injected) or 'the task has none'}), got "
            f"{name!r}: sports_facts and from_frame of mu.tasks build them with injected=..., counterfact always; or "
            f"set Format.injected."
        )
    return prompts


def result_of(values: Float[torch.Tensor, "prompt"], metric: Metric, prompts: Prompts) -> Result:
    """A metric's values for each prompt as a result, with the sense, unit and chance level of the metric."""
    sense, unit = SENSES.get(metric, name_of(metric)), "share" if metric in SENSES else ""
    if prompts.options is not None and metric is candidate_probability:
        sense = "mean probability over whole answers" if prompts.chance else "mean probability of the whole answer"
    chance = prompts.chance if metric in (is_top_of_candidates, candidate_probability) else None
    return Result(values, sense, chance, unit=unit, names=prompts.names)
