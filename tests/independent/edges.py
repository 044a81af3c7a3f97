"""Destinations that read another residual stream than the others, by hooks on plain modules."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from independent.architectures import Raw
from independent.hooks import Change, put, recorded, values
from torch import Tensor


def reading(raw: Raw, destination: str, delta: Callable[[Tensor], Tensor]) -> list[Change]:
    """Changes by which a destination alone reads r + delta(r), with r the residual stream that it would read."""
    if destination == "logits":
        return [(raw.final_norm, "in", lambda r: r + delta(r))]
    layer = int(destination[1])
    parts = raw.at(layer)
    if destination.endswith("MLP"):
        return [(parts.mlp_norm, "in", lambda r: r + delta(r))]
    h, matrix = re.fullmatch(r"L\d+H(\d+)\.(W_\w)", destination).groups()
    module, part = raw.reads(layer, matrix, int(h))
    stream: dict[str, Tensor] = {}

    def remember(r: Tensor) -> Tensor:
        stream["r"] = r
        return r

    def again(out: Tensor) -> Tensor:
        normed = parts.attn_norm.forward(stream["r"] + delta(stream["r"]))  # `forward` runs no hooks
        return put(part, module.forward(normed)[..., part])(out)

    return [(parts.block, "in", remember), (module, "out", again)]


def added_before_norm(raw: Raw, tokens: Tensor, source: str) -> Tensor:
    """What a source adds to the residual stream, biases of attention and post-norms of heads apart."""
    if source == "embed":
        return recorded(raw, tokens, [(raw.blocks[0], "in")])[0]
    parts = raw.at(int(source[1]))
    if source.endswith("MLP"):
        return recorded(raw, tokens, [(parts.mlp_adds, "out")])[0]
    part = raw.head(int(source[3:]))
    (z,) = values(raw, tokens, [(parts.o, "in", part)])
    return z @ raw.rows(parts.o)[part]


def gain(raw: Raw, x: Tensor, other: Tensor, source: str) -> Tensor:
    """What the residual stream of the run x gains when the source alone writes what it writes in the run `other`."""
    moved = added_before_norm(raw, other, source) - added_before_norm(raw, x, source)
    if raw.name != "gemma2" or not re.fullmatch(r"L\d+H\d+", source):
        return moved
    parts = raw.at(int(source[1]))
    (written,) = recorded(raw, x, [(parts.o, "out")])
    return parts.attn_adds.forward(written + moved) - parts.attn_adds.forward(written)


def slope_gain(raw: Raw, x: Tensor, other: Tensor, source: str, around: Tensor | None = None) -> Tensor:
    """`gain` to first order, where a norm follows attention, around what attention has written in x (or `around`)."""
    if raw.name != "gemma2" or not re.fullmatch(r"L\d+H\d+", source):
        return gain(raw, x, other, source)
    parts = raw.at(int(source[1]))
    moved = added_before_norm(raw, other, source) - added_before_norm(raw, x, source)
    (written,) = recorded(raw, x, [(parts.o, "out")])
    point = (written if around is None else around).detach()
    return torch.func.jvp(parts.attn_adds.forward, (point,), (moved.detach(),))[1]


def leaves_at(raw: Raw, destinations: list[str], like: Tensor) -> tuple[Mapping[str, Tensor], list[Any]]:
    """A zero that each destination alone reads on top of the residual stream: its gradient is d metric / d r_v."""
    leaves = {destination: torch.zeros_like(like, requires_grad=True) for destination in destinations}
    changes = [c for destination, leaf in leaves.items() for c in reading(raw, destination, lambda r, leaf=leaf: leaf)]
    return leaves, changes
