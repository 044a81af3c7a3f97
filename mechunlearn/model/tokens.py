"""Text to tokens with character offsets, as the model was trained to see it, and tokens back to text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechunlearn.model.classes import Model


@dataclass(frozen=True)
class Encoding:
    """Tokens of a text and, for each, the characters [start, end) that it covers (added tokens: [0, 0))."""

    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    added: int = 0
    """How many special tokens were put before the text's own: the first ones."""


def encode(model: Model, text: str, *, prepend_bos: bool | None = None) -> Encoding:
    """Tokens of `text`, after the special tokens that belong before it: see `encode_all`."""
    return encode_all(model, [text], prepend_bos=prepend_bos)[0]


def encode_all(model: Model, texts: Sequence[str], *, prepend_bos: bool | None = None) -> list[Encoding]:
    """Tokens of each text, as `model.to_tokens` gives them, but that no special token is doubled or cut off at the end.

    Before a text stand the special tokens that its tokenizer puts there, with one BOS if `prepend_bos` (None:
    `cfg.default_prepend_bos`). A text that begins with one of them itself, as chat templates write it, gets none from
    there on. What a tokenizer would put *behind* a text (EOS) is left out. This is the one place that tokenizes.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or not tokenizer.is_fast:
        raise ValueError(
            f"expected a model with a fast tokenizer (it gives character offsets), got "
            f"{type(tokenizer).__name__}: set model.tokenizer, or build Prompts from token tensors."
        )
    if not texts:
        return []
    by_tokenizer, bos = _opening(model, prepend_bos)
    opening = [*tokenizer.convert_ids_to_tokens(by_tokenizer), *([bos] if bos else [])]
    begun = [text.startswith(tuple(opening)) if opening else True for text in texts]
    whole = [text if has_own else bos + text for text, has_own in zip(texts, begun, strict=True)]
    batch = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    encodings = []
    for tokens, spans, has_own in zip(batch["input_ids"], batch["offset_mapping"], begun, strict=True):
        before = by_tokenizer
        if has_own and tokens and tokens[0] in before:
            before = before[: before.index(tokens[0])]
        shift = 0 if has_own else len(bos)  # BOS is part of the text that was tokenized, but not of the user's
        places = (*((0, 0) for _ in before), *((max(0, start - shift), max(0, end - shift)) for start, end in spans))
        encodings.append(Encoding((*before, *tokens), places, len(before) + bool(shift)))
    return encodings


@contextmanager
def prepending_bos(model: Model, prepend_bos: bool | None) -> Iterator[None]:
    """Inside, texts are tokenized with or without BOS (None: as before), whatever the model's own default."""
    before = model.cfg.default_prepend_bos
    try:
        model.cfg.default_prepend_bos = before if prepend_bos is None else prepend_bos
        yield
    finally:
        model.cfg.default_prepend_bos = before


def _opening(model: Model, prepend_bos: bool | None) -> tuple[list[int], str]:
    """The special tokens that the tokenizer puts before a text, and the BOS that has to be written before it, or ""."""
    tokenizer, bos = model.tokenizer, model.tokenizer.bos_token_id
    probe = tokenizer("a", return_special_tokens_mask=True)
    places = probe["special_tokens_mask"]
    own = probe["input_ids"][: places.index(0) if 0 in places else 0]
    wanted = model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    if not wanted:
        return [token for token in own if token != bos], ""
    # TransformerLens gives tokenizers without BOS one that may be no token of theirs: then there is none to prepend.
    is_token = bos is not None and tokenizer(tokenizer.bos_token, add_special_tokens=False)["input_ids"] == [bos]
    return own, tokenizer.bos_token if is_token and bos not in own else ""


def special_tokens(model: Model) -> dict[int, str]:
    """The tokens that stand for no text, such as BOS or those around the messages of a chat; not the unknown word."""
    tokenizer = model.tokenizer
    added = {token: str(one) for token, one in tokenizer.added_tokens_decoder.items() if one.special}
    own = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {token: text for token, text in {**added, **own}.items() if token != tokenizer.unk_token_id}


def added_text(model: Model, encoding: Encoding) -> str:
    """The special tokens that were put before the text, as they are written."""
    return "".join(model.tokenizer.convert_ids_to_tokens(list(encoding.tokens[: encoding.added])))


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
