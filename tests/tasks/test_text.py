from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch

from mechunlearn.model.tokens import encode
from mechunlearn.tasks import TextStream, pile
from mechunlearn.tasks.text import as_prompts, pack, train_and_test_text

TEXTS = ["w4 w5 w6", "w7 w8", "w9 w10 w11 w12"]
STREAM = [1, 4, 5, 6, 1, 7, 8, 1, 9, 10, 11, 12]
"""Each text after a BOS (1)."""


@pytest.mark.parametrize("length", [2, 3, 4, 5, 7, 12])
def test_packing_cuts_the_stream_into_rows_and_leaves_out_an_unfinished_one(llama: Any, length: int) -> None:
    packed = pack(llama, TEXTS, length=length)
    count = len(STREAM) // length
    assert packed.shape == (count, length)
    assert packed.flatten().tolist() == STREAM[: count * length]


def test_a_count_of_rows_takes_the_first_ones(llama: Any) -> None:
    assert pack(llama, TEXTS, length=3, rows=2).tolist() == [[1, 4, 5], [6, 1, 7]]


def test_no_more_text_is_read_than_the_rows_need(llama: Any) -> None:
    def texts() -> Iterator[str]:
        yield from ["w4 w5 w6"] * 8
        pytest.fail("30 tokens are in the first eight texts")

    assert pack(llama, texts(), length=6, rows=5).shape == (5, 6)


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_skipped_rows_are_those_that_came_before(llama: Any, skip: int) -> None:
    assert torch.equal(pack(llama, TEXTS, length=3, skip=skip), pack(llama, TEXTS, length=3)[skip:])
    assert torch.equal(pack(llama, TEXTS, length=3, rows=1, skip=skip)[0], pack(llama, TEXTS, length=3)[skip])
    with pytest.raises(ValueError, match=r"1 rows of 3 tokens after the first 4, got enough for 0"):
        pack(llama, TEXTS, length=3, skip=4)


def test_a_fifth_of_the_text_is_for_testing_and_no_row_is_in_both(llama: Any) -> None:
    train, test = train_and_test_text(llama, [f"w{i} w5" for i in range(4, 100)] * 5)
    rows = pack(llama, [f"w{i} w5" for i in range(4, 100)] * 5)
    assert (len(train), len(test)) == (len(rows) - len(rows) // 5, len(rows) // 5)
    assert torch.equal(torch.cat([test, train]), rows)
    assert not torch.equal(*(train_and_test_text(llama, seed=seed)[0][:, :9] for seed in (0, 1)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"length": 5, "rows": 3}, "3 rows of 5 tokens"), ({"length": 13}, "1 rows of 13 tokens"), ({}, "1 rows of 64")],
)
def test_too_little_text_is_refused(llama: Any, options: dict[str, int], expected: str) -> None:
    with pytest.raises(
        ValueError, match=rf"expected text for {expected}.* got enough for .* pass more text or shorter rows"
    ):
        pack(llama, TEXTS, **options)


def test_no_text_is_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"got enough for 0 \(0 tokens\)"):
        pack(llama, [])


def test_packed_text_is_what_encode_gives(llama: Any) -> None:
    whole = [token for text in TEXTS for token in encode(llama, text).tokens]
    assert whole == STREAM


def test_every_token_but_the_first_is_an_answer_predicted_by_the_one_before(llama: Any) -> None:
    text = pack(llama, TEXTS, length=4)
    prompts = as_prompts(text)
    assert torch.equal(prompts.answers, text[:, 1:])
    assert torch.equal(prompts.tokens, text[:, :-1])
    assert torch.equal(prompts.tokens.gather(1, prompts.positions), text[:, :-1])
    assert bool(prompts.attention_mask.all())
    assert bool(prompts.answer_mask.all())


NUMBERS = [f"w{i}" for i in range(4, 44)]


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("buffer", [1, 7, 40, 100])
def test_a_stream_gives_every_text_once_and_the_same_order_again(seed: int | None, buffer: int) -> None:
    stream = TextStream(NUMBERS, seed=seed, buffer=buffer)
    found = list(stream)
    assert sorted(found) == sorted(NUMBERS)
    assert list(stream) == found == list(TextStream(NUMBERS, seed=seed, buffer=buffer))
    assert (found == NUMBERS) == (seed is None or buffer == 1)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("skip", [0, 1, 11, 40])
def test_a_stream_goes_on_where_another_was_left(seed: int | None, skip: int) -> None:
    whole = list(TextStream(NUMBERS, seed=seed, buffer=5))
    assert list(TextStream(NUMBERS, seed=seed, buffer=5, skip=skip)) == whole[skip:]


def test_seeds_give_other_orders_and_no_text_moves_forward_by_more_than_the_buffer() -> None:
    orders = [list(TextStream(NUMBERS, seed=seed, buffer=5)) for seed in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert all(NUMBERS.index(text) <= place + 5 for order in orders for place, text in enumerate(order))


def test_datasets_streamed_or_not_give_what_their_texts_give(llama: Any) -> None:
    held = datasets.Dataset.from_dict({"body": [*NUMBERS, ""]})
    streamed = held.to_iterable_dataset()
    for source in (held, streamed):
        stream = TextStream(source, column="body", seed=2, buffer=9)
        assert list(stream) == list(TextStream(NUMBERS, seed=2, buffer=9))  # the empty text is left out
        assert torch.equal(pack(llama, stream, length=8), pack(llama, list(stream), length=8))
        with pytest.raises(ValueError, match="expected a column 'text' with text, got body"):
            next(iter(TextStream(source)))


def test_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((arguments, options))
        return [{"text": text} for text in NUMBERS]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(pile(seed=4, buffer=6, skip=2)) == list(TextStream(NUMBERS, seed=4, buffer=6))[2:]
    assert asked == [(("monology/pile-uncopyrighted",), {"split": "train", "streaming": True})]


def test_no_more_of_a_stream_is_read_than_the_buffer_and_the_rows_need(llama: Any) -> None:
    def texts() -> Iterator[str]:
        yield from NUMBERS[:14]
        pytest.fail("4 waiting texts and 10 more give 10 texts of 2 tokens")

    assert pack(llama, TextStream(texts(), seed=0, buffer=4), length=4, rows=5).shape == (5, 4)


@pytest.mark.parametrize("options", [{"buffer": 0}, {"skip": -1}])
def test_a_stream_without_room_is_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="expected a buffer of 1 or more and a skip of 0 or more"):
        TextStream(NUMBERS, **options)
