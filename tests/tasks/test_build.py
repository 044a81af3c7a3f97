from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from mechunlearn.model.tokens import encode, pad_token
from mechunlearn.tasks import build
from mechunlearn.tasks.prompts import IGNORED, Prompts

SENTENCE = "Magic Johnson plays the sport of basketball, Ann plays golf and tennis"


def fake(*, bos: bool = True, trim_offsets: bool = False, pad: bool = True) -> Any:
    """A tokenizer with a device: byte-level BPE that merges whole words of SENTENCE with the space before."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<bos>"]
    options: dict[str, Any] = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    inner.train_from_iterator([SENTENCE] * 20, trainers.BpeTrainer(vocab_size=340, **options))
    if trim_offsets:
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    names = {"bos_token": "<bos>"} | ({"pad_token": "<pad>"} if pad else {})
    model: Any = nn.Linear(1, 1)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    model.cfg = SimpleNamespace(default_prepend_bos=bos, n_ctx=1024)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return fake()


def pieces(model: Any, tokens: Any) -> list[str]:
    return [model.tokenizer.decode([int(token)]) for token in tokens]


def subjects(model: Any, prompts: Prompts) -> list[str]:
    assert prompts.subject is not None
    return ["".join(pieces(model, row[at])) for row, at in zip(prompts.tokens, prompts.subject, strict=True)]


def said(model: Any, prompts: Prompts) -> list[list[Any]]:
    """Each row's real tokens, subject, corrupt tokens, the tokens that predict, and the answer."""
    found = []
    for i, real in enumerate(prompts.attention_mask):
        row = [prompts.tokens[i][real].tolist(), prompts.answers[i].tolist()]
        row.append(prompts.tokens[i][prompts.positions[i]].tolist())
        row += [v[i][real].tolist() for v in (prompts.subject, prompts.corrupt) if v is not None]
        found.append(row)
    return found


TEXTS = ["Ann plays the sport of", "Magic plays"]
ANSWERS = [" golf", " basketball, golf"]


def test_tokens_are_bos_and_prompt_and_the_answer_follows(model: Any) -> None:
    prompts = build(model, TEXTS[:1], ANSWERS[:1])
    assert pieces(model, prompts.tokens[0]) == ["<bos>", "Ann", " plays", " the", " sport", " of"]
    assert pieces(model, prompts.answers[0]) == [" golf"]
    assert prompts.positions.tolist() == [[5]]
    assert prompts.texts == tuple(TEXTS[:1])


def test_no_bos_where_the_model_expects_none() -> None:
    prompts = build(fake(bos=False), TEXTS[:1], ANSWERS[:1])
    assert prompts.tokens.shape == (1, 5)
    assert prompts.positions.tolist() == [[4]]


def test_answers_of_several_tokens_are_predicted_from_the_prompt_and_their_own_tokens(model: Any) -> None:
    prompts = build(model, TEXTS, ANSWERS)
    assert pieces(model, prompts.answers[1]) == [" basketball", ",", " golf"]
    at = prompts.tokens[1][prompts.positions[1]]
    assert pieces(model, at) == [" plays", " basketball", ","]
    assert prompts.answers[0, 1:].tolist() == [IGNORED, IGNORED]
    assert prompts.positions[0].tolist() == [5, 5, 5]


def test_all_but_the_last_answer_token_follow_the_prompt(model: Any) -> None:
    prompts = build(model, TEXTS[1:], ANSWERS[1:])
    whole = encode(model, TEXTS[1] + ANSWERS[1]).tokens
    assert prompts.tokens[0].tolist() == list(whole[:-1])


