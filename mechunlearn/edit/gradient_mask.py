"""For people with their own training loop: any optimizer moves only the masked entries."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from mechunlearn.components import ComponentMask
from mechunlearn.model import Model, fingerprint
from mechunlearn.weights import Edit, Entries, Values, captured, read, select, write


@dataclass(frozen=True, eq=False)
class LocalizedTraining:
    """What `gradient_mask` yields: the parameters to optimize, and the way back."""

    model: Model
    mask: ComponentMask
    entries: list[Entries]
    original: Values
    fingerprint: str

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that hold masked entries; give these to your optimizer."""
        return [e.slot.parameter for e in self.entries]

    def edit(self, **provenance: Any) -> Edit:
        """The present values of the masked entries as an `Edit` of the original model."""
        return captured(self.model, self.mask, self.fingerprint, {"editor": "gradient_mask", **provenance})

    def restore(self) -> None:
        """Put the original values back, bit for bit."""
        write(self.entries, self.original)


@contextmanager
def gradient_mask(model: Model, mask: ComponentMask) -> Iterator[LocalizedTraining]:
    """Inside, only the entries that `mask` covers can be trained; everything else stays bit-identical.

    Parameters without masked entries do not require a gradient. Of those with some, the gradient of
    the others is zeroed, and after every step of any torch optimizer they are put back: weight decay,
    momentum and stale optimizer state cannot move them. On leaving, `requires_grad` and stored
    gradients are as before; **what your optimizer did to the masked entries stays** (`.edit()` takes
    it as a value, `.restore()` undoes it).

    Weights are trained in the model's own dtype: in bfloat16, steps smaller than about 1/256 of a weight
    round away (`finetune` keeps float32 masters). Make a new optimizer for each mask.

    Cost: a copy of the parameters that the mask covers in part, and of the masked entries.
    ValueError for an empty mask, one of another model, processed or quantised weights.

        with mu.edit.gradient_mask(model, mask) as training:
            optimizer = torch.optim.AdamW(training.parameters, lr=1e-4)
            ...your loop...
            edit = training.edit()
        training.restore()
    """
    entries = select(model, mask)
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    training = LocalizedTraining(model, mask, entries, read(entries), fingerprint(model))
    outside = [e.outside() for e in entries if not e.is_whole]
    kept = read(outside)

    def put_back(optimizer: Optimizer, *arguments: Any) -> None:
        write(outside, kept)

    handles = [register_optimizer_step_post_hook(put_back)]
    try:
        for parameter, _, _ in flags:
            parameter.requires_grad_(False)
            parameter.grad = None
        for e in entries:
            e.slot.parameter.requires_grad_(True)
        for e in outside:
            handles.append(e.slot.parameter.register_hook(_zeroing(e)))
        yield training
    finally:
        for handle in handles:
            handle.remove()
        write(outside, kept)
        for parameter, requires_grad, gradient in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _zeroing(outside: Entries) -> Any:
    def zero(gradient: torch.Tensor) -> torch.Tensor:
        masked = gradient.clone()
        outside.slot.view(masked)[outside.units.to(gradient.device)] = 0.0
        return masked

    return zero
