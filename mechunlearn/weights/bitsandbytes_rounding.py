"""Weights rounded by bitsandbytes itself: its kernels, where there is a GPU to run them on."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.weights.rounding import Rounding, int4, int8_of_half, nf4


def roundings_on(device: torch.device) -> Mapping[str, Rounding]:
    """int8, int4 and NF4: by bitsandbytes on a GPU, if it is installed, and by the same arithmetic elsewhere.

    bitsandbytes has no plain int4 with one scale per row: that is ours everywhere.
    """
    if device.type != "cuda" or find_spec("bitsandbytes") is None:
        return {"int8": int8_of_half, "int4": int4, "nf4": nf4}
    return {"int8, bitsandbytes": bitsandbytes_int8, "int4": int4, "nf4, bitsandbytes": bitsandbytes_nf4}


def bitsandbytes_int8(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """What LLM.int8() keeps of a weight, from its half precision, as in `Linear8bitLt`: one scale per row."""
    functional = _functional()
    steps, top, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    return functional.int8_vectorwise_dequant(steps, top).to(weight.dtype)


def bitsandbytes_nf4(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """What `Linear4bit` keeps of a weight: NF4 in blocks of 64, scales in float32."""
    functional = _functional()
    flat = weight.reshape(1, -1)  # the CPU kernel of 0.50 reads rows that are no multiple of a block wrongly
    packed, state = functional.quantize_4bit(flat.contiguous(), blocksize=64, quant_type="nf4")
    return functional.dequantize_4bit(packed, state).view_as(weight)


def _functional() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError(
            "expected bitsandbytes to round with, got none installed: pip install 'mechunlearn[bitsandbytes]', or take "
            "mechunlearn.weights.rounding, which has the same numbers."
        ) from error
    return functional
