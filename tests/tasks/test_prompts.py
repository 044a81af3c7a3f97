from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from mechunlearn.tasks.prompts import IGNORED, Prompts

ROWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
ANSWERS = [[1, 2], [3, IGNORED], [4, IGNORED]]
LENGTHS = [3, 2, 3]
"""Tokens before the answer: the first row ends with the first token of its answer of two."""


def padded(side: str, width: int = 6) -> Prompts:
    """The same three prompts, with padding on one side; every field that can be is filled."""
    starts = [0 if side == "right" else width - len(row) for row in ROWS]
    tokens, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.bool)
    subject, positions = mask.clone(), torch.zeros(3, 2, dtype=torch.long)
    for i, (row, start, length) in enumerate(zip(ROWS, starts, LENGTHS, strict=True)):
        tokens[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = True
        subject[i, start + 1] = True
        positions[i] = (start + length - 1 + torch.arange(2)).clamp(max=start + len(row) - 1)
    corrupt = torch.where(mask, tokens + 50, tokens)
    candidates = torch.tensor([[1, 3], [3, 4], [4, 1]])
    labels = {"texts": ("a", "b", "c"), "names": ("A", "B", "C")}
    return Prompts(tokens, mask, positions, torch.tensor(ANSWERS), candidates, subject, corrupt, **labels)


def content(prompts: Prompts) -> list[dict[str, Any]]:
    """What the prompts say, wherever the padding is."""
    found = []
    for i in range(len(prompts)):
        real = prompts.attention_mask[i]
        row = {
            n: v[i][real].tolist() for n in ("tokens", "subject", "corrupt") if (v := getattr(prompts, n)) is not None
        }
        row["positions"] = (prompts.positions[i] - int(real.int().argmax())).tolist()
        row["answers"] = prompts.answers[i].tolist()
        row["candidates"] = None if prompts.candidates is None else prompts.candidates[i].tolist()
        row["labels"] = [labels[i] for labels in (prompts.texts, prompts.names) if labels]
        found.append(row)
    return found


SIDES = pytest.mark.parametrize("side", ["left", "right"])


def test_padding_on_either_side_holds_the_same_content() -> None:
    assert content(padded("left")) == content(padded("right"))


@SIDES
@pytest.mark.parametrize(
    "rows",
    [slice(None), slice(1, None), slice(-1, None), slice(None, None, -1), [2, 0], [1, 1], [-1], torch.tensor([1, 2])],
    ids=str,
)
def test_indexing_keeps_the_content_of_the_rows(side: str, rows: Any) -> None:
    prompts = padded(side)
    everything = content(prompts)
    expected = everything[rows] if isinstance(rows, slice) else [everything[int(i)] for i in rows]
    assert content(prompts[rows]) == expected


@SIDES
@pytest.mark.parametrize(("rows", "width"), [([0], 4), ([1], 2), ([1, 2], 3), ([0, 1, 2], 4)])
def test_indexing_trims_what_is_padding_in_every_row(side: str, rows: list[int], width: int) -> None:
    chosen = padded(side)[rows]
    for name in ("tokens", "attention_mask", "subject", "corrupt"):
        assert getattr(chosen, name).shape == (len(rows), width)


@SIDES
def test_rows_keep_their_width(side: str) -> None:
    prompts = padded(side)
    assert prompts.rows(torch.tensor([1])).tokens.shape == (1, 6)
    assert content(prompts.rows(torch.tensor([1, 0]))) == [content(prompts)[i] for i in (1, 0)]


@SIDES
@pytest.mark.parametrize("as_list", [False, True])
def test_a_boolean_mask_selects_rows(side: str, as_list: bool) -> None:
    prompts = padded(side)
    chosen = torch.tensor([True, False, True])
    assert content(prompts[chosen.tolist() if as_list else chosen]) == content(prompts[[0, 2]])
    with pytest.raises(IndexError):
        prompts[torch.tensor([True])]


@SIDES
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_batches_are_all_rows_in_order(side: str, size: int) -> None:
    batches = padded(side).batches(size)
    assert all(len(batch) == size for batch in batches[:-1])
    assert [row for batch in batches for row in content(batch)] == content(padded(side))


@pytest.mark.parametrize("rows", [slice(0, 0), []])
def test_an_empty_selection_is_refused(rows: Any) -> None:
    with pytest.raises(
        ValueError, match="expected at least one prompt, got none: the set is empty; check what it was filt"
    ):
        padded("right")[rows]


def test_a_row_that_is_not_there_is_refused() -> None:
    with pytest.raises(IndexError):
        padded("right")[[3]]


def test_empty_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="expected tokens of one length, got lengths"):
        Prompts.of([], [])
    with pytest.raises(ValueError, match="expected at least one prompt"):
        Prompts.of(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long))


