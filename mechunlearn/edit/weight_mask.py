"""A learned mask of the localized weights: which of them, set to zero, take the knowledge away?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.edit.learned_mask import LearnedMask
from mechunlearn.edit.terms import described, task_terms
from mechunlearn.losses import Loss, cross_entropy
from mechunlearn.metrics import name_of
from mechunlearn.model import Model, differentiable, fingerprint
from mechunlearn.tasks.task import Task
from mechunlearn.training import MakesOptimizer, fit
from mechunlearn.weights import Entries, exclusively, read, select, write

sgd = partial(torch.optim.SGD, momentum=0.9)
"""The paper's optimizer of masks."""


def distance_from_one(value: Tensor) -> Tensor:
    """1 - m: what has moved costs. The paper's code."""
    return 1 - value


def size(value: Tensor) -> Tensor:
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
    text_batch_size: int = 8,
    micro_batch_size: int | None = None,
    clip: float | None = None,
    optimizer: MakesOptimizer = sgd,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[Mapping[str, int | float]], None] | None = None,
) -> LearnedMask:
    """Learn a number m in [0, 1] for every weight of `mask`, which the model then uses as m * weight.

        loss =   forget_coefficient * forget_loss(task.forget)
               + retain_coefficient * retain_loss(task.retain)
               + text_coefficient   * text_loss(task.text)
               + penalty_coefficient * sum over weights of penalty(m)

    m starts at 1, moves by SGD, and is clamped to [0, 1] after each step; all weights are frozen. `penalty` is a
    function of m: `distance_from_one` (default, and the paper's code: keeps what need not move), or `size` (the
    paper's text: removes what need not stay).

    `by_unit`: one number for each head (on its W_O slice, what it adds to the residual stream) and each neuron (its
    row of W_out), in place of one for each weight; the mask's other matrices are left alone.

    The result says what was learned, and its `discretize(k=...)` and `edit_sizes([...])` make edits that set weights
    to zero. Defaults follow Guo et al. 2025 (https://arxiv.org/abs/2410.12949, section 3.2) but for the learning rate,
    which suits the shipped model; theirs is 1e-3.

    Cost: as `finetune`, with three numbers of extra memory (m, its gradient, the original) for each weight of the mask,
    two more with momentum. Models, seeds and errors: as for `finetune`.
    """
    entries = [e for e in select(model, mask) if not by_unit or e.slot.matrix in ("W_O", "W_out")]
    if not entries:
        raise ValueError(
            f"expected a mask with a W_O or a W_out for numbers by unit, got {mask!r}: use heads, MLPs or neurons."
        )
    original, found = read(entries), fingerprint(model)
    terms = task_terms(
        task,
        inject=inject,
        losses=(forget_loss, retain_loss, text_loss),
        coefficients=(forget_coefficient, retain_coefficient, text_coefficient),
        batch_sizes=(batch_size, text_batch_size),
    )
    settings = {"steps": steps, "learning_rate": learning_rate, "micro_batch_size": micro_batch_size}
    settings |= {"clip": clip, "seed": seed}
    try:
        with exclusively(model), differentiable(model):
            moving = [_Numbers.of(e, original[e.label], by_unit) for e in entries]
            costs = partial(_penalised, moving, penalty, penalty_coefficient)
            history = fit(
                model,
                entries,
                terms,
                moving=moving,
                penalty=costs,
                optimizer=optimizer,
                progress=progress,
                on_step=on_step,
                **settings,
            )
    finally:
        write(entries, original)
    provenance = {"editor": "learn_weight_mask", "task": task.name, "by_unit": by_unit, "terms": described(terms)}
    provenance |= {"penalty": [penalty_coefficient, name_of(penalty)], "optimizer": name_of(optimizer), **settings}
    numbers = {m.entries.label: m.tensor.detach() for m in moving}
    return LearnedMask(mask, numbers, read(select(model, mask)), found, provenance, tuple(history))


@dataclass(frozen=True, eq=False)
class _Numbers:
    """The numbers of some entries; what the model sees is their product with the original weights."""

    entries: Entries
    original: Tensor
    tensor: Tensor
    """[unit, width, d_model], or [unit, 1, 1] by unit."""

    @classmethod
    def of(cls, entries: Entries, original: Tensor, by_unit: bool) -> "_Numbers":
        entries.slot.parameter.requires_grad_(True)
        dtype = torch.promote_types(original.dtype, torch.float32)
        shape = (len(original), 1, 1) if by_unit else original.shape
        return cls(entries, original, torch.ones(shape, dtype=dtype, device=original.device))

    def collect(self) -> None:
        """d loss / d m = d loss / d (m * weight) * weight."""
        parameter = self.entries.slot.parameter
        if parameter.grad is None:
            return
        gradient = self.entries.read(parameter.grad).to(self.tensor.dtype).mul_(self.original)
        gradient = gradient.sum_to_size(self.tensor.shape)
        self.tensor.grad = gradient if self.tensor.grad is None else self.tensor.grad.add_(gradient)
        parameter.grad = None

    def publish(self) -> None:
        self.tensor.clamp_(0.0, 1.0)
        self.entries.write(self.tensor * self.original)
        self.tensor.grad = None


def _penalised(moving: list[_Numbers], penalty: Callable[[Tensor], Tensor], coefficient: float) -> float:
    """Adds the penalty's gradient to every number's; gives its value."""
    total = 0.0
    for numbers in moving:
        value = numbers.tensor.detach().requires_grad_(True)
        cost = coefficient * penalty(value).sum()
        (gradient,) = torch.autograd.grad(cost, value)
        numbers.tensor.grad = gradient if numbers.tensor.grad is None else numbers.tensor.grad.add_(gradient)
        total += float(cost.detach())
    return total
