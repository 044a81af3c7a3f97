"""Low-rank updates of the localized weights, as an edit."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.edit.finetuning import task_terms, trained, weights
from mechunlearn.losses import Loss, cross_entropy
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.training import MakesOptimizer, adamw
from mechunlearn.weights import Edit, Entries


def lora(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    inject: bool = False,
    forget_loss: Loss | None = None,
    retain_loss: Loss = cross_entropy,
    text_loss: Loss = cross_entropy,
    forget_coefficient: float = 1.0,
    retain_coefficient: float = 1.0,
    text_coefficient: float = 1.0,
    steps: int = 50,
    learning_rate: float = 1e-2,
    batch_size: int = 64,
    text: Iterable[str | Sequence[int]] | None = None,
    text_length: int = 64,
    text_batch_size: int = 8,
    micro_batch_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
    clip: float | None = 1.0,
    optimizer: MakesOptimizer = adamw,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[Mapping[str, int | float]], None] | None = None,
    until: Callable[[Mapping[str, int | float]], bool] | None = None,
    checkpoint: str | Path | None = None,
    every: int = 10,
) -> Edit:
    """`finetune` with an update of low rank for each matrix of `mask`, merged: the model is left as it was.

        weight = original + alpha / rank * left @ right

    `left` has a row for each covered row of the matrix (of `Slot.view`: a neuron, or one of a head's `d_head`), `right`
    a column for each direction of the residual stream. So the update of one head, or of some neurons, has rank `rank`
    by itself and nothing else moves. Where fewer than `rank` rows are covered, as for a single neuron, the update is
    not restricted. The factor on the matrix's input starts as random numbers of variance 1 / (its inputs), the other
    at 0, so that training starts from the original model. No dropout.

    Everything else, the loss, its defaults, text, checkpoints, seeds and errors, is as for `finetune`. The default
    learning rate suits the shipped model; it belongs with `alpha / rank`, which scales every update.

    Cost: as `finetune`, weight gradients included, which are projected on the factors one matrix after the other. What
    is saved is memory: the gradient and the optimizer's state have `rank` numbers for each row and each column. Hu et
    al. 2021, https://arxiv.org/abs/2106.09685. ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {rank}.")
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
        about={"editor": "lora", "rank": rank, "alpha": alpha, "text_length": None if text is None else text_length},
        moving=lambda entries, original: [_Factors.of(entries, original, rank, alpha / rank, seed)],
        taken=weights,
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
    return Edit(mask, found.values, found.fingerprint, found.provenance, found.history)


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
        given = left if entries.slot.matrix in ("W_O", "W_out") else right  # what reads the matrix's input
        inputs = rows if given is left else d_model
        given.normal_(generator=generator).div_(inputs**0.5)
        precise = torch.promote_types(original.dtype, torch.float32)
        return cls(entries, original, scale, torch.cat([left.flatten(), right.flatten()]).to(original.device, precise))

    def collect(self) -> None:
        """From the weights' gradient G: scale * G @ right^T for left, scale * left^T @ G for right."""
        parameter = self.entries.slot.parameter
        if parameter.grad is None:
            return
        left, right = self._factors()
        whole = self.entries.read(parameter.grad).flatten(0, 1).to(left.dtype)
        parts = [whole @ right.T, left.T @ whole]
        gradient = torch.cat([part.flatten() for part in parts]).mul_(self.scale)
        self.tensor.grad = gradient if self.tensor.grad is None else self.tensor.grad.add_(gradient)
        parameter.grad = None

    def publish(self) -> None:
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
    """Another one for each matrix, the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed} lora {entries.label}".encode()).digest()[:6], "big")