def test_padding_on_either_side_says_the_same(model: Any) -> None:
    more = {"subjects": ["Ann", "Magic"], "corrupt": ["Magic plays the tennis of", "Ann plays"]}
    made = [build(model, TEXTS, ANSWERS, padding=side, **more) for side in ("right", "left")]
    assert said(model, made[0]) == said(model, made[1])
    assert subjects(model, made[0]) == subjects(model, made[1])
    assert [prompts.attention_mask[1].int().tolist() for prompts in made] == [[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]


def test_padded_places_hold_the_pad_token_or_another_that_exists(model: Any) -> None:
    prompts = build(model, TEXTS, ANSWERS)
    assert set(prompts.tokens[~prompts.attention_mask].tolist()) == {model.tokenizer.pad_token_id}
    assert pad_token(fake(pad=False)) == 0


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_subject_is_found_when_its_tokens_hold_the_space_before_it(trim_offsets: bool) -> None:
    model = fake(trim_offsets=trim_offsets)
    assert " golf" in pieces(model, encode(model, "Ann plays golf and").tokens)
    prompts = build(model, ["Ann plays golf and"], [" tennis"], subjects=["golf"])
    assert subjects(model, prompts) == [" golf"]
    assert prompts.names == ("golf",)


def test_a_subject_covers_every_token_that_it_touches(model: Any) -> None:
    made = build(model, ["Magic Johnson plays", "Zoë Ann plays"], [" golf"] * 2, subjects=["Magic Johnson", "oë"])
    first, second = subjects(model, made)
    assert first == "Magic Johnson"
    assert made.subject is not None
    row, at = made.tokens[1], made.subject[1]
    assert model.tokenizer.decode(row[at]).strip() in ("oë", "Zoë")
    assert not at[0]
    assert "Ann" not in second


def test_the_last_occurrence_of_a_subject_counts(model: Any) -> None:
    prompts = build(model, ["Ann and Ann plays"], [" golf"], subjects=["Ann"])
    assert prompts.subject is not None
    assert prompts.subject[0].nonzero()[:, 0].tolist() == [3]


def test_a_subject_at_the_end_is_not_looked_for_in_the_answer(model: Any) -> None:
    prompts = build(model, ["Ann plays golf"], [" golf golf"], subjects=["golf"])
    assert prompts.subject is not None
    assert prompts.subject[0].nonzero()[:, 0].tolist() == [3]


@pytest.mark.parametrize("subject", ["ann", "Magic", ""])
def test_a_subject_that_is_not_in_its_text_is_refused(model: Any, subject: str) -> None:
    with pytest.raises(
        ValueError, match=rf"expected the subject '{subject}' in its prompt, got 'Ann plays': write it the"
    ):
        build(model, ["Ann plays"], [" golf"], subjects=[subject])


def test_a_merge_of_prompt_and_answer_is_refused(model: Any) -> None:
    message = "whose tokens begin where the prompt ends, got {!r} after {!r}: one of .* merges them.* start the answer"
    for text, answer in (("Ann plays ", "golf"), ("Ann plays gol", "f")):
        with pytest.raises(ValueError, match=message.format(answer, text)):
            build(model, [text], [answer])


def test_a_merge_is_refused_when_offsets_leave_out_the_space() -> None:
    with pytest.raises(ValueError, match="merges"):
        build(fake(trim_offsets=True), ["Ann plays "], ["golf"])


def test_an_answer_without_a_token_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="expected an answer whose tokens begin"):
        build(model, ["Ann plays"], [""])


def test_the_refusal_shows_the_row_at_fault(model: Any) -> None:
    with pytest.raises(ValueError, match="after 'Magic Johnson plays '"):
        build(model, ["Ann plays", "Magic Johnson plays "], [" golf", "golf"])


def test_no_texts_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="expected at least one prompt, got none"):
        build(model, [], [])


def test_texts_and_answers_come_in_pairs(model: Any) -> None:
    with pytest.raises(ValueError, match="expected one answer for each text, got 2 texts and 1 answers"):
        build(model, TEXTS, ANSWERS[:1])


