"""Plain torch hooks: what is read, what is put in its place, and sites that a label names."""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from independent.architectures import Raw
from torch import Tensor

# A module, the side ("in" or "out") and which of the last axis.
Site = tuple[Any, str, slice]
Change = tuple[Any, str, Callable[[Tensor], Tensor]]
WHOLE = slice(None)


@contextmanager
def changing(changes: Sequence[Change]):
    """Each change is a module, "in" or "out", and a function of the tensor there."""
    with ExitStack() as stack:
        for module, side, function in changes:
            if side == "in":
                handle = module.register_forward_pre_hook(lambda _, given, f=function: (f(given[0]), *given[1:]))
            else:
                handle = module.register_forward_hook(lambda _, given, out, f=function: f(out))
            stack.callback(handle.remove)
        yield


def run(raw: Raw, tokens: Tensor, changes: Sequence[Change] = ()) -> Tensor:
    with changing(changes):
        return raw.model(tokens, use_cache=False).logits


def recorded(
    raw: Raw, tokens: Tensor, sites: Sequence[tuple[Any, str]], changes: Sequence[Change] = ()
) -> list[Tensor]:
    """The tensors at (module, side), as they are after the changes."""
    found: list[Tensor] = [torch.empty(0)] * len(sites)

    def keep(i: int) -> Callable[[Tensor], Tensor]:
        def function(value: Tensor) -> Tensor:
            found[i] = value
            return value

        return function

    run(raw, tokens, [*changes, *((module, side, keep(i)) for i, (module, side) in enumerate(sites))])
    return found


def put(part: slice, value: Tensor, where: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """What replaces a part of the last axis, at all tokens or where a mask over tokens is true."""

    def function(now: Tensor) -> Tensor:
        new = now.clone()
        new[..., part] = value if where is None else torch.where(where[None, :, None], value, now[..., part])
        return new

    return function


def site(raw: Raw, label: str) -> Site:
    """Where the output of a component is, by the documentation of `attribution_patching`."""
    layer, kind, index, matrix = re.fullmatch(r"L(\d+)(H|N|MLP|ATTN)(\d*)\.?(W_\w+)?", label).groups()
    parts, i = raw.at(int(layer)), int(index or 0)
    if kind == "N":
        return parts.down, "in", slice(i, i + 1)
    if kind == "H" and matrix in ("W_Q", "W_K", "W_V"):
        module, part = raw.reads(int(layer), matrix, i)
        return module, "out", part
    if kind == "H":
        return parts.o, "in", raw.head(i)
    if matrix in ("W_in", "W_gate"):
        return (parts.up if matrix == "W_in" else parts.gate), "out", WHOLE
    return (parts.attn_adds if kind == "ATTN" else parts.mlp_adds), "out", WHOLE


def values(raw: Raw, tokens: Tensor, sites: Sequence[Site], changes: Sequence[Change] = ()) -> list[Tensor]:
    """What each site holds in a run."""
    whole = recorded(raw, tokens, [found[:2] for found in sites], changes)
    return [value[..., part] for value, (_, _, part) in zip(whole, sites, strict=True)]


def gradients(
    raw: Raw, tokens: Tensor, sites: Sequence[Site], metric: Callable, changes: Sequence[Change] = (), after=()
) -> tuple[list[Tensor], list[Tensor]]:
    """What each site holds in a run, and the gradient of metric(logits) there; `after` are changes behind it."""
    points = list({(id(module), side): (module, side) for module, side, _ in sites}.values())
    leaves: dict[tuple[int, str], Tensor] = {}

    def leaf(key: tuple[int, str]) -> Callable[[Tensor], Tensor]:
        def function(value: Tensor) -> Tensor:
            leaves[key] = torch.zeros_like(value, requires_grad=True)
            return value + leaves[key]

        return function

    changes = [*changes, *((module, side, leaf((id(module), side))) for module, side in points)]
    outputs = values(raw, tokens, sites, [*changes, *after])
    metric(run(raw, tokens, [*changes, *after])).backward()
    raw.model.zero_grad()
    slopes = [leaves[id(module), side].grad for module, side, _ in sites]  # None where nothing depends on it
    zero = torch.zeros(())
    return outputs, [zero if slope is None else slope[..., site[2]] for slope, site in zip(slopes, sites, strict=True)]
