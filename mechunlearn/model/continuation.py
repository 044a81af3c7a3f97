"""Tokens back to text."""

from collections.abc import Sequence

from mechunlearn.model.kinds import Model


def continuation(model: Model, before: Sequence[int], after: Sequence[int]) -> str:
    """The text that the tokens `after` add behind `before`, with the space that some tokenizers keep in no token.

    ValueError for a tokenizer whose decoded text changes where tokens are added.
    """
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    start, whole = (model.tokenizer.decode(list(tokens), **options) for tokens in (before, [*before, *after]))
    if not whole.startswith(start):
        raise ValueError(
            f"expected a tokenizer that decodes piece by piece, got {whole[-40:]!r} after {start[-40:]!r}: pass text."
        )
    return whole[len(start) :]
