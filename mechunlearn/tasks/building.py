"""From text to prompts: any tokenizer, answers of any length, subjects found by character."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.model import Model, check_model, preserved
from mechunlearn.model.tokens import Encoding, added_text, continuation, encode, encode_all, pad_token
from mechunlearn.tasks.prompts import IGNORED, Prompts


def build(
    model: Model,
    texts: Sequence[str],
    answers: Sequence[str],
    *,
    candidates: Sequence[Sequence[str]] | None = None,
    options: Sequence[Sequence[str]] | None = None,
    aliases: Sequence[Sequence[str]] | None = None,
    subjects: Sequence[str | tuple[int, int]] | None = None,
    corrupt: Sequence[str] | None = None,
    padding: Literal["right", "left"] = "right",
    prepend_bos: bool | None = None,
) -> Prompts:
    """Prompts from texts that end right before their answers (which usually start with a space).

    - `candidates`: for each text its possible answers, the right one among them, told apart by their first tokens.
    - `options`: the same to score whole answers by, which may begin alike, with a forward for each. They are candidates
      too where their first tokens differ in every row.
    - `aliases`: for each text other answers that are right as well. Whole answers are scored.
    - `subjects`: for each text what it is about, as words (their last occurrence counts) or as a range of characters.
      The tokens that share characters with it are the subject's.
    - `corrupt`: for each text another of as many tokens.
    - `prepend_bos`: whether BOS stands before each text; None does as `model.to_tokens` (`cfg.default_prepend_bos`). A
      text that begins with it, as chat templates write it, gets no second one. `prompts.added` says what was added.

    ValueError where the tokenizer would merge prompt and answer into one token.
    """
    if len(texts) != len(answers):
        raise ValueError(f"expected one answer for each text, got {len(texts)} texts and {len(answers)} answers.")
    encodings, lengths = _encoded(model, texts, answers, prepend_bos)
    ranges = None if subjects is None else [_characters(t, s) for t, s in zip(texts, subjects, strict=True)]
    # The last token of the answer is only ever predicted, so the model is not given it.
    tokens, mask = padded([e.tokens[:-1] for e in encodings], pad_token(model), padding)
    starts = [0 if padding == "right" else tokens.shape[1] - len(e.tokens) + 1 for e in encodings]
    positions, answer_tokens = _answers(starts, lengths, encodings)
    whole = n_right = first = None
    if options is not None or aliases is not None:
        nothing: list[Sequence[str]] = [()] * len(texts)
        whole, n_right = _option_tokens(model, texts, answers, options or nothing, aliases or nothing, prepend_bos)
        first = _first_tokens(whole, n_right)
    elif candidates is not None:
        first = _candidate_tokens(model, texts, answers, candidates, prepend_bos)
    return Prompts(
        tokens=tokens,
        attention_mask=mask,
        positions=positions,
        answers=answer_tokens,
        candidates=first,
        options=whole,
        n_right=n_right,
        subject=None if ranges is None else _subject_tokens(ranges, encodings, starts, tokens),
        corrupt=None if corrupt is None else _corrupt_tokens(model, corrupt, answers, encodings, padding, prepend_bos),
        texts=tuple(texts),
        names=() if ranges is None else tuple(t[a:b] for t, (a, b) in zip(texts, ranges, strict=True)),
        added=tuple(added_text(model, encoding) for encoding in encodings),
    ).on(model)


def answered(model: Model, prompts: Prompts, answer: str | Sequence[str]) -> Prompts:
    """The same prompts with another answer (or one for each), such as " I don't know.": to inject, or for `dpo`.

    Candidates and corrupted counterparts, which belong to the true answer, are left out. The prompts need their texts.
    """
    if not prompts.texts:
        raise ValueError("expected prompts with their texts, got none: build them with tasks.build.")
    answers = [answer] * len(prompts) if isinstance(answer, str) else list(answer)
    built = build(model, prompts.texts, answers, prepend_bos=prompts.prepend_bos)
    if prompts.subject is None:
        return replace(built, names=prompts.names)
    # Another answer may be of another length, which moves padding on the left: each subject moves with its prompt.
    subject = torch.zeros_like(built.attention_mask)
    for row, (old, new) in enumerate(zip(prompts.attention_mask.int(), built.attention_mask.int(), strict=True)):
        places = prompts.subject[row].nonzero()[:, 0] - int(old.argmax()) + int(new.argmax())
        subject[row, places.to(subject.device)] = True
    return replace(built, names=prompts.names, subject=subject)


def answer_texts(model: Model, prompts: Prompts) -> list[str]:
    """The answers as text, each as it continues its prompt, with the space before it if there is one."""
    texts, columns = [], (prompts.tokens, prompts.attention_mask, prompts.positions[:, 0], prompts.answers)
    for tokens, real, place, answer in zip(*columns, strict=True):
        before = tokens[: int(place) + 1][real[: int(place) + 1]]
        texts.append(continuation(model, before.tolist(), answer[answer >= 0].tolist()))
    return texts


def n_opening(model: Model, prompts: Prompts) -> int:
    """How many special tokens, BOS among them, every prompt begins with: those that belong before any text."""
    if model.tokenizer is None:
        return 0
    opening = encode(model, "", prepend_bos=True).tokens
    begins = prompts.attention_mask.int().argmax(1, keepdim=True) + torch.arange(
        len(opening), device=prompts.tokens.device
    )
    first = prompts.tokens.gather(1, begins.clamp(max=prompts.tokens.shape[1] - 1))
    return len(opening) if bool((first == torch.tensor(opening, device=first.device)).all()) else 0


def knows(
    model: Model, prompts: Prompts, *, threshold: float | None = None, batch_size: int = 32
) -> Bool[Tensor, "batch"]:
    """True where the model itself gives the answer, or an alias of it, so that there is something to forget.

    - `threshold=None`: every token of the answer is the most probable one of the vocabulary.
    - `threshold` a number: the probability of the whole answer is at least that. Guo et al. 2025
      (https://arxiv.org/abs/2410.12949) keep CounterFact records from 0.5 on.
    """
    check_model(model)
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(
            f"threshold must lie in 0..1 (a probability; None: the most probable answer), got {threshold}."
        )
    known = []
    with preserved(model), torch.no_grad():
        for batch in prompts.on(model).batches(batch_size):
            count = 1 if batch.n_right is None else int(batch.n_right.max())
            rights = [batch] if batch.options is None else [batch.choosing(place) for place in range(count)]
            says, probability = zip(*(_said(model, right) for right in rights), strict=True)
            is_right = torch.arange(count)[:, None] < (1 if batch.n_right is None else batch.n_right.cpu())
            total = (torch.stack(probability) * is_right).sum(0)
            known.append((torch.stack(says) & is_right).any(0) if threshold is None else total >= threshold)
    return torch.cat(known)


def _said(model: Model, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Whether every token of the answer is the most probable one, and the probability of the answer."""
    logits, mask = prompts.logits(model).float(), prompts.answer_mask
    answers = prompts.answers.masked_fill(~mask, 0)
    log_probabilities = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    says = ((logits.argmax(-1) == prompts.answers) | ~mask).all(1)
    return says.cpu(), log_probabilities.masked_fill(~mask, 0).sum(1).exp().cpu()


def _encoded(
    model: Model, texts: Sequence[str], answers: Sequence[str], prepend_bos: bool | None
) -> tuple[list[Encoding], list[int]]:
    """The encoding of each text and its answer together, and how many of its tokens are the prompt's."""
    # Both are encoded together, since a tokenizer may write an answer alone otherwise than behind its prompt.
    whole = [text + answer for text, answer in zip(texts, answers, strict=True)]
    encodings = encode_all(model, whole, prepend_bos=prepend_bos)
    prompts = dict(zip(texts, encode_all(model, texts, prepend_bos=prepend_bos), strict=True))
    lengths = []
    for text, answer, encoding in zip(texts, answers, encodings, strict=True):
        lengths.append(sum(end <= len(text) for _, end in encoding.spans))
        begun = encoding.tokens[: lengths[-1]]
        if lengths[-1] in (0, len(encoding.tokens)) or prompts[text].tokens != begun:
            raise ValueError(
                f"expected an answer whose tokens begin where the prompt ends, got {answer!r} after {text[-40:]!r}: "
                f"one of them is empty or this tokenizer merges them; end the prompt before a space and start the "
                f"answer with it."
            )
    return encodings, lengths


def padded(rows: Sequence[Sequence[int]], fill: int, padding: str) -> tuple[Tensor, Tensor]:
    """Rows filled up to the longest on one side, "right" or "left", and a mask that is True at what was there."""
    width = max((len(row) for row in rows), default=0)
    tokens = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if padding == "right" else slice(width - len(row), width)
        tokens[i, place] = torch.tensor(list(row))
        mask[i, place] = True
    return tokens, mask


def _answers(starts: list[int], lengths: list[int], encodings: list[Encoding]) -> tuple[Tensor, Tensor]:
    """Positions that predict the answer tokens (the last one repeated as filling), and these tokens."""
    answers = [encoding.tokens[n_prompt:] for encoding, n_prompt in zip(encodings, lengths, strict=True)]
    tokens, real = padded(answers, IGNORED, "right")
    first = torch.tensor(starts, dtype=torch.long) + torch.tensor(lengths, dtype=torch.long) - 1
    last = first + real.sum(1) - 1
    return (first[:, None] + torch.arange(tokens.shape[1])).minimum(last[:, None]), tokens


def _candidate_tokens(
    model: Model,
    texts: Sequence[str],
    answers: Sequence[str],
    candidates: Sequence[Sequence[str]],
    prepend_bos: bool | None,
) -> Tensor:
    """First tokens, the right answer's in the first column."""
    grid = []
    for answer, choices in zip(answers, candidates, strict=True):
        if answer not in choices:
            raise ValueError(f"expected the answer {answer!r} among its candidates, got {list(choices)}: add it.")
        grid.append([answer, *(option for option in choices if option != answer)])
    # By the prompt's last character, since no earlier one matters to the first token of an answer.
    asked = {(text[-1:], option): text for text, options in zip(texts, grid, strict=True) for option in options}
    encodings, lengths = _encoded(model, [*asked.values()], [option for _, option in asked], prepend_bos)
    firsts = {key: e.tokens[n] for key, e, n in zip(asked, encodings, lengths, strict=True)}
    tokens = [[firsts[text[-1:], option] for option in options] for text, options in zip(texts, grid, strict=True)]
    for text, options, row in zip(texts, grid, tokens, strict=True):
        if len(set(row)) < len(row):
            raise ValueError(
                f"expected candidates that differ in their first token, got {options} for {text[-40:]!r}: "
                f"choose others, or score whole answers with answer_log_probability."
            )
    return torch.tensor(tokens)


def _option_tokens(
    model: Model,
    texts: Sequence[str],
    answers: Sequence[str],
    options: Sequence[Sequence[str]],
    aliases: Sequence[Sequence[str]],
    prepend_bos: bool | None,
) -> tuple[Tensor, Tensor]:
    """The tokens of each row's answer, aliases and wrong options, and how many are right."""
    rights = [list(dict.fromkeys([answer, *also])) for answer, also in zip(answers, aliases, strict=True)]
    rows = [list(dict.fromkeys([*right, *also])) for right, also in zip(rights, options, strict=True)]
    # By the prompt's last character, since no earlier one matters to the tokens of an answer.
    asked = {(text[-1:], option): text for text, row in zip(texts, rows, strict=True) for option in row}
    encodings, lengths = _encoded(model, [*asked.values()], [option for _, option in asked], prepend_bos)
    tokens = {key: e.tokens[n:] for key, e, n in zip(asked, encodings, lengths, strict=True)}
    count, width = max(map(len, rows)), max(map(len, tokens.values()))
    whole = torch.full((len(texts), count, width), IGNORED)
    for grid, text, row in zip(whole, texts, rows, strict=True):
        grid[: len(row)] = padded([tokens[text[-1:], option] for option in row] + [[0] * width], IGNORED, "right")[0][
            :-1
        ]
    return whole, torch.tensor([len(right) for right in rights])


def _first_tokens(whole: Tensor, n_right: Tensor) -> Tensor | None:
    """Of the answer and the wrong options, if all rows have equally many and they differ."""
    rows = [
        [row[0], *(token for token in row[n:] if token != IGNORED)]
        for row, n in zip(whole[..., 0].tolist(), n_right.tolist(), strict=True)
    ]
    is_grid = len({len(row) for row in rows}) == 1 and len(rows[0]) > 1
    return torch.tensor(rows) if is_grid and all(len(set(row)) == len(row) for row in rows) else None


def _characters(text: str, subject: str | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(subject, str):
        return subject
    start = text.rfind(subject)
    if start < 0 or not subject:
        raise ValueError(f"expected the subject {subject!r} in its prompt, got {text!r}: write it the same way.")
    return start, start + len(subject)


def _subject_tokens(
    ranges: Sequence[tuple[int, int]], encodings: Sequence[Encoding], starts: Sequence[int], tokens: Tensor
) -> Tensor:
    """True at the tokens that share a character with the subject's range."""
    # By character: the same word has other tokens at the start of a text, after a space, or joined with a comma.
    is_subject = torch.zeros_like(tokens, dtype=torch.bool)
    for i, ((begin, finish), encoding) in enumerate(zip(ranges, encodings, strict=True)):
        for place, (start, end) in enumerate(encoding.spans[:-1]):
            is_subject[i, starts[i] + place] = start < finish and end > begin
    return is_subject


def _corrupt_tokens(
    model: Model,
    corrupt: Sequence[str],
    answers: Sequence[str],
    encodings: Sequence[Encoding],
    padding: str,
    prepend_bos: bool | None,
) -> Tensor:
    rows = _encoded(model, corrupt, answers, prepend_bos)[0]
    for text, row, encoding in zip(corrupt, rows, encodings, strict=True):
        if len(row.tokens) != len(encoding.tokens):
            raise ValueError(
                f"expected a corrupt prompt of {len(encoding.tokens)} tokens (with the answer), like the clean one, "
                f"got {len(row.tokens)}: {text!r}. Replace the subject by one of as many tokens."
            )
    return padded([row.tokens[:-1] for row in rows], pad_token(model), padding)[0]
