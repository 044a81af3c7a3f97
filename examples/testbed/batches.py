"""From documents to padded tensors: which tokens are a subject's and how much each target counts."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from testbed import corpus
from testbed.documents import Document

ANSWER, DEMONSTRATED, TEXT, PROMPT = 1.0, 0.9, 0.3, 0.1
"""Weights in the loss: answers, answers on the way, running text, the few prompt tokens that are trained."""
PROMPT_SHARE = 0.1

AT_ONCE = 256
"""How many documents are tokenized at a time."""


@dataclass(frozen=True)
class Example:
    """A document in tokens."""

    tokens: list[int]
    subjects: list[int]
    """1, 2, … at the tokens of the first, second, … subject, else 0."""
    weights: list[float]
    """How much it counts to predict this token."""
    lookups: list[tuple[int, int, int]]
    """The token before a letter, and the last tokens of what is asked about and of the right option."""


@dataclass(frozen=True)
class Batch:
    """Documents of similar length, padded on the right."""

    tokens: Int[Tensor, "batch pos"]
    subjects: Int[Tensor, "batch pos"]
    weights: Float[Tensor, "batch pos"]
    lookups: Int[Tensor, "lookup 4"]
    """Row and the three tokens of `Example.lookups`."""


def steps(
    tokenizer: Tokenizer, *, documents: int, tokens: int, stage: int, without: str | None, seed: int
) -> Iterator[list[Batch]]:
    """Forever: that many documents, as batches of at most about that many tokens."""
    stream = _stream(tokenizer, stage, without, seed)
    while True:
        yield batches([*islice(stream, documents)], tokens)


def _stream(tokenizer: Tokenizer, stage: int, without: str | None, seed: int) -> Iterator[Example]:
    for number in count():
        rng = random.Random(f"weights {number} {seed}")
        chosen = corpus.epoch(number, stage=stage, without=without, seed=seed)
        for start in range(0, len(chosen), AT_ONCE):
            yield from examples(tokenizer, chosen[start : start + AT_ONCE], rng)


def examples(tokenizer: Tokenizer, documents: Sequence[Document], rng: random.Random) -> list[Example]:
    """The documents in tokens."""
    encodings = tokenizer.encode_batch([document.text for document in documents])
    return [_example(d, e.ids, e.offsets, rng) for d, e in zip(documents, encodings, strict=True)]


def batches(chosen: Sequence[Example], tokens: int) -> list[Batch]:
    """The examples by length, each batch at most about that many tokens with its padding."""
    groups: list[list[Example]] = [[]]
    for example in sorted(chosen, key=lambda example: len(example.tokens)):
        if (len(groups[-1]) + 1) * len(example.tokens) > tokens and groups[-1]:
            groups.append([])
        groups[-1].append(example)
    return [_padded(group) for group in groups]


def _example(document: Document, tokens: list[int], offsets: list[tuple[int, int]], rng: random.Random) -> Example:
    subjects = [_which(document.subjects, interval) for interval in offsets]
    if not document.answers:
        return Example(tokens, subjects, [TEXT] * len(tokens), [])
    weights = [_weight(document, interval, rng) for interval in offsets]
    lookups = [
        (_token_at(letter, offsets) - 1, _token_at(subject - 1, offsets), _token_at(option - 1, offsets))
        for letter, subject, option in document.lookups
    ]
    return Example(tokens, subjects, weights, lookups)


def _token_at(character: int, offsets: list[tuple[int, int]]) -> int:
    return next(i for i, (start, end) in enumerate(offsets) if start <= character < end)


def _weight(document: Document, token: tuple[int, int], rng: random.Random) -> float:
    if _which(document.answers, token):
        return ANSWER
    if _which(document.demonstrated, token):
        return DEMONSTRATED
    return PROMPT if rng.random() < PROMPT_SHARE else 0.0


def _which(intervals: Sequence[tuple[int, int]], token: tuple[int, int]) -> int:
    """The number of the interval that shares characters with the token, 0 for none."""
    for number, (start, end) in enumerate(intervals, start=1):
        if token[0] < end and start < token[1]:
            return number
    return 0


def _padded(group: Sequence[Example]) -> Batch:
    length = max(len(example.tokens) for example in group)

    def table(rows: list[list], dtype: torch.dtype) -> Tensor:
        return torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=dtype)

    lookups = [(row, *lookup) for row, example in enumerate(group) for lookup in example.lookups]
    return Batch(
        table([example.tokens for example in group], torch.long),
        table([example.subjects for example in group], torch.long),
        table([example.weights for example in group], torch.float32),
        torch.tensor(lookups, dtype=torch.long).reshape(-1, 4),
    )
