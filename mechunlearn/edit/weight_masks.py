"""Learned weight masks: which localized weights, set to zero, take the knowledge away?"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.edit.finetuning import task_run
from mechunlearn.edit.learned_masks import LearnedMask, Numbers, numbered
from mechunlearn.identity import described
from mechunlearn.model import Model
from mechunlearn.options import with_options
from mechunlearn.tasks.task import Task
from mechunlearn.training.movers import add_gradient
from mechunlearn.training.options import TrainingOptions
from mechunlearn.weights import Entries

sgd = partial(torch.optim.SGD, momentum=0.9)
"""The paper's optimizer of masks."""


def distance_from_one(value: Tensor) -> Tensor:
    """1 - m: what has moved costs. As in the paper's code, up to the coefficient."""
    return 1 - value


def mask_value(value: Tensor) -> Tensor:
    """m: what is kept costs. The paper's text ("sum of mask values")."""
    return value


@with_options(forget_coefficient=0.3, learning_rate=1.0, clip=None, optimizer=sgd)
def learn_weight_mask(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    by_unit: bool = False,
    penalty: Callable[[Tensor], Tensor] = distance_from_one,
    penalty_coefficient: float = 1e-7,
    **options: Unpack[TrainingOptions],
) -> LearnedMask:
    """Learn a number m in [0, 1] for every weight of `mask`, which the model then uses as m * weight.

        loss =   forget_coefficient * forget_loss(task.forget)
               + retain_coefficient * retain_loss(task.retain)
               + text_coefficient   * text_loss(task.text)
               + penalty_coefficient * sum over weights of penalty(m)

    m starts at 1, moves by SGD, and is clamped to [0, 1] after each step; all weights are frozen. The result's
    `discretize(k=...)` and `edit_sizes([...])` make edits that set weights to zero.

    - `penalty`: `distance_from_one` keeps weights that need not move (the paper's code has its mean over each matrix,
      with a coefficient that rises over the epochs); `mask_value` (the paper's text) removes those that need not stay.
    - `by_unit`: one number for each head (on its W_O slice, which writes to the residual stream) and each neuron (its
      row of W_out), in place of one for each weight. The mask's other matrices are left alone.

    Defaults follow Guo et al. 2025 (https://arxiv.org/abs/2410.12949, section 3.2) but for the learning rate, which
    suits the shipped model; theirs is 1e-3.

    Cost: as `finetune`, with three numbers of extra memory (m, its gradient, the original) for each weight of the mask,
    one more with momentum; `learn_weight_mask_in_place` takes two. Errors: as for `finetune`.
    """
    penalised = [penalty_coefficient, described(penalty)]
    run = task_run(
        model,
        task,
        mask,
        options,
        about={"editor": "learn_weight_mask", "by_unit": by_unit, "penalty": penalised},
        entries=numbered(model, mask, by_unit),
        moving=lambda entries, original: [Numbers.of(entries, original, by_unit)],
        result=lambda numbers: numbers.tensor.detach(),
        penalty=lambda numbers: _penalise(numbers.tensor, penalty, penalty_coefficient),
    )
    return LearnedMask(mask, run.values, run.original, run.fingerprint, run.provenance, run.history)


def _penalise(numbers: Tensor, penalty: Callable[[Tensor], Tensor], coefficient: float) -> float:
    """The value of the penalty, whose gradient is added to that of the numbers."""
    leaf = numbers.detach().requires_grad_(True)
    cost = coefficient * penalty(leaf).sum()
    add_gradient(numbers, torch.autograd.grad(cost, leaf)[0])
    return float(cost.detach())


Penalty = Callable[[Tensor, Tensor], Tensor]
"""(weights, original weights) -> one cost for each."""

_AT_ONCE = 1 << 16
"""The number of weights whose penalty is computed together."""

_RUNS = 64
"""With more runs of units than this, one by one takes too long: their weights are gathered for each step instead. So
they are where a run has gaps in memory, which not every optimizer leaves alone (`Master`)."""


def distance_from_original(weight: Tensor, original: Tensor) -> Tensor:
    """|w0 - w|: what has moved costs."""
    return (original - weight).abs()


def magnitude(weight: Tensor, original: Tensor) -> Tensor:
    """|w|: what is kept costs. The paper's code for this variant."""
    return weight.abs()


@with_options(forget_coefficient=0.3, learning_rate=1.0, clip=None, optimizer=torch.optim.SGD)
def learn_weight_mask_in_place(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    penalty: Penalty = distance_from_original,
    penalty_coefficient: float = 1e-7,
    **options: Unpack[TrainingOptions],
) -> LearnedMask:
    """`learn_weight_mask` in the least memory: the weights w are trained, each clamped between 0 and its original w0.

    The result is also a mask m = w / w0 in [0, 1] (1 where w0 is 0), but another one: a step moves w by d loss / d w,
    and so m by d loss / d w / w0, where `learn_weight_mask` moves m by d loss / d w * w0. Small weights are the first
    to go here, large ones there. Learning rates do not carry over; the default suits the shipped model.

    The loss is that of `learn_weight_mask` with the sum of `penalty(w, w0)`: `distance_from_original` keeps weights
    that need not move, `magnitude` (the paper's code) removes those that need not stay. The latest code of Guo et al.
    2025, https://arxiv.org/abs/2410.12949, learns masks in this way.

    Weights move in the model's own dtype: in bfloat16, steps smaller than about 1/256 of a weight round away.

    Cost and errors: as for `finetune`. Extra memory: the original and the gradient of each weight of the mask, and one
    matrix during a step. The default optimizer, SGD without momentum, keeps nothing; another one may.
    """
    run = task_run(
        model,
        task,
        mask,
        options,
        about={"editor": "learn_weight_mask_in_place", "penalty": [penalty_coefficient, described(penalty)]},
        moving=_shrinking,
        result=_Shrinking.numbers,
        penalty=lambda part: part.penalise(penalty, penalty_coefficient),
    )
    return LearnedMask(mask, run.values, run.original, run.fingerprint, run.provenance, run.history)


