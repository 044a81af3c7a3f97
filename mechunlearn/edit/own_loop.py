"""For people with their own training loop: gradients masked to a localization, or learnable weight masks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from mechunlearn.components import ComponentMask
from mechunlearn.edit.learned_masks import LearnedMask, Numbers, numbered
from mechunlearn.model import Model, fingerprint
from mechunlearn.model.guard import frozen
from mechunlearn.training import collecting
from mechunlearn.weights import Edit, Entries, Values, exclusively, read, select, write


@dataclass(eq=False)
class LocalizedTraining:
    """The parameters to optimize inside `gradient_mask`, and the change as a value."""

    mask: ComponentMask
    entries: list[Entries]
    fingerprint: str
    """That of the weights before the training."""
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

    Parameters without masked entries do not require a gradient. In the others, the gradient outside the mask is zeroed,
    and what lies there is put back after every step of any torch optimizer: weight decay, momentum and stale optimizer
    state cannot move it.

    **On leaving, also by an exception, the model is as it was.** `.edit()` gives the trained weights:

        with mu.edit.gradient_mask(model, mask) as training:
            optimizer = torch.optim.AdamW(training.parameters, lr=1e-4)
            ...your loop...
        edit = training.edit()
        edit.apply(model)  # to keep it

    On leaving, the rest of the model is compared with what it was; RuntimeError if your loop has moved any of it.
    Weights are trained in the model's own dtype: in bfloat16, steps smaller than about 1/256 of a weight
    round away (`finetune` keeps float32 masters). Make a new optimizer for each mask.

    Cost: a copy of the parameters that the mask covers in part, and of the masked entries.
    ValueError for an empty mask, one of another model, processed or quantised weights, or a model
    that is being trained already.
    """
    entries = select(model, mask)
    training = LocalizedTraining(mask, entries, fingerprint(model))
    outside = [e.outside() for e in entries if not e.is_whole]
    original, kept = read(entries), read(outside)
    # Of each parameter: the tensor that is its memory, a part of a larger one in GPT-2's fused QKV.
    homes = [(e.slot.parameter, e.slot.parameter.data) for e in entries]

    def put_back(optimizer: Optimizer, *arguments: Any) -> None:
        write(outside, kept)

    with exclusively(model), frozen(model), ExitStack() as stack:
        stack.callback(register_optimizer_step_post_hook(put_back).remove)
        try:
            for parameter, home in homes:
                # Fused optimizers take the memory after the first number for the parameter's own: here it is.
                parameter.data = home.contiguous()
                parameter.requires_grad_(True)
            for e in outside:
                stack.callback(e.slot.parameter.register_hook(partial(_zeroed, e)).remove)
            yield training
        finally:
            training.trained = read(entries)
            for parameter, home in homes:
                parameter.data = home  # also where the optimizer has given it another memory
            write(entries, original)
            write(outside, kept)
            left = fingerprint(model)
            if left != training.fingerprint:
                raise RuntimeError(
                    f"expected a training that moves nothing outside the mask, got a model with other weights than "
                    f"before (fingerprint {training.fingerprint} before, {left} now): load it again, and give the "
                    f"optimizer training.parameters alone."
                )


def _zeroed(outside: Entries, gradient: Tensor) -> Tensor:
    masked = gradient.clone()
    outside.slot.view(masked)[outside.units.to(gradient.device)] = 0.0
    return masked


@dataclass(eq=False)
class MaskTraining:
    """The numbers to optimize inside `weight_mask`, and the learned mask as a value."""

    mask: ComponentMask
    numbers: list[Numbers]
    original: Values
    fingerprint: str
    """That of the weights."""
    is_open: bool = True
    """False once the context has been left."""

    @property
    def parameters(self) -> list[Tensor]:
        """The numbers m, one tensor for each matrix; give these to your optimizer."""
        return [numbers.tensor for numbers in self.numbers]

    def clamp(self) -> None:
        """Put every number back into [0, 1] and show the model m * weight. A step of an optimizer does so by itself.

        ValueError outside the context, where the model has its own weights.
        """
        if not self.is_open:
            raise ValueError("expected to be inside weight_mask, got a call after it was left: use learned().edit().")
        for numbers in self.numbers:
            numbers.clamp()

    def learned(self, **provenance: Any) -> LearnedMask:
        """The numbers as they are now, as a value: discretize it, or make edits of several sizes."""
        values = {numbers.entries.label: numbers.tensor.detach().clone() for numbers in self.numbers}
        provenance = {"editor": "weight_mask", **provenance}
        return LearnedMask(self.mask, values, self.original, self.fingerprint, provenance)


@contextmanager
def weight_mask(model: Model, mask: ComponentMask, *, by_unit: bool = False) -> Iterator[MaskTraining]:
    """Inside, the model computes with m * weight for the weights of `mask`; only m, which starts at 1, can be trained.

    Any backward pass leaves the exact gradient of m, d loss / d m = d loss / d (m * weight) * weight, in `.grad` of
    `.parameters`; terms of your own in m add to it. After each step of any torch optimizer m is clamped to [0, 1]. All
    weights are frozen.

    **On leaving, also by an exception, the model is as it was.** `.learned()` gives the learned mask:

        with mu.edit.weight_mask(model, mask) as training:
            optimizer = torch.optim.SGD(training.parameters, lr=1e-3, momentum=0.9)
            ...your loop...
        edit = training.learned().discretize(k=1000)

    `by_unit`: one number for each head (on its W_O slice) and each neuron (on its row of W_out); the mask's other
    matrices are left alone. Numbers and their gradients are float32 or finer, whatever the model is.

    Use `loss.backward()`: m is not in the graph, and `torch.autograd.grad(loss, training.parameters)` raises. If you
    change m in another way than by an optimizer's step, or the optimizer computes the loss inside its step
    (L-BFGS), call `.clamp()` before the model runs.

    Cost: three numbers for each weight of the mask (m, its gradient, the original), and what the optimizer keeps.
    ValueError for an empty mask, one of another model, one without W_O and W_out by unit, processed or quantised
    weights, or a model that is being trained already.
    """
    entries = numbered(model, mask, by_unit)
    original = read(select(model, mask))
    training = MaskTraining(mask, [], original, fingerprint(model))
    with exclusively(model), frozen(model), ExitStack() as stack:
        try:
            training.numbers = [Numbers.of(e, original[e.label], by_unit) for e in entries]
            for numbers in training.numbers:
                numbers.tensor.requires_grad_(True)
            stack.enter_context(collecting(training.numbers))
            stack.callback(register_optimizer_step_post_hook(lambda *_: training.clamp()).remove)
            yield training
        finally:
            training.is_open = False
            write(entries, original)
