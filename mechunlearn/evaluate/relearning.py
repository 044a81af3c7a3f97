"""What relearning attacks share: what they train on, and when they are measured."""

import random
import re
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.evaluate.halves import check_apart
from mechunlearn.losses import cross_entropy
from mechunlearn.model import Model
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task
from mechunlearn.tasks.text import as_prompts
from mechunlearn.training import Term


def relearning_terms(
    model: Model,
    task: Task,
    trained: Prompts | None,
    tested: Prompts,
    *,
    coefficients: tuple[float, float, float],
    batch_sizes: tuple[int, int, int],
    text: Int[Tensor, "row pos"] | None = None,
) -> list[Term]:
    """Cross-entropy on what is relearned, on retained facts and on text (default: the task's), if not times 0.

    None of them is about a tested fact: ValueError if a prompt is; rows of text that name one are left out.
    """
    facts = {"relearn": trained, "retain": task.retain}
    terms = []
    for (name, prompts), coefficient, size in zip(facts.items(), coefficients[:2], batch_sizes[:2], strict=True):
        if prompts is not None and coefficient:
            check_apart(prompts, tested)
            terms.append(Term(name, prompts, cross_entropy, coefficient, size))
    if coefficients[2]:
        rows = as_prompts(unnamed(model, task.text if text is None else text, tested))
        terms.append(Term("text", rows, cross_entropy, coefficients[2], batch_sizes[2]))
    if not terms:
        raise ValueError("expected an attack that trains on something, got coefficients of 0: raise one of them.")
    return terms


def unnamed(model: Model, text: Int[Tensor, "row pos"], tested: Prompts) -> Int[Tensor, "kept pos"]:
    """The rows of text that name none of the tested facts; ValueError if that leaves none."""
    if model.tokenizer is None:
        raise ValueError(
            "expected a model with a tokenizer, to leave out text that names tested facts, got none: set "
            "model.tokenizer, or attack without text."
        )
    names = "|".join(re.escape(name.strip()) for name in set(tested.names))
    found = re.compile(rf"(?<!\w)(?:{names})(?!\w)")
    kept = [row for row, words in enumerate(model.tokenizer.batch_decode(text)) if not found.search(words)]
    if not kept:
        raise ValueError(
            f"expected text that does not name the tested facts, got {len(text)} rows that all do: take other text."
        )
    return text[kept]


def measured_at(steps: int, at: Sequence[int] | None) -> list[int]:
    """0 and the given steps; by default 1, 2, 4, ... and the last."""
    if steps < 1:
        raise ValueError(f"expected an attack of one step or more, got {steps}.")
    if at is None:
        at = [*(2**power for power in range(steps.bit_length()) if 2**power < steps), steps]
    wrong = [step for step in at if not 0 <= step <= steps]
    if wrong:
        raise ValueError(f"expected to measure after 0..{steps} steps (the length of the attack), got {wrong[0]}.")
    return sorted({0, *at})


def check_rates(learning_rates: Sequence[float]) -> Sequence[float]:
    """The learning rates; ValueError unless there are some, all positive."""
    if not learning_rates or min(learning_rates) <= 0:
        raise ValueError(f"expected one or more positive learning rates, got {tuple(learning_rates)}.")
    return learning_rates


def some_of(prompts: Prompts, count: int | None, *, seed: int) -> Prompts:
    """This many of them (default: all), by seed: those of a smaller number are among those of a larger one."""
    if count is None:
        return prompts
    if not 0 < count <= len(prompts):
        raise ValueError(f"expected 1..{len(prompts)} examples (facts that the attack may see), got {count}.")
    return prompts.rows(torch.tensor(random.Random(seed).sample(range(len(prompts)), len(prompts))[:count]))
