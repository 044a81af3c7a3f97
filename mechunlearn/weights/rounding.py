"""Rounding of weights to few bits, and models whose matrices are rewritten by a function for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.model import Model, shape
from mechunlearn.weights.entries import Entries, Values, exclusively, select

Rounding: TypeAlias = Callable[[Float[Tensor, "out in"]], Float[Tensor, "out in"]]
"""A function from a matrix to a rounded matrix."""

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""The 16 numbers of NormalFloat4: each is nearest to about as many numbers of a Gaussian as any other."""


def integers(weight: Float[Tensor, "out in"], *, largest: int) -> Float[Tensor, "out in"]:
    """Each row rounded to multiples of its step, which is its largest magnitude / `largest`: round(w / step) * step."""
    precise = weight.float()
    top = precise.abs().amax(1, keepdim=True)
    # The clamp keeps a row of zeros at zero. Products and their order are those of bitsandbytes, for the same bits.
    steps = torch.round(precise * (largest / top.clamp(min=1e-30)))
    return (steps * top * (1 / largest)).to(weight.dtype)


int8 = partial(integers, largest=127)
"""8 bits, one scale per row, as the weights of LLM.int8(). Dettmers et al. 2022, https://arxiv.org/abs/2208.07339."""


def int8_of_half(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """`int8` of the weight in half precision, which bitsandbytes rounds: the same numbers, bit for bit."""
    return int8(weight.half().float()).to(weight.dtype)


int4 = partial(integers, largest=7)
"""4 bits, one scale per row: the coarsest rounding in use."""


def nf4(weight: Float[Tensor, "out in"], *, block: int = 64) -> Float[Tensor, "out in"]:
    """Each weight as the nearest NF4 number times the largest magnitude in its block of 64 weights, read row by row.

    The numbers are those of bitsandbytes, bit for bit. Dettmers et al. 2023 (QLoRA), https://arxiv.org/abs/2305.14314.
    """
    numbers = torch.tensor(NF4, device=weight.device)
    flat = weight.float().flatten()
    # The last block is filled up with zeros, which change no block's largest magnitude.
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    top = blocks.abs().amax(1, keepdim=True)
    scaled = (blocks * (1 / top.clamp(min=1e-38))).clamp(-1, 1)
    # A number is nearest between the midpoints to its neighbours.
    nearest = torch.bucketize(scaled, (numbers[:-1] + numbers[1:]) / 2)
    return (numbers[nearest] * top).flatten()[: len(flat)].view_as(weight).to(weight.dtype)


def roundings_on(device: torch.device) -> Mapping[str, Rounding]:
    """int8, int4 and NF4: by bitsandbytes on a GPU, if it is installed, and by the same arithmetic elsewhere.

    int4 is the same arithmetic everywhere: bitsandbytes has none with one scale per row.
    """
    if device.type != "cuda" or find_spec("bitsandbytes") is None:
        return {"int8": int8_of_half, "int4": int4, "nf4": nf4}
    return {"int8, bitsandbytes": bitsandbytes_int8, "int4": int4, "nf4, bitsandbytes": bitsandbytes_nf4}


def bitsandbytes_int8(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The weight after LLM.int8(), as in `Linear8bitLt`: from half precision, with one scale per row."""
    functional = _bitsandbytes()
    steps, top, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    return functional.int8_vectorwise_dequant(steps, top).to(weight.dtype)


def bitsandbytes_nf4(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The weight after `Linear4bit`: NF4 in blocks of 64, with scales in float32."""
    functional = _bitsandbytes()
    flat = weight.reshape(1, -1)  # the CPU kernel of 0.50 reads rows that are no multiple of a block wrongly
    packed, state = functional.quantize_4bit(flat.contiguous(), blocksize=64, quant_type="nf4")
    return functional.dequantize_4bit(packed, state).view_as(weight)


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError(
            "expected bitsandbytes to round with, got none installed: pip install 'mechunlearn[bitsandbytes]', or take "
            "mechunlearn.weights.rounding, which has the same numbers."
        ) from error
    return functional


@contextmanager
def rewritten(model: Model, entries: list[Entries], change: Callable[[Entries], Tensor]) -> Iterator[None]:
    """Inside, the entries have the values that `change` gives for them; after, their old ones, bit for bit.

    When `change` is called for a matrix, those before it are changed already. ValueError in a model being trained.
    """
    before: Values = {}
    with exclusively(model):
        try:
            for e in entries:
                before[e.label] = e.read(e.slot.parameter.detach())
                e.write(change(e))
            yield
        finally:
            for e in entries:
                if e.label in before:
                    e.write(before[e.label])


def every_entry(model: Model) -> list[Entries]:
    """The entries of all matrices of attention and MLPs, without embeddings, unembedding, norms and biases."""
    parts = [f"L{layer}{part}" for layer in range(shape(model).n_layers) for part in ("ATTN", "MLP")]
    return select(model, ComponentMask.of(parts, shape(model)))


def as_linear(entries: Entries) -> Float[Tensor, "out in"]:
    """A copy of a whole matrix as `nn.Linear` stores it, whatever the model's own layout."""
    rows = entries.read(entries.slot.parameter.detach()).flatten(0, 1)
    return rows.T.contiguous() if entries.slot.matrix in ("W_O", "W_out") else rows


def from_linear(entries: Entries, weight: Float[Tensor, "out in"]) -> Float[Tensor, "unit width d_model"]:
    """The inverse of `as_linear`: values that `Entries.write` takes."""
    rows = weight.T if entries.slot.matrix in ("W_O", "W_out") else weight
    return rows.unflatten(0, (entries.slot.units, -1))
