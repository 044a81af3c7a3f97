"""Leaving a model as it was: contexts that restore its state, copies of its weights, and a fingerprint of them."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mechunlearn.model.classes import Model, device_of, is_bridge, unchecked_shape
from mechunlearn.model.matrices import slots


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Inside, no parameter has or requires a gradient; after, each is as it was."""
    with _flags(model) as parameters:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield


@contextmanager
def preserved(model: Model) -> Iterator[None]:
    """Inside, the model is in eval mode, nothing requires a gradient and none is stored; after, all is as before.

    This holds after an exception or an interrupt, too. The values of weights are not touched.
    """
    _check_surroundings(model)
    with frozen(model), _modes(model) as modules:
        for module in modules:
            module.training = False
        yield


@contextmanager
def differentiable(model: Model) -> Iterator[None]:
    """`preserved`, with gradients recorded even where a notebook has turned them off (but `torch.inference_mode`)."""
    if torch.is_inference_mode_enabled():
        raise ValueError("expected to be able to compute gradients, got torch.inference_mode: leave it for this call.")
    if any(getattr(module, "gradient_checkpointing", False) for module in _modules(model)):
        raise ValueError(
            "expected a model without gradient checkpointing, which is off in eval mode and would save nothing here: "
            "call gradient_checkpointing_disable() on the Hugging Face model, and use micro_batch_size to save memory."
        )
    with preserved(model), torch.enable_grad():
        yield


@contextmanager
def undisturbed(model: Model) -> Iterator[None]:
    """Inside, a function of the user may run; after, flags, gradients and modes are as before."""
    with _flags(model), _modes(model), torch.enable_grad():
        yield


def _check_surroundings(model: Model) -> None:
    """ValueError inside autocast, which changes numbers, and which no result would tell of."""
    kind = device_of(model).type
    if torch.is_autocast_enabled(kind):
        raise ValueError(
            f"expected to compute in the model's own dtype, got torch.autocast({kind!r}, "
            f"{torch.get_autocast_dtype(kind)}): leave it for this call; load the model in bfloat16, or pass "
            f"compute_dtype=torch.bfloat16 to an editor that trains."
        )


@contextmanager
def _flags(model: Model) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters; after, each requires a gradient, and has one, as before."""
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        yield [parameter for parameter, _, _ in flags]
    finally:
        for parameter, requires_grad, gradient in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


@contextmanager
def _modes(model: Model) -> Iterator[list[torch.nn.Module]]:
    """The modules; after, each is in training mode or not as before."""
    modes = [(module, module.training) for module in _modules(model)]
    try:
        yield [module for module, _ in modes]
    finally:
        for module, training in modes:
            module.training = training


def _modules(model: Model) -> list[torch.nn.Module]:
    """A bridge does not register every module of its Hugging Face model (GPT-2's embedding dropout is missing)."""
    inner = model.original_model.modules() if is_bridge(model) else ()
    return [*dict.fromkeys([*model.modules(), *inner])]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy of every parameter of a model, in the memory of the CPU, and the memory that each has."""

    weights: Mapping[str, Tensor]
    """Parameter name -> value."""
    memory: Mapping[str, Tensor]
    """Parameter name -> its own data, which other parameters may share: GPT-2's queries are part of a fused matrix."""

    @classmethod
    def of(cls, model: Model) -> "Snapshot":
        parameters = dict(model.named_parameters())
        copies = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
        return cls(copies, {name: p.data for name, p in parameters.items()})

    @torch.no_grad()
    def restore(self, model: Model) -> list[str]:
        """Put back the parameters that have changed since, and give their names. Cost: each weight is read once.

        RuntimeError if parameters have come or gone.
        """
        now = dict(model.named_parameters())
        if now.keys() != self.weights.keys():
            other = sorted(now.keys() ^ self.weights.keys())
            raise RuntimeError(
                f"expected a model with the parameters that it had before, got others ({', '.join(other[:3])}): they "
                f"cannot be put back; load the model again."
            )
        changed = [name for name, p in now.items() if not _same(p.detach().cpu(), self.weights[name])]
        for name, parameter in now.items():
            own = self.memory[name]
            if (parameter.data_ptr(), parameter.stride()) != (own.data_ptr(), own.stride()):
                parameter.data = own
            if not _same(parameter.detach().cpu(), self.weights[name]):
                parameter.copy_(self.weights[name])
        return changed


def _same(values: Tensor, saved: Tensor) -> bool:
    """Whether all numbers are equal, where NaN equals NaN."""
    if (values.shape, values.dtype) != (saved.shape, saved.dtype):
        return False
    return torch.equal(values, saved) or bool(((values == saved) | (values.isnan() & saved.isnan())).all())


def fingerprint(model: Model) -> str:
    """16 hex digits that change when any bit of an attention or MLP weight does (not cryptographic).

    **It does not see embeddings, norms and biases**: no edit changes them, and the two classes store them differently.
    It is equal for a `TransformerBridge` and a `HookedTransformer` with the same weights in the same dtype.
    Every weight is read once, on its own device.
    """
    digest = hashlib.sha256(repr(unchecked_shape(model)).encode())
    for (layer, matrix), slot in slots(model).items():
        bits = slot.weight.contiguous().flatten()
        digest.update(f"{layer} {matrix} {bits.dtype} {_checksum(bits)};".encode())
    return digest.hexdigest()[:16]


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
"""Entries whose bit patterns are in memory at once, 32 MB."""


def _checksum(values: Tensor) -> int:
    """Sum of mixed bit patterns, each times an odd number that depends on its place, modulo 2**64."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, len(values), _CHUNK):
        bits = values[start : start + _CHUNK].view(_INTEGERS[values.element_size()]).long()
        places = torch.arange(start, start + len(bits), device=values.device)
        mixed = (bits ^ (bits >> 29)) * 0x3C79AC492BA7B653
        total += ((mixed ^ (mixed >> 32)) * (places * 0x9E3779B97F4A7C1 | 1)).sum()
    return int(total)
