"""A learned mask of the localized weights: which of them, set to zero, take the knowledge away?"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.edit.learned_mask import LearnedMask
from mechunlearn.edit.mask_numbers import Numbers, numbered
from mechunlearn.edit.terms import task_terms
from mechunlearn.edit.trained import trained
from mechunlearn.losses import Loss, cross_entropy
from mechunlearn.metrics import described
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.training import MakesOptimizer

sgd = partial(torch.optim.SGD, momentum=0.9)
"""The paper's optimizer of masks."""


def distance_from_one(value: Tensor) -> Tensor:
    """1 - m: what has moved costs. As in the paper's code, up to the coefficient."""
    return 1 - value


def mask_value(value: Tensor) -> Tensor:
    """m: what is kept costs. The paper's text ("sum of mask values")."""
    return value


def learn_weight_mask(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    by_unit: bool = False,
    inject: bool = False,
    forget_loss: Loss | None = None,
    retain_loss: Loss = cross_entropy,
    text_loss: Loss = cross_entropy,
    forget_coefficient: float = 0.3,
    retain_coefficient: float = 1.0,
    text_coefficient: float = 1.0,
    penalty: Callable[[Tensor], Tensor] = distance_from_one,
    penalty_coefficient: float = 1e-7,
    steps: int = 50,
    learning_rate: float = 1.0,
    batch_size: int = 64,
    text: Iterable[str | Sequence[int]] | None = None,
    text_length: int = 64,
    text_batch_size: int = 8,
    micro_batch_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
    clip: float | None = None,
    optimizer: MakesOptimizer = sgd,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[Mapping[str, int | float]], None] | None = None,
    until: Callable[[Mapping[str, int | float]], bool] | None = None,
    checkpoint: str | Path | None = None,
    every: int = 10,
) -> LearnedMask:
    """Learn a number m in [0, 1] for every weight of `mask`, which the model then uses as m * weight.

        loss =   forget_coefficient * forget_loss(task.forget)
               + retain_coefficient * retain_loss(task.retain)
               + text_coefficient   * text_loss(task.text)
               + penalty_coefficient * sum over weights of penalty(m)

    m starts at 1, moves by SGD, and is clamped to [0, 1] after each step; all weights are frozen. `penalty` is a
    function of m: `distance_from_one` (default, keeps what need not move; the paper's code has its mean over each
    matrix, with a coefficient that rises over the epochs), or `mask_value` (the paper's text: removes what need not
    stay).

    `by_unit`: one number for each head (on its W_O slice, what it adds to the residual stream) and each neuron (its
    row of W_out), in place of one for each weight; the mask's other matrices are left alone.

    The result says what was learned, and its `discretize(k=...)` and `edit_sizes([...])` make edits that set weights
    to zero. Defaults follow Guo et al. 2025 (https://arxiv.org/abs/2410.12949, section 3.2) but for the learning rate,
    which suits the shipped model; theirs is 1e-3.

    Cost: as `finetune`, with three numbers of extra memory (m, its gradient, the original) for each weight of the mask,
    one more with momentum; `learn_weight_mask_in_place` takes two. Text, checkpoints, models, seeds and errors: as for
    `finetune`.
    """
    terms = task_terms(
        model,
        task,
        inject=inject,
        losses=(forget_loss, retain_loss, text_loss),
        coefficients=(forget_coefficient, retain_coefficient, text_coefficient),
        batch_sizes=(batch_size, text_batch_size),
        text=text,
        text_length=text_length,
    )
    found = trained(
        model,
        task,
        mask,
        terms,
        about={
            "editor": "learn_weight_mask",
            "by_unit": by_unit,
            "penalty": [penalty_coefficient, described(penalty)],
            "text_length": None if text is None else text_length,
        },
        entries=numbered(model, mask, by_unit),
        moving=lambda entries, original: [Numbers.of(entries, original, by_unit)],
        taken=lambda numbers: numbers[0].tensor.detach(),
        penalty=partial(_penalised, penalty, penalty_coefficient),
        optimizer=optimizer,
        compute_dtype=compute_dtype,
        checkpoint=checkpoint,
        every=every,
        progress=progress,
        on_step=on_step,
        until=until,
        steps=steps,
        learning_rate=learning_rate,
        micro_batch_size=micro_batch_size,
        clip=clip,
        seed=seed,
    )
    return LearnedMask(mask, found.values, found.original, found.fingerprint, found.provenance, found.history)


def _penalised(penalty: Callable[[Tensor], Tensor], coefficient: float, numbers: Numbers) -> float:
    """Adds the penalty's gradient to the numbers'; gives its value."""
    value = numbers.tensor.detach().requires_grad_(True)
    cost = coefficient * penalty(value).sum()
    (gradient,) = torch.autograd.grad(cost, value)
    numbers.tensor.grad = gradient if numbers.tensor.grad is None else numbers.tensor.grad.add_(gradient)
    return float(cost.detach())
