"""General text: packed to rows of equal length, or a stream that can be repeated and resumed."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import index
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.model import Model, device_of
from mechunlearn.model.running import check_length
from mechunlearn.model.tokens import encode
from mechunlearn.tasks import facts
from mechunlearn.tasks.prompts import Prompts


def as_prompts(text: Int[Tensor, "row pos"]) -> Prompts:
    """Each row as a prompt of one token whose answer is the rest: for the loss on every token."""
    places = torch.arange(text.shape[1] - 1, device=text.device).expand(len(text), -1)
    inputs = text[:, :-1]
    return Prompts(inputs, torch.ones_like(inputs, dtype=torch.bool), places, text[:, 1:])


def rows_of(
    model: Model,
    texts: Iterable[str | Sequence[int] | Int[Tensor, "pos"]],
    *,
    length: int = 64,
    prepend_bos: bool | None = None,
) -> Iterator[Int[Tensor, "pos"]]:
    """The texts one after the other, cut into rows of `length` tokens; an unfinished last row is left out.

    A text is a string (BOS before it as for `build`, by `prepend_bos`) or its tokens, taken as they are. `texts` may be
    any iterable, such as `(row["text"] for row in datasets.load_dataset(..., streaming=True))`: no more of it is read
    than is used. ValueError for an empty text, and for rows longer than the model's context.
    """
    if isinstance(texts, str) or length < 2:
        got = "a string" if isinstance(texts, str) else f"rows of length {length}"
        raise ValueError(f"expected an iterable of texts and rows of 2 tokens or more, got {got}: pass [text, ...].")
    check_length(model, length, "rows of text")
    return _rows(model, texts, length, prepend_bos)


def _rows(
    model: Model, texts: Iterable[str | Sequence[int] | Int[Tensor, "pos"]], length: int, prepend_bos: bool | None
) -> Iterator[Int[Tensor, "pos"]]:
    waiting: list[int] = []
    for place, text in enumerate(texts):
        if isinstance(text, Mapping):
            raise ValueError(
                f"expected strings or tokens, got a record with {', '.join(map(str, text))} at place {place}: pass "
                f"its text, for example (row['text'] for row in dataset)."
            )
        tokens = (
            list(encode(model, text, prepend_bos=prepend_bos).tokens)
            if isinstance(text, str)
            else [int(token) for token in text]
        )
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
    model: Model,
    texts: Iterable[str | Sequence[int]],
    *,
    length: int = 64,
    rows: int | None = None,
    skip: int = 0,
    prepend_bos: bool | None = None,
) -> Int[Tensor, "row pos"]:
    """The texts packed to `rows` rows of equal length (default: all), from row `skip` on; see `rows_of`.

    Calls with `rows=100` and `skip` 0, 100, 200, ... give the rows of one long call, if the texts begin anew each time.
    What is skipped is read and tokenized again.
    """
    stop = None if rows is None else skip + rows
    packed = list(islice(rows_of(model, texts, length=length, prepend_bos=prepend_bos), skip, stop))
    if len(packed) < (rows or 1):
        after = f" after the first {skip}" if skip else ""
        raise ValueError(
            f"expected text for {rows or 1} rows of {length} tokens{after}, got enough for {len(packed)} "
            f"({len(packed) * length} tokens): pass more text or shorter rows."
        )
    return torch.stack(packed)


def train_and_test_text(
    model: Model, text: Iterable[str] | Int[Tensor, "row pos"] | None = None, *, seed: int = 0
) -> tuple[Int[Tensor, "train_row pos"], Int[Tensor, "test_row pos"]]:
    """General text for `Task.text`, and the first fifth of it for `Task.text_test`.

    All strings are packed to rows of 64 tokens; of an endless stream, pass `pack(..., rows=...)` instead. The default
    is everyday sentences that come with the package.
    """
    if text is None:
        rng = random.Random(f"text {seed}")
        text = [facts.running_text(rng) for _ in range(400)]
    packed = (text if isinstance(text, Tensor) else pack(model, text)).to(device_of(model))
    check_length(model, packed.shape[1] - 1, "rows of text")
    n_test = max(1, len(packed) // 5)
    if len(packed) <= n_test:
        raise ValueError(
            f"expected text for at least two rows (train and test), got {len(packed)} of {packed.shape[1]} tokens: "
            f"pass more text."
        )
    return packed[n_test:], packed[:n_test]


@dataclass(frozen=True, eq=False)
class TextStream:
    """The texts of a dataset, read as they are needed; each iteration begins anew and gives the same texts.

    It can be passed wherever texts can: `pack(model, stream, length=100, rows=500)`, `rows_of(model, stream)`,
    `edit.finetune(..., text=stream)`. Empty texts are left out. ValueError for a dataset without the column.
    """

    source: str | Iterable[Any]
    """The name of a dataset on the Hub, which is streamed and not downloaded; a dataset of `datasets`, streamed or not;
    or strings. A list or a dataset can be read again; a generator only once."""
    column: str = "text"
    """The column of a dataset that has the text."""
    split: str = "train"
    """The split of a dataset on the Hub."""
    seed: int | None = None
    """The seed of a random order; `None`: the order of the source."""
    buffer: int = 10_000
    """How many texts wait at any time to be drawn from, since a stream cannot be shuffled as a whole."""
    skip: int = 0
    """How many texts to leave out, in the order drawn: a stream with skip=n goes on after n texts. They are read again,
    which takes time on the Hub."""

    def __post_init__(self) -> None:
        if self.buffer < 1 or self.skip < 0:
            raise ValueError(
                f"expected a buffer of 1 or more and a skip of 0 or more, got {self.buffer} and {self.skip}."
            )

    def __iter__(self) -> Iterator[str]:
        rows = self.source
        if isinstance(rows, str):
            from datasets import load_dataset

            rows = load_dataset(rows, split=self.split, streaming=True)
        texts = self._texts(rows)
        if self.seed is not None:
            texts = _shuffled(texts, random.Random(index(self.seed)), self.buffer)
        return islice(texts, self.skip, None)

    def _texts(self, rows: Iterable[Any]) -> Iterator[str]:
        for row in rows:
            if not isinstance(row, str) and self.column not in row:
                raise ValueError(
                    f"expected a column {self.column!r} with text, got {', '.join(map(str, row))}: pass column=...."
                )
            text = row if isinstance(row, str) else row[self.column]
            if text:
                yield text


def pile(*, seed: int | None = 0, buffer: int = 10_000, skip: int = 0) -> TextStream:
    """The Pile without its copyrighted parts (`monology/pile-uncopyrighted` on the Hub), streamed.

    The text that Guo et al. 2025 (https://arxiv.org/abs/2410.12949) train and test on, with a buffer of 50,000.
    """
    return TextStream("monology/pile-uncopyrighted", seed=seed, buffer=buffer, skip=skip)


def _shuffled(texts: Iterator[str], rng: random.Random, size: int) -> Iterator[str]:
    """The texts in random order: each takes the place of a random one of `size` that wait, which is yielded."""
    waiting = list(islice(texts, size))
    for text in texts:
        place = rng.randrange(len(waiting))
        waiting[place], out = text, waiting[place]
        yield out
    rng.shuffle(waiting)
    yield from waiting