def test_without_a_mask_the_last_token_predicts_the_answer() -> None:
    prompts = Prompts.of([[5, 6, 7], [8, 9, 10]], [1, 2])
    assert prompts.positions.tolist() == [[2], [2]]
    assert prompts.answers.tolist() == [[1], [2]]
    assert bool(prompts.attention_mask.all())
    assert prompts.chance == 0.0


@pytest.mark.parametrize(("mask", "last"), [([[1, 1, 0, 0]], 1), ([[0, 0, 1, 1]], 3), ([[0, 1, 1, 0]], 2)])
def test_with_a_mask_the_last_real_token_predicts_the_answer(mask: list[list[int]], last: int) -> None:
    prompts = Prompts.of([[5, 6, 7, 8]], [1], attention_mask=torch.tensor(mask).bool())
    assert prompts.positions.tolist() == [[last]]


def test_all_that_is_given_is_kept() -> None:
    subject = torch.tensor([[True, False]])
    prompts = Prompts.of([[5, 6]], [1], candidates=[[1, 2, 3, 4]], corrupt=[[7, 8]], subject=subject)
    assert prompts.candidates is not None
    assert prompts.candidates.tolist() == [[1, 2, 3, 4]]
    assert prompts.corrupt is not None
    assert prompts.corrupt.tolist() == [[7, 8]]
    assert prompts.subject is subject
    assert prompts.chance == 0.25


@pytest.mark.parametrize(("name", "given"), [("tokens", [[1, 2], [3]]), ("corrupt tokens", [[1, 2], [3, 4]])])
def test_unequal_lengths_without_a_mask_are_refused(name: str, given: list[list[int]]) -> None:
    tokens = given if name == "tokens" else [[1, 2], [3, 4]]
    corrupt = None if name == "tokens" else [[1, 2], [3]]
    with pytest.raises(
        ValueError, match=rf"{name} of one length, got lengths \[1, 2\]: pad them and pass attention_mask"
    ):
        Prompts.of(tokens, [5, 6], corrupt=corrupt)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["attention_mask", "subject", "corrupt"])
def test_a_counterpart_of_another_length_is_refused(name: str) -> None:
    kind = torch.long if name == "corrupt" else torch.bool
    wrong: dict[str, Tensor] = {name: torch.ones(2, 4, dtype=kind)}
    message = rf"expected {name} of the same shape as the tokens, \(2, 3\), got \(2, 4\): every token"
    with pytest.raises(ValueError, match=message):
        Prompts.of([[1, 2, 3], [4, 5, 6]], [7, 8], **wrong)  # type: ignore[arg-type]


def test_an_answer_predicted_at_padding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"predicted at real tokens, got a masked position: check the mask"):
        Prompts.of([[1, 2]], [3], attention_mask=torch.tensor([[False, False]]))


def test_the_right_answer_comes_first_among_the_candidates() -> None:
    with pytest.raises(ValueError, match="right answer as the first candidate of every row: reorder"):
        Prompts.of([[1, 2], [1, 2]], [3, 4], candidates=[[3, 4], [3, 4]])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [{"answers": [3]}, {"candidates": [[3, 4]]}], ids=str)
def test_a_count_of_answers_that_is_not_that_of_the_prompts_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Prompts.of([[1, 2], [1, 2]], **{"answers": [3, 3], **wrong})


def test_filling_is_no_answer() -> None:
    assert padded("left").answer_mask.tolist() == [[True, True], [True, False], [True, False]]


@SIDES
def test_corrupted_prompts_keep_everything_but_the_tokens(side: str) -> None:
    prompts = padded(side)
    corrupted = prompts.corrupted()
    assert corrupted.tokens is prompts.corrupt
    for name in ("attention_mask", "positions", "answers", "candidates", "subject", "names"):
        assert getattr(corrupted, name) is getattr(prompts, name)
    assert corrupted.texts == ()
    with pytest.raises(ValueError, match="with a corrupted counterpart, got none: pass corrupt="):
        corrupted.corrupted()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_moving_to_a_device_moves_every_tensor_and_back() -> None:
    moved = padded("left").to("cuda")
    values = [getattr(moved, field.name) for field in fields(Prompts)]
    assert all(value.is_cuda for value in values if isinstance(value, Tensor))
    assert content(moved.to("cpu")) == content(padded("left"))
    assert content(moved[torch.tensor([True, False, True], device="cuda")].to("cpu")) == content(padded("left")[[0, 2]])


def test_repr_says_how_many_and_shows_the_first() -> None:
    assert repr(padded("left")) == "Prompts(3 x 6 tokens, answers of up to 2; first: 'a')"
    assert repr(Prompts.of([[1, 2]], [3])) == "Prompts(1 x 2 tokens, answers of up to 1)"
