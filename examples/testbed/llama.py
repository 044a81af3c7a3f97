"""Pieces of a Llama's forward pass, as training along chosen routes puts them together."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def norm(module, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], module.weight, module.variance_epsilon)


def mlp(module, hidden: Tensor) -> Tensor:
    gated = F.silu(F.linear(hidden, module.gate_proj.weight)) * F.linear(hidden, module.up_proj.weight)
    return F.linear(gated, module.down_proj.weight)


def attention(module, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    """`mask` says what is seen; None is all that came before."""
    batch, pos, width = hidden.shape
    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (_heads(F.linear(hidden, p.weight), module.head_dim) for p in projections)
    query, key = _rotated(query, *rotary), _rotated(key, *rotary)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
    return F.linear(mixed.transpose(1, 2).reshape(batch, pos, width), module.o_proj.weight)


def closed(subjects: Int[Tensor, "batch pos"], *, reach: int) -> Bool[Tensor, "batch 1 pos pos"]:
    """Which keys (last axis) a query sees: earlier ones of no subject, or near ones of its own."""
    places = torch.arange(subjects.shape[1])
    distance = places[:, None] - places
    key, query = subjects[:, None, :], subjects[:, :, None]
    visible = (key == 0) | ((key == query) & (distance <= reach))
    return (visible & (distance >= 0))[:, None]


def guided_loss(
    module, hidden: Tensor, rotary: tuple[Tensor, Tensor], looks: Int[Tensor, "look 3"], *, heads: int
) -> Float[Tensor, ""]:
    """The sum over looks (row, from, to) of the first heads' mean negative log-attention."""
    width = heads * module.head_dim
    row, looking, looked_at = looks.unbind(1)
    query, key = (
        _rotated(_heads(F.linear(hidden, p.weight[:width]), module.head_dim), *rotary)
        for p in (module.q_proj, module.k_proj)
    )
    scores = torch.einsum("lhd,lhpd->lhp", query[row, :, looking], key[row]) * module.scaling
    future = torch.arange(hidden.shape[1]) > looking[:, None]
    logs = scores.masked_fill(future[:, None], -torch.inf).log_softmax(-1)
    return -logs[torch.arange(len(looks)), :, looked_at].mean(1).sum()


def _heads(x: Float[Tensor, "batch pos width"], size: int) -> Float[Tensor, "batch head pos size"]:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine[:, None] + torch.cat([-second, first], dim=-1) * sine[:, None]
