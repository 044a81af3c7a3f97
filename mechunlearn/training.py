"""The training loop that editors (and relearning attacks) share: only the given entries move."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from mechunlearn.losses import Loss
from mechunlearn.metrics import name_of
from mechunlearn.model import Model, device_of, residual_before, running_from
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.weights import Entries

adamw = partial(torch.optim.AdamW, weight_decay=0.0)
"""AdamW without weight decay, which would pull every localized weight to zero whatever the data say."""

Row = dict[str, int | float]


MakesOptimizer: TypeAlias = Callable[..., Optimizer]
"""Called as `optimizer(parameters, lr=learning_rate)`; a torch optimizer class is one."""


@dataclass(frozen=True)
class Term:
    """One term of the loss: coefficient * mean over the answer tokens of a batch of `prompts`.

    Where there are fewer prompts than `batch_size`, each batch is all of them, once.
    """

    name: str
    prompts: Prompts
    loss: Loss
    coefficient: float
    batch_size: int


@runtime_checkable
class Moving(Protocol):
    """What the optimizer moves for some entries."""

    @property
    def entries(self) -> Entries: ...

    @property
    def tensor(self) -> Tensor: ...

    def collect(self) -> None:
        """Add what one micro-batch left in the parameter's gradient to `tensor.grad`, and clear it."""

    def publish(self) -> None:
        """Show the model what the optimizer made of `tensor`, and clear its gradient."""


def fit(
    model: Model,
    entries: Sequence[Entries],
    terms: Sequence[Term],
    *,
    moving: Sequence[Moving] | None = None,
    penalty: Callable[[], float] | None = None,
    steps: int,
    learning_rate: float,
    optimizer: MakesOptimizer = adamw,
    clip: float | None = 1.0,
    micro_batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[Mapping[str, int | float]], None] | None = None,
) -> list[Row]:
    """Train the entries in place by the sum of the terms; one row of history per step.

    Cosine schedule from `learning_rate` to 0, one scheduler step per optimizer step; gradients are
    clipped at norm `clip`. Each batch goes through in micro-batches and is normalised by its own
    number of tokens, so their size changes memory and speed, not the result. Every prompt is used
    once per epoch, in an order that depends on `seed` and the term's name.

    What must be computed: no gradient or optimizer state for frozen weights, no graph below the lowest
    trained layer, whose input is computed once per prompt; logits only at the answer tokens.
    Weights below float32 have float32 masters. `moving` is what the optimizer moves instead of the weights
    themselves; `penalty`, called after the terms, adds its gradient to them and gives its value.
    Call it inside `differentiable(model)`.
    Raises FloatingPointError, naming the step, as soon as a loss or a gradient is not finite.
    """
    for name, value in (("steps", steps), ("micro_batch_size", micro_batch_size or 1)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}.")
    masters = [_Master.of(e) for e in entries] if moving is None else list(moving)
    parameters = [master.tensor for master in masters]
    steering = optimizer(parameters, lr=learning_rate)
    lowest = min(e.slot.layer for e in entries)
    sources = [_Source(model, term, lowest, seed) for term in terms if term.coefficient]
    history: list[Row] = []
    for step in tqdm(range(steps), desc="finetune", disable=not progress, leave=False):
        rate = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in steering.param_groups:
            group["lr"] = rate
        row = {source.term.name: source.backward(masters, micro_batch_size, step) for source in sources}
        if penalty is not None:
            row["penalty"] = penalty()
        norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"expected a finite gradient, got norm {norm} at step {step}: the weights were restored; lower the "
                f"learning rate, or compute in bfloat16 or float32 if this is float16."
            )
        row["gradient_norm"] = norm
        steering.step()
        for master in masters:
            master.publish()
        history.append({"step": step, **row, "learning_rate": rate})
        if on_step is not None:
            on_step(history[-1])
    return history


