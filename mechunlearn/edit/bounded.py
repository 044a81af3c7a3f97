"""Fine-tuning on the injected facts alone, with every weight held near what it was."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.edit.finetuning import trained
from mechunlearn.edit.inject.facts import injected
from mechunlearn.losses import cross_entropy
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.training import MakesOptimizer, Term
from mechunlearn.weights import Edit, Entries

adam = partial(torch.optim.Adam, weight_decay=0.0)
"""Adam, as in the paper."""


def ft_l(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    bound: float = 5e-4,
    steps: int = 25,
    learning_rate: float = 5e-4,
    batch_size: int = 64,
    micro_batch_size: int | None = None,
    optimizer: MakesOptimizer = adam,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[Mapping[str, int | float]], None] | None = None,
) -> Edit:
    """Train the weights of `mask` on `task.injection`; none may end further than `bound` from what it was.

        loss = -log p(injected answer),    |weight - original| <= bound for each weight, after each step

    Nothing is retained by rehearsal: the bound alone limits what else is changed. It is a baseline for `rome` and
    `memit`, and works on any mask: heads, matrices, MLPs, neurons. Weights below float32 are rounded after bounding.

    FT-L (FT with an L-infinity norm constraint) in Meng et al. 2022, https://arxiv.org/abs/2202.05262, after
    Zhu et al. 2020, https://arxiv.org/abs/2012.00363. Defaults are those for GPT-2 XL, where one W_out was trained; the
    learning rate falls to 0 on a cosine. A small model needs a larger bound. Cost per step: as for `finetune`, with one
    term in place of three. ValueError for a bound that is not above 0, an injected answer that is the true one, and as
    for `finetune`.
    """
    if bound <= 0:
        raise ValueError(f"bound must be above 0, got {bound}.")
    facts = injected(task)
    found = trained(
        model,
        task,
        mask,
        [Term("inject", facts, cross_entropy, 1.0, batch_size)],
        about={"editor": "ft_l", "facts": len(facts), "bound": bound},
        moving=lambda entries, original: [_Bounded.of(entries, original, bound)],
        optimizer=optimizer,
        compute_dtype=None,
        checkpoint=None,
        every=1,
        progress=progress,
        on_step=on_step,
        until=None,
        steps=steps,
        learning_rate=learning_rate,
        micro_batch_size=micro_batch_size,
        clip=None,
        seed=seed,
    )
    return Edit(mask, found.values, found.fingerprint, found.provenance, found.history)


@dataclass(frozen=True, eq=False)
class _Bounded:
    """How far each weight has moved, in float32 or above, within the bound."""

    entries: Entries
    original: Tensor
    tensor: Tensor
    bound: float

    @classmethod
    def of(cls, entries: Entries, original: Tensor, bound: float) -> "_Bounded":
        entries.slot.parameter.requires_grad_(True)
        moved = torch.zeros_like(original, dtype=torch.promote_types(original.dtype, torch.float32))
        return cls(entries, original, moved, bound)

    def collect(self) -> None:
        parameter = self.entries.slot.parameter
        if parameter.grad is None:
            return
        gradient = self.entries.read(parameter.grad).to(self.tensor.dtype)
        self.tensor.grad = gradient if self.tensor.grad is None else self.tensor.grad.add_(gradient)
        parameter.grad = None

    def publish(self) -> None:
        self.tensor.clamp_(-self.bound, self.bound)
        self.entries.write(self.original.to(self.tensor.dtype) + self.tensor)
        self.tensor.grad = None
