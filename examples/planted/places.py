"""Where facts are planted: five kinds of places, each drawn by a seed."""

import random
from collections.abc import Callable

import mechunlearn as mu

Draw = Callable[[mu.ModelShape, random.Random], list[str]]
"""Labels of the components."""


def single_layer(shape: mu.ModelShape, rng: random.Random) -> list[str]:
    """Attention and MLP of one layer of the lower two thirds."""
    layer = rng.randrange(2 * shape.n_layers // 3 + 1)
    return [f"L{layer}ATTN", f"L{layer}MLP"]


def multi_layer(shape: mu.ModelShape, rng: random.Random) -> list[str]:
    """The MLP of a layer of the lower 40 %, and the attention of a later one."""
    lower = rng.randrange(2 * shape.n_layers // 5)
    upper = rng.randrange(lower + 1, shape.n_layers - 2)
    return [f"L{lower}MLP", f"L{upper}ATTN"]


def mlps(shape: mu.ModelShape, rng: random.Random) -> list[str]:
    """Two MLPs of the lower half."""
    return [f"L{layer}MLP" for layer in rng.sample(range(shape.n_layers // 2), 2)]


def attention(shape: mu.ModelShape, rng: random.Random) -> list[str]:
    """Three attention layers, without the first and the last two."""
    return [f"L{layer}ATTN" for layer in rng.sample(range(1, shape.n_layers - 2), 3)]


def scattered(shape: mu.ModelShape, rng: random.Random) -> list[str]:
    """One MLP of the lower half, and as many heads as a layer has, wherever they are but in the last layer."""
    heads = [f"L{layer}H{head}" for layer in range(shape.n_layers - 1) for head in range(shape.n_heads)]
    return [f"L{rng.randrange(shape.n_layers // 2)}MLP", *rng.sample(heads, shape.n_heads)]


KINDS: dict[str, Draw] = {
    "single layer": single_layer,
    "several layers": multi_layer,
    "MLPs": mlps,
    "attention": attention,
    "scattered": scattered,
}


def drawn(kind: str, shape: mu.ModelShape, seed: int) -> mu.ComponentMask:
    """The place of that kind and seed; no two seeds of a kind have the same."""
    rng, seen = random.Random(f"planted {kind}"), []
    for _ in range(100 * (seed + 1)):
        if len(seen) > seed:
            break
        mask = mu.ComponentMask.of(KINDS[kind](shape, rng), shape)
        if mask not in seen:
            seen.append(mask)
    else:
        raise ValueError(f"expected a seed below {len(seen)}, as many places as {kind!r} has, got {seed}.")
    return mu.ComponentMask(seen[seed].components, shape, {"method": "planted", "kind": kind, "seed": seed})
