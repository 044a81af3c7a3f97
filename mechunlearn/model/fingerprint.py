"""A short name for a model's weights, the same on both model classes."""

import hashlib

import torch
from torch import Tensor

from mechunlearn.model.kinds import Model, unchecked_shape
from mechunlearn.model.slots import slots

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
