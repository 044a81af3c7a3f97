"""Accuracy over answers of several tokens, each taken as a whole."""

from collections.abc import Sequence

import torch

from mechunlearn.evaluate.accuracy import measure
from mechunlearn.evaluate.result import Result
from mechunlearn.evaluate.sides import Side, side_of
from mechunlearn.metrics import answer_log_probability
from mechunlearn.model import Model
from mechunlearn.tasks.build import answer_texts, answered
from mechunlearn.tasks.task import Task


def whole_answers(
    model: Model, task: Task, *, name: str | None = None, side: Side = "forget", answers: Sequence[str] | None = None
) -> Result:
    """Probability of the right answer among whole answers, for formats whose answers begin alike, such as "dashed".

    p = exp(l) / sum over answers a of exp(l_a), where l_a is the log probability of all tokens of a. `answers`: text,
    with the space before it; default: every answer that the format has on any side. Chance is 1 / answers. With answers
    of one token, `in_format` gives the same. Guo et al. 2025 (https://arxiv.org/abs/2410.12949) score spelled sports
    so. Cost: 1 forward for each answer. ValueError for prompts without texts, and for a right answer that is not among
    `answers`.
    """
    prompts = side_of(task, format=name, side=side)
    right = answer_texts(model, prompts)
    options = list(dict.fromkeys(answers if answers is not None else _all_answers(model, task, name)))
    unknown = sorted(set(right) - set(options))
    if unknown or len(options) < 2:
        raise ValueError(f"expected two answers or more, the right ones among them, got {options}: add {unknown}.")
    asked = (answered(model, prompts, option) for option in options)
    scores = torch.stack([measure(model, each, [answer_log_probability])[0].per_example for each in asked], 1)
    column = torch.tensor([options.index(answer) for answer in right])
    found = scores.softmax(1).gather(1, column[:, None])[:, 0]
    sense = "mean probability over whole answers"
    return Result(found, sense, 1 / len(options), unit="share", names=prompts.names)


def _all_answers(model: Model, task: Task, name: str | None) -> list[str]:
    first = next(iter(task.formats)) if name is None else name
    found = task.formats[first]
    sides = (found.forget, found.retain, *([] if found.injected is None else [found.injected]))
    return sorted({answer for prompts in sides for answer in answer_texts(model, prompts)})
