"""Text to tokens with character offsets, as the model was trained to see it, and tokens back to text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechunlearn.model.classes import Model


@dataclass(frozen=True)
class Encoding:
    """Tokens of a text and, for each, the characters [start, end) that it covers (BOS: [0, 0))."""

    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def encode(model: Model, text: str) -> Encoding:
    """Tokens of `text`, after one BOS if the model expects one (`cfg.default_prepend_bos`)."""
    tokenizer = model.tokenizer
    if tokenizer is None or not tokenizer.is_fast:
        raise ValueError(
            f"expected a model with a fast tokenizer (it gives character offsets), got "
            f"{type(tokenizer).__name__}: set model.tokenizer, or build Prompts from token tensors."
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, spans = list(encoding["input_ids"]), [tuple(span) for span in encoding["offset_mapping"]]
    if model.cfg.default_prepend_bos and tokenizer.bos_token_id is not None:
        tokens, spans = [tokenizer.bos_token_id, *tokens], [(0, 0), *spans]
    return Encoding(tuple(tokens), tuple(spans))


def leading_bos(
    model: Model, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """True where a row's first real token is the tokenizer's BOS; nowhere without a tokenizer or a BOS."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    first = mask & (mask.cumsum(1) == 1)
    return torch.zeros_like(first) if bos is None else first & (tokens == bos)


def pad_token(model: Model) -> int:
    """The token at padded places. These are masked, so any token will do."""
    tokenizer = model.tokenizer
    candidates = [tokenizer.pad_token_id, tokenizer.eos_token_id] if tokenizer is not None else []
    return next((token for token in candidates if token is not None), 0)


def continuation(model: Model, before: Sequence[int], after: Sequence[int]) -> str:
    """The text that the tokens `after` add behind `before`, with the space that some tokenizers keep in no token."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    start, whole = (model.tokenizer.decode(list(tokens), **options) for tokens in (before, [*before, *after]))
    if not whole.startswith(start):
        raise ValueError(
            f"expected a tokenizer that decodes piece by piece, got {whole[-40:]!r} after {start[-40:]!r}: pass text."
        )
    return whole[len(start) :]
