"""Streams of general text: the Pile, any dataset, any strings; in an order that can be repeated, and gone on with."""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any


@dataclass(frozen=True, eq=False)
class TextStream:
    """The texts of a dataset, read as they are needed; each iteration begins anew and gives the same texts.

    Goes wherever texts go: `pack(model, stream, length=100, rows=500)`, `rows_of(model, stream)`,
    `edit.finetune(..., text=stream)`. Empty texts are left out. ValueError for a dataset without the column.
    """

    source: str | Iterable[Any]
    """The name of a dataset on the Hub, which is streamed and not downloaded; a dataset of `datasets`, streamed or not;
    or strings. A list or a dataset can be read again; a generator only once."""
    column: str = "text"
    """Of a dataset."""
    split: str = "train"
    """Of a dataset on the Hub."""
    seed: int | None = None
    """Draws the order; `None`: that of the source."""
    buffer: int = 10_000
    """How many texts an order is drawn among at any time, since a stream cannot be shuffled as a whole."""
    skip: int = 0
    """How many texts to leave out, in the order drawn: after n texts, a stream with skip=n goes on. They are read
    again, which takes time on the Hub."""

    def __post_init__(self) -> None:
        if self.buffer < 1 or self.skip < 0:
            raise ValueError(
                f"expected a buffer of 1 or more and a skip of 0 or more, got {self.buffer} and {self.skip}."
            )

    def __iter__(self) -> Iterator[str]:
        rows = self._rows()
        if self.seed is None:
            return islice(self._texts(rows), self.skip, None)
        return islice(_shuffled(self._texts(rows), random.Random(self.seed), self.buffer), self.skip, None)

    def _rows(self) -> Iterable[Any]:
        if not isinstance(self.source, str):
            return self.source
        from datasets import load_dataset

        return load_dataset(self.source, split=self.split, streaming=True)

    def _texts(self, rows: Iterable[Any]) -> Iterator[str]:
        for row in rows:
            text = row if isinstance(row, str) else self._cell(row)
            if text:
                yield text

    def _cell(self, row: Mapping[str, Any]) -> str:
        if self.column not in row:
            raise ValueError(
                f"expected a column {self.column!r} with text, got {', '.join(map(str, row))}: pass column=...."
            )
        return row[self.column]


def pile(*, seed: int | None = 0, buffer: int = 10_000, skip: int = 0) -> TextStream:
    """The Pile without its copyrighted parts (`monology/pile-uncopyrighted` on the Hub), streamed.

    The text that Guo et al. 2025 (https://arxiv.org/abs/2410.12949) train and test on, with a buffer of 50,000.
    """
    return TextStream("monology/pile-uncopyrighted", seed=seed, buffer=buffer, skip=skip)


def _shuffled(texts: Iterator[str], rng: random.Random, size: int) -> Iterator[str]:
    """Each text takes the place of a random one of the last `size` that waited, which goes out."""
    waiting = list(islice(texts, size))
    for text in texts:
        place = rng.randrange(len(waiting))
        waiting[place], out = text, waiting[place]
        yield out
    rng.shuffle(waiting)
    yield from waiting
