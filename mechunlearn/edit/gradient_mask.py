"""For people with their own training loop: any optimizer moves only the masked entries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from mechunlearn.components import ComponentMask
from mechunlearn.model import Model, fingerprint
from mechunlearn.weights import Edit, Entries, Values, exclusively, read, select, write


@dataclass(eq=False)
class LocalizedTraining:
    """What `gradient_mask` yields: the parameters to optimize, and the change as a value."""

    mask: ComponentMask
    entries: list[Entries]
    fingerprint: str
    """Of the weights as they were."""
    trained: Values | None = None
    """The values on leaving the context."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that hold masked entries; give these to your optimizer."""
        return [e.slot.parameter for e in self.entries]

    def edit(self, **provenance: Any) -> Edit:
        """The trained values (inside the context: the present ones) as an `Edit` of the original model."""
        values = read(self.entries) if self.trained is None else self.trained
        return Edit(self.mask, values, self.fingerprint, {"editor": "gradient_mask", **provenance})


@contextmanager
def gradient_mask(model: Model, mask: ComponentMask) -> Iterator[LocalizedTraining]:
    """Inside, only the entries that `mask` covers can be trained; everything else stays bit-identical.

    Parameters without masked entries do not require a gradient. Of those with some, the gradient of
    the others is zeroed, and after every step of any torch optimizer they are put back: weight decay,
    momentum and stale optimizer state cannot move them.

    **On leaving, also by an exception, the model is as it was.** What was trained is in `.edit()`:

        with mu.edit.gradient_mask(model, mask) as training:
            optimizer = torch.optim.AdamW(training.parameters, lr=1e-4)
            ...your loop...
        edit = training.edit()
        edit.apply(model)  # to keep it

    Weights are trained in the model's own dtype: in bfloat16, steps smaller than about 1/256 of a weight
    round away (`finetune` keeps float32 masters). Make a new optimizer for each mask.

    Cost: a copy of the parameters that the mask covers in part, and of the masked entries.
    ValueError for an empty mask, one of another model, processed or quantised weights, or a model
    that is being trained already.
    """
    entries = select(model, mask)
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    training = LocalizedTraining(mask, entries, fingerprint(model))
    outside = [e.outside() for e in entries if not e.is_whole]
    original, kept = read(entries), read(outside)

    def put_back(optimizer: Optimizer, *arguments: Any) -> None:
        write(outside, kept)

    with exclusively(model):
        handles = [register_optimizer_step_post_hook(put_back)]
        try:
            for parameter, _, _ in flags:
                parameter.requires_grad_(False)
                parameter.grad = None
            for e in entries:
                e.slot.parameter.requires_grad_(True)
            handles += [e.slot.parameter.register_hook(_zeroing(e)) for e in outside]
            yield training
        finally:
            for handle in handles:
                handle.remove()
            training.trained = read(entries)
            write(entries, original)
            write(outside, kept)
            for parameter, requires_grad, gradient in flags:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient


def _zeroing(outside: Entries) -> Callable[[Tensor], Tensor]:
    def zero(gradient: Tensor) -> Tensor:
        masked = gradient.clone()
        outside.slot.view(masked)[outside.units.to(gradient.device)] = 0.0
        return masked

    return zero
