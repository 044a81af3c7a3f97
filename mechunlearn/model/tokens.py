"""Text to tokens with character offsets, the way the model was trained to see it."""

from dataclasses import dataclass

from mechunlearn.model.kinds import Model


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
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, spans = list(found["input_ids"]), [tuple(span) for span in found["offset_mapping"]]
    if model.cfg.default_prepend_bos and tokenizer.bos_token_id is not None:
        tokens, spans = [tokenizer.bos_token_id, *tokens], [(0, 0), *spans]
    return Encoding(tuple(tokens), tuple(spans))


def pad_token(model: Model) -> int:
    """What fills padded places; they are masked, so any token will do."""
    tokenizer = model.tokenizer
    known = [tokenizer.pad_token_id, tokenizer.eos_token_id] if tokenizer is not None else []
    return next((token for token in known if token is not None), 0)
