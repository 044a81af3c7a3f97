"""A model is left as it was found; its weights have a short name and can be compared with what they were."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mechunlearn.model.classes import Model, is_bridge, unchecked_shape
from mechunlearn.model.matrices import slots


@contextmanager
def preserved(model: Model) -> Iterator[None]:
    """Inside: eval mode, nothing requires a gradient, no gradients stored. After: all as before.

    Also after an exception or an interrupt. Values of weights are not touched.
    """
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in _modules(model)]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


@contextmanager
def differentiable(model: Model) -> Iterator[None]:
    """`preserved`, with gradients recorded even where a notebook has turned them off.

    ValueError inside `torch.inference_mode`, whose tensors can never have one.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("expected to be able to compute gradients, got torch.inference_mode: leave it for this call.")
    with preserved(model), torch.enable_grad():
        yield


def _modules(model: Model) -> list[nn.Module]:
    """Also those of the Hugging Face model that a bridge does not register, such as GPT-2's dropout of embeddings."""
    inner = model.original_model.modules() if is_bridge(model) else ()
    return list(dict.fromkeys([*model.modules(), *inner]))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy of every parameter of a model, in the memory of the CPU."""

    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: Model) -> "Snapshot":
        return cls({name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()})

    @torch.no_grad()
    def restore(self, model: Model) -> list[str]:
        """Put back what has changed since; gives the names of those parameters. Cost: each weight is read once.

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
        for name in changed:
            saved = self.weights[name]
            if (now[name].shape, now[name].dtype) == (saved.shape, saved.dtype):
                now[name].copy_(saved)
            else:
                now[name].data = saved.to(now[name].device, copy=True)
        return changed


def _same(one: Tensor, other: Tensor) -> bool:
    """As numbers: NaN where there was NaN is the same."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22


def fingerprint(model: Model) -> str:
    """16 hex digits that change when any bit of an attention or MLP weight does (not cryptographic).

    Reads every weight once, where it lies; equal for a `TransformerBridge` and a `HookedTransformer`
    with the same weights in the same dtype.
    """
    digest = hashlib.sha256(repr(unchecked_shape(model)).encode())
    for (layer, matrix), slot in slots(model).items():
        bits = slot.view(slot.parameter.detach()).contiguous().flatten()
        digest.update(f"{layer} {matrix} {bits.dtype} {_checksum(bits)};".encode())
    return digest.hexdigest()[:16]


def _checksum(values: Tensor) -> int:
    """Sum of mixed bit patterns, each times an odd number that depends on its place, modulo 2**64."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, len(values), _CHUNK):
        bits = values[start : start + _CHUNK].view(_INTEGERS[values.element_size()]).long()
        places = torch.arange(start, start + len(bits), device=values.device)
        mixed = (bits ^ (bits >> 29)) * 0x3C79AC492BA7B653
        total += ((mixed ^ (mixed >> 32)) * (places * 0x9E3779B97F4A7C1 | 1)).sum()
    return int(total)
