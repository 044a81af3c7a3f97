"""Low-rank updates of the localized weights, as an edit."""

import hashlib
from dataclasses import dataclass
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.edit.finetuning import task_run
from mechunlearn.model import Model
from mechunlearn.options import with_options
from mechunlearn.tasks.task import Task
from mechunlearn.training.movers import collect_gradient
from mechunlearn.training.options import TrainingOptions
from mechunlearn.weights import Edit, Entries


@with_options(learning_rate=1e-2)
def lora(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    **options: Unpack[TrainingOptions],
) -> Edit:
    """`finetune` with an update of low rank for each matrix of `mask`, merged: the model is left as it was.

        weight = original + alpha / rank * left @ right

    - `left` has a row for each covered row of the matrix (of `Slot.view`: a neuron, or one of a head's `d_head`),
      `right` a column for each direction of the residual stream. So the update of one head, or of some neurons, has
      rank `rank` by itself; where fewer than `rank` rows are covered, as for a single neuron, it is not restricted.
    - The factor on the matrix's input starts as random numbers of variance 1 / (its inputs), the other at 0: training
      starts from the original model. There is no dropout.
    - `alpha / rank` scales every update, so the learning rate belongs with it. The default suits the shipped model.

    Loss, errors and cost are those of `finetune`. It saves memory, not time: the gradient and the optimizer's state
    have `rank` numbers for each row and each column. Hu et al. 2021, https://arxiv.org/abs/2106.09685. ValueError for a
    rank below 1.
    """
    if rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {rank}.")
    return task_run(
        model,
        task,
        mask,
        options,
        about={"editor": "lora", "rank": rank, "alpha": alpha},
        moving=lambda entries, original: [_Factors.of(entries, original, rank, alpha / rank, options["seed"])],
    ).edit


@dataclass(frozen=True, eq=False)
class _Factors:
    """Both factors of the update of some entries, one after the other in one tensor."""

    entries: Entries
    original: Tensor
    scale: float
    tensor: Float[Tensor, "number"]

    @classmethod
    def of(cls, entries: Entries, original: Tensor, rank: int, scale: float, seed: int) -> "_Factors":
        entries.slot.parameter.requires_grad_(True)
        rows, d_model = original[..., 0].numel(), original.shape[-1]
        generator = torch.Generator().manual_seed(_seed_of(entries, seed))
        left, right = torch.zeros(rows, rank), torch.zeros(rank, d_model)
        # W_O and W_out have their inputs in rows, the others in columns: the factor on that side is random. The other
        # is 0, so that their product is 0 and yet has a gradient.
        is_left = entries.slot.matrix in ("W_O", "W_out")
        random, inputs = (left, rows) if is_left else (right, d_model)
        random.normal_(generator=generator).div_(inputs**0.5)
        precise = torch.promote_types(original.dtype, torch.float32)
        return cls(entries, original, scale, torch.cat([left.flatten(), right.flatten()]).to(original.device, precise))

    def collect(self) -> None:
        collect_gradient(self, self._of_factors)

    def _of_factors(self, gradient: Float[Tensor, "unit width d_model"]) -> Float[Tensor, "number"]:
        """From the weights' gradient G: scale * G @ right^T for left, scale * left^T @ G for right."""
        left, right = self._factors()
        by_row = gradient.flatten(0, 1)
        parts = [by_row @ right.T, left.T @ by_row]
        return torch.cat([part.flatten() for part in parts]).mul_(self.scale)

    def publish(self) -> None:
        """Merge: the model computes with the original plus the scaled product, and knows of no factors."""
        left, right = self._factors()
        update = (left @ right).mul_(self.scale).view_as(self.original)
        self.entries.write(update.add_(self.original))
        self.tensor.grad = None

    def _factors(self) -> tuple[Float[Tensor, "row rank"], Float[Tensor, "rank d_model"]]:
        rows, d_model = self.original[..., 0].numel(), self.original.shape[-1]
        rank = len(self.tensor) // (rows + d_model)
        left, right = self.tensor.detach().split([rows * rank, rank * d_model])
        return left.view(rows, rank), right.view(rank, d_model)


def _seed_of(entries: Entries, seed: int) -> int:
    """A seed for each matrix, which is the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed} lora {entries.label}".encode()).digest()[:6], "big")
