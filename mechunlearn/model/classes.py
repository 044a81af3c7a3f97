"""The two model classes, and the shape of a model."""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from mechunlearn.components import ModelShape

Model: TypeAlias = Any
"""A `TransformerBridge` (TransformerLens 3.9 and 4.x) or a `HookedTransformer` (3.9).

`Any`, because importing TransformerLens takes seconds and 4.x has no `HookedTransformer`.
"""


HALF = (torch.float16, torch.bfloat16)
"""The dtypes of half precision."""


def is_bridge(model: Model) -> bool:
    from transformer_lens.model_bridge import TransformerBridge

    return isinstance(model, TransformerBridge)


def is_hooked_transformer(model: Model) -> bool:
    try:
        from transformer_lens import HookedTransformer
    except ImportError:  # TransformerLens 4 removed it; hasattr would raise
        return False
    return isinstance(model, HookedTransformer)


def architecture(model: Model) -> str:
    """The Hugging Face class name behind the model, such as `LlamaForCausalLM`; empty if unknown."""
    return (getattr(model.cfg, "architecture", None) or getattr(model.cfg, "original_architecture", None)) or ""


def shape(model: Model) -> ModelShape:
    """The sizes that decide which components the model has; `heads(shape(model))` lists them."""
    from mechunlearn.model.admission import check_model

    check_model(model)
    return unchecked_shape(model)


def unchecked_shape(model: Model) -> ModelShape:
    cfg = model.cfg
    return ModelShape(
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp,
        gated=bool(cfg.gated_mlp),
    )


def at_least_float32(value: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def device_of(model: Model) -> torch.device:
    """The device of the model's first parameter, to which tokens are moved."""
    return next(model.parameters()).device


def element_size(model: Model) -> int:
    """Bytes of one entry of an activation, which has the weights' dtype; 4 where that is packed."""
    dtype = next(model.parameters()).dtype
    return torch.finfo(dtype).bits // 8 if dtype.is_floating_point else 4


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU; 0 for other devices, which do not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