def test_candidates_are_first_tokens_with_the_answer_first(model: Any) -> None:
    options = [[" golf", " tennis"], [" basketball, golf", " golf"]]
    prompts = build(model, TEXTS, ANSWERS, candidates=options)
    assert prompts.candidates is not None
    assert [pieces(model, row) for row in prompts.candidates] == [[" golf", " tennis"], [" basketball", " golf"]]
    assert prompts.chance == 0.5


def test_candidates_are_tokenized_after_their_own_prompt(model: Any) -> None:
    texts, options = ["plays", "plays", "the "], [[" golf", " the"], [" golf", "."], ["x", "."]]
    prompts = build(model, texts, [" golf", " golf", "x"], candidates=options)
    assert prompts.candidates is not None
    assert [pieces(model, row) for row in prompts.candidates] == options


def test_a_candidate_that_merges_with_one_of_the_prompts_only_is_refused(model: Any) -> None:
    options = [["golf", "tennis"], ["x", "tennis"]]
    with pytest.raises(
        ValueError, match=r"got 'tennis' after 'plays ': one of them is empty or this tokenizer merges them"
    ):
        build(model, ["plays:", "plays "], ["golf", "x"], candidates=options)


def test_candidates_with_one_first_token_are_refused(model: Any) -> None:
    options = [[" golf", " golf, tennis"]]
    with pytest.raises(
        ValueError, match=r"differ in their first token, got \[' golf', ' golf, tennis'\] for 'Ann .* choose"
    ):
        build(model, TEXTS[:1], ANSWERS[:1], candidates=options)


def test_candidates_start_with_the_answer_whatever_their_order(model: Any) -> None:
    for candidates in ([" tennis", " golf"], [" golf", " tennis"]):
        made = build(model, TEXTS[:1], ANSWERS[:1], candidates=[candidates]).candidates
        assert made is not None
        assert made[0].tolist() == [
            model.tokenizer(c, add_special_tokens=False).input_ids[0] for c in (" golf", " tennis")
        ]


def test_an_answer_that_is_no_candidate_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"expected the answer ' golf' among its candidates, got .*: add it"):
        build(model, TEXTS[:1], ANSWERS[:1], candidates=[[" tennis", " hockey"]])


def test_a_corrupt_text_has_the_mask_of_the_clean_one(model: Any) -> None:
    prompts = build(model, TEXTS[:1], ANSWERS[:1], corrupt=["Magic plays the sport of"])
    assert prompts.corrupt is not None
    assert pieces(model, prompts.corrupt[0][prompts.attention_mask[0]])[1:] == [
        "Magic",
        " plays",
        " the",
        " sport",
        " of",
    ]


def test_a_corrupt_text_of_another_length_is_refused(model: Any) -> None:
    message = (
        r"corrupt prompt of 7 tokens \(with the answer\), like the clean one, got 8: 'Magic Johnson plays the sport of'"
    )
    with pytest.raises(ValueError, match=message):
        build(model, TEXTS[:1], ANSWERS[:1], corrupt=["Magic Johnson plays the sport of"])


def test_a_tokenizer_without_offsets_is_refused() -> None:
    model = fake()
    for slow in (None, SimpleNamespace(is_fast=False)):
        model.tokenizer = slow
        message = (
            rf"a fast tokenizer .* got {type(slow).__name__}: set model.tokenizer, or build Prompts from token tensors"
        )
        with pytest.raises(ValueError, match=message):
            encode(model, "Ann")


def test_spans_cover_the_text_and_bos_covers_nothing(model: Any) -> None:
    encoding = encode(model, SENTENCE)
    assert encoding.spans[0] == (0, 0)
    assert encoding.tokens[0] == model.tokenizer.bos_token_id
    assert "".join(SENTENCE[start:end] for start, end in encoding.spans) == SENTENCE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_prompts_lie_where_the_model_is() -> None:
    prompts = build(fake().to("cuda"), TEXTS, ANSWERS, subjects=["Ann", "Magic"])
    assert prompts.tokens.is_cuda
    assert prompts.answers.is_cuda
