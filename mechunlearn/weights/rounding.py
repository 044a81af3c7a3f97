"""Weights rounded to few bits, as numbers: what a quantised model computes with.

Each function takes a matrix as `nn.Linear` stores it, [out, in], and gives the rounded one in the same dtype.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Rounding: TypeAlias = Callable[[Float[Tensor, "out in"]], Float[Tensor, "out in"]]
"""Any function from a matrix to a rounded one."""

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 numbers of NormalFloat4: each is about equally often the nearest to a Gaussian one."""


def integers(weight: Float[Tensor, "out in"], *, largest: int) -> Float[Tensor, "out in"]:
    """Whole multiples of each row's step, which is its largest magnitude / `largest`: round(w / step) * step."""
    precise = weight.float()
    top = precise.abs().amax(1, keepdim=True)
    steps = torch.round(precise * (largest / top.clamp(min=1e-30)))
    return (steps * top * (1 / largest)).to(weight.dtype)


int8 = partial(integers, largest=127)
"""8 bits, one scale per row, as the weights of LLM.int8(). Dettmers et al. 2022, https://arxiv.org/abs/2208.07339."""


def int8_of_half(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """`int8` of the weight in half precision, which is what bitsandbytes takes: its numbers, bit for bit."""
    return int8(weight.half().float()).to(weight.dtype)


int4 = partial(integers, largest=7)
"""4 bits, one scale per row: the coarsest rounding in use."""


def nf4(weight: Float[Tensor, "out in"], *, block: int = 64) -> Float[Tensor, "out in"]:
    """The nearest NF4 number times the largest magnitude of each block of 64 in a row-by-row reading.

    As bitsandbytes does it, bit for bit. Dettmers et al. 2023 (QLoRA), https://arxiv.org/abs/2305.14314.
    """
    numbers = torch.tensor(NF4, device=weight.device)
    flat = weight.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    top = blocks.abs().amax(1, keepdim=True)
    scaled = (blocks * (1 / top.clamp(min=1e-38))).clamp(-1, 1)
    nearest = torch.bucketize(scaled, (numbers[:-1] + numbers[1:]) / 2)
    return (numbers[nearest] * top).flatten()[: len(flat)].view_as(weight).to(weight.dtype)