def _shrinking(entries: Entries, original: Tensor) -> "list[_Shrinking]":
    """A mover for each run of neighbouring units; where there are many runs, one mover that gathers them for a step."""
    entries.slot.parameter.requires_grad_(True)
    places = entries.units.nonzero()[:, 0]
    # A run begins at the first unit, and wherever the number of a unit is more than one above the last.
    starts = [0, *((places.diff() > 1).nonzero()[:, 0] + 1).tolist(), len(places)]
    if len(starts) > _RUNS:
        return [_Gathered(entries, places, original, True)]
    # Units from a to b - 1 of the mask are a slice of the parameter, so that the optimizer can move a view of it.
    runs = [
        _Shrinking(entries, slice(int(places[a]), int(places[b - 1]) + 1), original[a:b], b == len(places))
        for a, b in pairwise(starts)
    ]
    return runs if all(_is_dense(run.tensor) for run in runs) else [_Gathered(entries, places, original, True)]


def _is_dense(tensor: Tensor) -> bool:
    """Whether the numbers lie side by side in memory, in whatever order of the axes."""
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).is_contiguous()


@dataclass(eq=False)
class _Shrinking:
    """Neighbouring units, trained where they are: `tensor` is a view of the parameter."""

    entries: Entries
    units: slice | Tensor
    original: Tensor
    is_last: bool
    """Whether it is the last of the movers of its parameter."""
    tensor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.tensor = self._own(self.entries.slot.parameter.detach())

    def collect(self) -> None:
        parameter = self.entries.slot.parameter
        if parameter.grad is None:
            return
        # The parameter's gradient is freed below, and a view would keep all of it: unless all of it is wanted, copy.
        gradient = self._own(parameter.grad)
        if self.tensor.grad is None:
            is_alike = self.entries.is_whole and gradient.stride() == self.tensor.stride()
            self.tensor.grad = gradient if is_alike else torch.empty_like(self.tensor).copy_(gradient)
        else:
            self.tensor.grad.add_(gradient)
        if self.is_last:
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        self.tensor.grad = None  # first: the bounds below take its place
        # Between 0 and w0: a negative w0 is the lower bound and 0 the upper one, a positive w0 the other way round.
        self.tensor.clamp_(min=self.original.clamp(max=0.0))
        self.tensor.clamp_(max=self.original.clamp(min=0.0))
        parameter = self.entries.slot.parameter.detach()
        if self._own(parameter).data_ptr() != self.tensor.data_ptr():  # a copy; bitsandbytes makes one, too
            self.entries.slot.view(parameter)[self.units] = self.tensor

    def numbers(self) -> Tensor:
        """m = w / w0, and 1 where w0 is 0."""
        precise = torch.promote_types(self.original.dtype, torch.float32)
        weights = self._own(self.entries.slot.parameter.detach())
        return (weights.to(precise) / self.original.to(precise)).masked_fill_(self.original == 0, 1.0)

    def penalise(self, penalty: Penalty, coefficient: float) -> float:
        """The value of the penalty; its gradient is added a few units at a time, which takes no second copy."""
        if self.tensor.grad is None:
            self.tensor.grad = torch.zeros_like(self.tensor)
        rows = max(1, _AT_ONCE // self.original[0].numel())
        weights = self._own(self.entries.slot.parameter.detach())
        parts = zip(*(t.split(operator.index(rows)) for t in (weights, self.tensor.grad, self.original)), strict=True)
        total = 0.0
        for weight, gradient, original in parts:
            leaf = weight.detach().requires_grad_(True)
            cost = coefficient * penalty(leaf, original).sum()
            gradient.add_(torch.autograd.grad(cost, leaf)[0])
            total += float(cost.detach())
        return total

    def _own(self, tensor: Tensor) -> Tensor:
        """The units of a tensor shaped like the parameter: a view of it if they lie together."""
        return self.entries.slot.view(tensor)[self.units]


class _Gathered(_Shrinking):
    """Units in many places: `tensor` is a copy, which has memory only during a step."""

    def __post_init__(self) -> None:
        self.tensor = torch.empty_like(self.original)
        # Without memory the tensor keeps its shape, and it stays the key to the optimizer's state.
        self.tensor.untyped_storage().resize_(0)

    def fetch(self) -> None:
        """Give `tensor` memory again and copy the present weights into it, just before the optimizer's step."""
        self.tensor.untyped_storage().resize_(self.original.numel() * self.original.element_size())
        self.tensor.copy_(self._own(self.entries.slot.parameter.detach()))

    def publish(self) -> None:
        """Put the weights back into their places, then give the memory up."""
        super().publish()
        self.tensor.untyped_storage().resize_(0)
