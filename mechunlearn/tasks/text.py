"""General text, packed to rows of equal length."""

from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.model.kinds import Model
from mechunlearn.model.tokens import encode
from mechunlearn.tasks.prompts import Prompts


def as_prompts(text: Int[Tensor, "row pos"]) -> Prompts:
    """Each row as a prompt of one token whose answer is the rest: for the loss on every token."""
    places = torch.arange(text.shape[1] - 1, device=text.device).expand(len(text), -1)
    inputs = text[:, :-1]
    return Prompts(inputs, torch.ones_like(inputs, dtype=torch.bool), places, text[:, 1:])


def pack(model: Model, texts: Iterable[str], *, length: int = 64, rows: int | None = None) -> Int[Tensor, "row pos"]:
    """The texts one after the other (each begins with BOS, if the model has one), cut into rows.

    An unfinished last row is left out. ValueError if the texts fill fewer than `rows` rows (or none).
    """
    tokens: list[int] = []
    wanted = None if rows is None else rows * length
    for text in texts:
        tokens += encode(model, text).tokens
        if wanted is not None and len(tokens) >= wanted:
            break
    count = len(tokens) // length if rows is None else rows
    if count == 0 or len(tokens) < count * length:
        raise ValueError(
            f"expected text for {rows or 1} rows of {length} tokens, got {len(tokens)} tokens in all: "
            f"pass more text or shorter rows."
        )
    return torch.tensor(tokens[: count * length]).view(count, length)