@dataclass(frozen=True, eq=False)
class _Master:
    """What the optimizer moves for some entries: the parameter itself, or a float32 copy of them."""

    entries: Entries
    tensor: Tensor

    @classmethod
    def of(cls, entries: Entries) -> "_Master":
        parameter = entries.slot.parameter.requires_grad_(True)
        if entries.is_whole and torch.finfo(parameter.dtype).bits >= 32:
            return cls(entries, parameter)
        values = entries.read(parameter.detach())
        return cls(entries, values.to(torch.promote_types(values.dtype, torch.float32)))

    @property
    def is_copy(self) -> bool:
        return self.tensor is not self.entries.slot.parameter

    def collect(self) -> None:
        """Add the parameter's gradient (of one micro-batch) to the master's, in its precision."""
        parameter = self.entries.slot.parameter
        if not self.is_copy or parameter.grad is None:
            return
        gradient = self.entries.read(parameter.grad).to(self.tensor.dtype)
        self.tensor.grad = gradient if self.tensor.grad is None else self.tensor.grad.add_(gradient)
        parameter.grad = None

    def publish(self) -> None:
        """Show the model the new values, and forget the gradient."""
        if self.is_copy:
            self.entries.write(self.tensor)
        self.tensor.grad = None


@dataclass(eq=False)
class _Source:
    """Batches of one term, and the residual stream below the lowest trained layer, once per prompt."""

    model: Model
    term: Term
    lowest: int
    seed: int
    order: Iterator[Tensor] = field(init=False)
    prompts: Prompts = field(init=False)
    stored: dict[int, Float[Tensor, "pos d_model"]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.prompts = self.term.prompts.to(device_of(self.model))
        if self.term.batch_size < 1:
            raise ValueError(f"the batch size of {self.term.name} must be 1 or more, got {self.term.batch_size}.")
        digest = hashlib.sha256(f"{self.seed} {self.term.name}".encode()).digest()
        size = min(self.term.batch_size, len(self.prompts))
        self.order = _shuffled(len(self.prompts), size, int.from_bytes(digest[:6], "big"))

    def backward(self, masters: Sequence[Moving], micro_batch_size: int | None, step: int) -> float:
        """Gradient of the term on its next batch; gives its value without the coefficient, in nats per token."""
        rows = next(self.order)
        total = int(self.prompts.answer_mask[rows].sum())
        value = 0.0
        for part in rows.split(micro_batch_size or len(rows)):
            loss = self._loss(part) / total
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(
                    f"expected a finite loss, got {loss.item()} from {self.term.name} ({name_of(self.term.loss)}) "
                    f"at step {step}: the weights were restored; lower the learning rate."
                )
            (self.term.coefficient * loss).backward()
            value += loss.item()
            for master in masters:
                master.collect()
        return value

    def _loss(self, rows: Tensor) -> Float[Tensor, ""]:
        prompts = self.prompts.rows(rows) if self.lowest else self.prompts[rows]
        start = running_from(self.model, self.lowest, self._residual(rows)) if self.lowest else nullcontext()
        with start:
            logits = prompts.logits(self.model)
        real = prompts.answer_mask
        values = self.term.loss(logits[real], prompts.answers[real])
        if values.shape != prompts.answers[real].shape:
            raise ValueError(
                f"expected {name_of(self.term.loss)} to give one value per token, shape ({int(real.sum())},), got "
                f"{tuple(values.shape)}: do not average inside the loss (reduction='none')."
            )
        return values.sum()

    def _residual(self, rows: Tensor) -> Float[Tensor, "batch pos d_model"]:
        missing = [row for row in rows.tolist() if row not in self.stored]
        if missing:
            prompts = self.prompts.rows(torch.tensor(missing))
            found = residual_before(self.model, self.lowest, prompts.tokens, prompts.attention_mask)
            self.stored |= dict(zip(missing, found, strict=True))
        return torch.stack([self.stored[row] for row in rows.tolist()])


def _shuffled(n: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Row numbers, forever: every row once per epoch, each epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(n, generator=generator)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
