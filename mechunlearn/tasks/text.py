"""General text, packed to rows of equal length."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.model.kinds import Model, device_of
from mechunlearn.model.tokens import encode
from mechunlearn.tasks import facts
from mechunlearn.tasks.prompts import Prompts


def as_prompts(text: Int[Tensor, "row pos"]) -> Prompts:
    """Each row as a prompt of one token whose answer is the rest: for the loss on every token."""
    places = torch.arange(text.shape[1] - 1, device=text.device).expand(len(text), -1)
    inputs = text[:, :-1]
    return Prompts(inputs, torch.ones_like(inputs, dtype=torch.bool), places, text[:, 1:])


def rows_of(
    model: Model, texts: Iterable[str | Sequence[int] | Int[Tensor, "pos"]], *, length: int = 64
) -> Iterator[Int[Tensor, "pos"]]:
    """The texts one after the other, cut into rows as they come; an unfinished last row is left out.

    A text is a string (which begins with BOS, if the model has one) or its tokens, taken as they are. Any iterable
    will do, such as `(row["text"] for row in datasets.load_dataset(..., streaming=True))`: no more of it is read than
    is used. ValueError for an empty text, a bare string, and rows of fewer than 2 tokens.
    """
    if isinstance(texts, str) or length < 2:
        got = "a string" if isinstance(texts, str) else f"rows of length {length}"
        raise ValueError(f"expected an iterable of texts and rows of 2 tokens or more, got {got}: pass [text, ...].")
    waiting: list[int] = []
    for place, text in enumerate(texts):
        if isinstance(text, Mapping):
            raise ValueError(
                f"expected strings or tokens, got a record with {', '.join(map(str, text))} at place {place}: pass "
                f"its text, for example (row['text'] for row in dataset)."
            )
        tokens = list(encode(model, text).tokens) if isinstance(text, str) else [int(token) for token in text]
        if len(text) == 0:
            raise ValueError(
                f"expected texts with something in them, got an empty one at place {place}: leave empty texts out, "
                f"for example (text for text in texts if text)."
            )
        waiting += tokens
        while len(waiting) >= length:
            yield torch.tensor(waiting[:length])
            waiting = waiting[length:]


def pack(
    model: Model, texts: Iterable[str | Sequence[int]], *, length: int = 64, rows: int | None = None, skip: int = 0
) -> Int[Tensor, "row pos"]:
    """`rows` rows (default: all) that the texts fill, by `rows_of`, from the row `skip` on.

    Calls with `skip` 0, 100, 200, ... on texts that begin anew give the rows of one long call, 100 at a time; what is
    skipped is read and tokenized again. ValueError if the texts fill fewer rows (or none).
    """
    stop = None if rows is None else skip + rows
    found = list(islice(rows_of(model, texts, length=length), skip, stop))
    if len(found) < (rows or 1):
        after = f" after the first {skip}" if skip else ""
        raise ValueError(
            f"expected text for {rows or 1} rows of {length} tokens{after}, got enough for {len(found)} "
            f"({len(found) * length} tokens): pass more text or shorter rows."
        )
    return torch.stack(found)


def train_and_test_text(
    model: Model, text: Iterable[str] | Int[Tensor, "row pos"] | None = None, *, seed: int = 0
) -> tuple[Int[Tensor, "train_row pos"], Int[Tensor, "test_row pos"]]:
    """General text for `Task.text` and, its first fifth, for `Task.text_test`.

    Strings are packed to rows of 64 tokens, all of them: of an endless stream, pass rows by `pack(..., rows=...)`.
    Default: everyday sentences that come with the package. ValueError for fewer than two rows.
    """
    if text is None:
        rng = random.Random(f"text {seed}")
        text = [facts.running_text(rng) for _ in range(400)]
    packed = (text if isinstance(text, Tensor) else pack(model, text)).to(device_of(model))
    n_test = max(1, len(packed) // 5)
    if len(packed) <= n_test:
        raise ValueError(
            f"expected text for at least two rows (train and test), got {len(packed)} of {packed.shape[1]} tokens: "
            f"pass more text."
        )
    return packed[n_test:], packed[:n_test]
