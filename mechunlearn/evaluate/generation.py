"""Generation: what the model says itself, and how much of an answer must be shown before it says the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechunlearn.evaluate.results import Result
from mechunlearn.evaluate.scoring import Side, measure, side_of
from mechunlearn.model import Model, check_model, device_of, logits_at, preserved
from mechunlearn.model.classes import at_least_float32
from mechunlearn.model.hooks import is_hooked
from mechunlearn.model.running import in_half, kept_in_cache, last_logits
from mechunlearn.model.tokens import pad_token
from mechunlearn.tasks.building import padded
from mechunlearn.tasks.prompts import Prompts, right_answers
from mechunlearn.tasks.task import Task


def generated(
    model: Model, task: Task, *, format: str | None = None, side: Side = "forget", batch_size: int = 64
) -> Result:
    """Share of prompts after which the model generates the answer, as `says` judges it. Chance is about 0.

    Accuracy over the vocabulary shows the model the answer's earlier tokens when it predicts the later ones, which
    flatters edits of long answers (Yang et al. 2025, https://arxiv.org/abs/2502.11177). Here each prompt is continued
    by its most probable tokens: as many as the longest right answer has, and one more to see whether the last word ends
    there. A model that runs words together, as the shipped one does after some trained prompts, has not said the
    answer.

    `format`: default the first, the trained prompt. `continuations` gives the texts. Cost: as there.
    """
    prompts = side_of(task, format=format, side=side)
    rights = right_answers(prompts)
    longest = max(len(answer) for right in rights for answer in right)
    texts = continuations(model, prompts, longest + 1, batch_size=batch_size)
    said = [
        any(says(text, _text(model, answer.tolist())) for answer in right)
        for text, right in zip(texts, rights, strict=True)
    ]
    right = torch.tensor(said, dtype=torch.float32)
    return Result(right, "exact match of greedy generation", 0.0, "share", prompts.names)


def continuations(model: Model, prompts: Prompts, n_tokens: int, *, batch_size: int = 64) -> tuple[str, ...]:
    """The text that follows each prompt: `n_tokens` tokens, each the most probable one, up to an end of text.

    The model does not see the answers of the prompts. Cost: one forward of the prompts, and one of a single token a
    prompt for each further token, since keys and values are kept; when rows are longer than the model has generated
    before, one forward more, to compare. Inside hooks, which are given all tokens, `n_tokens` forwards of whole rows.
    """
    check_model(model)
    if model.tokenizer is None:
        raise ValueError("expected a model with a tokenizer, to read what it says, got none: set model.tokenizer.")
    if n_tokens < 1:
        raise ValueError(f"expected n_tokens of 1 or more, got {n_tokens}.")
    room = model.cfg.n_ctx - int(prompts.attention_mask.sum(1).max())
    if room < n_tokens - 1:
        raise ValueError(
            f"expected prompts that leave room for {n_tokens} tokens in the model's context of {model.cfg.n_ctx}, got "
            f"room for {room + 1}: shorten the prompts or generate fewer tokens."
        )
    with preserved(model), torch.no_grad():
        batches = [_continued(model, batch, n_tokens) for batch in prompts.batches(batch_size)]
    return tuple(_text(model, row) for batch in batches for row in batch)


def says(text: str, answer: str) -> bool:
    """True if the text begins with the answer, as whole words.

    "golf, of course" says "golf"; "golfing" and "the golf" do not. White space at the ends is ignored, and other white
    space counts as one space. Upper and lower case count the same, except in answers of one character: "a" is a word,
    not the letter of an option.
    """
    text, answer = " ".join(text.split()), " ".join(answer.split())
    if len(answer) > 1:
        text, answer = text.casefold(), answer.casefold()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def extraction_strength(
    model: Model, task: Task, *, format: str | None = None, side: Side = "forget", batch_size: int = 64
) -> Result:
    """Mean extraction strength of the answers, from 0 (the model adds at most the last token) to 1 (all of it).

        strength = (T - 1 - k) / (T - 1)

    T is the number of tokens of the answer, and k the smallest number of them after which greedy generation gives the
    others. This is ES = 1 - k / T without its floor: at least one token must be generated, so k <= T - 1 and ES >= 1 /
    T even if nothing is right. An answer of *one* token counts 1 if it is generated and 0 if not, which is accuracy
    over the vocabulary; one of two tokens is still all or nothing.

    Chance is about 0. `format`: default the first, the trained prompt. Cost: 1 forward, since greedy generation is
    right from k on exactly if each later token is the argmax given those before it.

    Carlini et al. 2021, https://arxiv.org/abs/2012.07805; as a score of unlearning: Wang et al. 2025,
    https://arxiv.org/abs/2406.09179.
    """
    result = measure(model, side_of(task, format=format, side=side), [_strength], batch_size=batch_size)[0]
    return replace(result, sense="extraction strength without its floor", chance=0.0, unit="share")


def greedy(
    model: Model,
    rows: Sequence[Sequence[int]],
    limits: Sequence[int],
    is_finished: Callable[[int, list[int]], bool],
) -> list[list[int]]:
    """The tokens that follow each row, each the most probable one: `limits[i]` of them at most behind row i.

    A row ends after the token at which `is_finished(i, new tokens)` becomes true.

    The model keeps keys and values: after the first forward, each reads one token of each row. This gives the logits of
    whole rows to the rounding of the dtype, which is tried: where a model generates, and where its rows become longer
    than any before, one forward more compares the last logits. Every forward reads whole rows for a model that fails
    this trial, for rows that do not fit into the context with padding and new tokens, and inside hooks of any kind: a
    hook would not see the tokens before, and their positions would be others.
    """
    said = _with_cache(model, rows, limits, is_finished)
    if said is None:
        said = _grown(_WholeRows(model), rows, limits, is_finished)[0]
    return said


_exact_up_to: WeakKeyDictionary[nn.Module, dict[bool, int]] = WeakKeyDictionary()
"""The longest rows, without and with padding, after which kept keys gave the right logits; -1 if they once did not."""


def _with_cache(
    model: Model, rows: Sequence[Sequence[int]], limits: Sequence[int], is_finished: Callable[[int, list[int]], bool]
) -> list[list[int]] | None:
    """None where keys and values cannot be kept, or are not right."""
    lengths = [len(row) for row in rows]
    is_padded = min(lengths) < max(lengths)
    exact = _exact_up_to.setdefault(model, {})
    trusted = exact.get(is_padded, 0)
    too_long = max(lengths) + max(limits) - 1 > model.cfg.n_ctx
    if max(limits) == 1 or too_long or trusted < 0 or is_hooked(model):
        return None
    try:
        said, peaks = _grown(_NewTokens(model), rows, limits, is_finished)
    except Exception:  # whatever a module that nobody has seen raises; the pass without a cache will say what is wrong
        exact[is_padded] = -1
        return None
    # A row that ended after one token says nothing about what is kept.
    width = max((len(row) + len(new) - 1 for row, new in zip(rows, said, strict=True) if len(new) > 1), default=0)
    if width > trusted:
        whole = [[*row, *new] for row, new in zip(rows, said, strict=True)]
        exact[is_padded] = width if _is_said(model, whole, peaks) else -1
    return said if exact.get(is_padded, 0) >= 0 else None


def _is_said(model: Model, rows: list[list[int]], peaks: Float[Tensor, "batch"]) -> bool:
    """Whether the last token of each row is what whole rows say, with this logit."""
    logits = at_least_float32(_WholeRows(model)([row[:-1] for row in rows], []))
    last = torch.tensor([row[-1:] for row in rows], device=logits.device)
    found = torch.stack([logits.gather(1, last)[:, 0], logits.amax(1)])
    tolerance = 0.03 if in_half([model]) else 1e-3
    return bool(((found - peaks).abs() <= tolerance * logits.abs().max()).all())


def _grown(
    next_logits: Callable[[list[list[int]], list[int]], Float[Tensor, "batch d_vocab"]],
    rows: Sequence[Sequence[int]],
    limits: Sequence[int],
    is_finished: Callable[[int, list[int]], bool],
) -> tuple[list[list[int]], Float[Tensor, "batch"]]:
    """The new tokens of each row, and the logit of the last of them.

    `next_logits` is given the rows that still grow, and their places among those of the call before.
    """
    new: list[list[int]] = [[] for _ in rows]
    peaks: dict[int, Tensor] = {}
    growing = kept = list(range(len(rows)))
    while growing:
        best = next_logits([[*rows[i], *new[i]] for i in growing], kept).max(-1)
        for i, token, peak in zip(growing, best.indices.tolist(), best.values, strict=True):
            new[i].append(token)
            peaks[i] = peak
        kept = [at for at, i in enumerate(growing) if len(new[i]) < limits[i] and not is_finished(i, new[i])]
        growing = [growing[at] for at in kept]
    return new, torch.stack([at_least_float32(peaks[i]) for i in range(len(rows))])


@dataclass(frozen=True)
class _WholeRows:
    """Logits after rows of tokens, which are read whole."""

    model: Model

    def __call__(self, rows: list[list[int]], kept: list[int]) -> Float[Tensor, "batch d_vocab"]:
        tokens, mask = (grid.to(device_of(self.model)) for grid in padded(rows, pad_token(self.model), "right"))
        return logits_at(self.model, tokens, mask, mask.sum(1, keepdim=True) - 1)[:, 0]


@dataclass
class _NewTokens:
    """Logits after rows that grow by a token from call to call: after the first call, that token alone is read."""

    model: Model
    mask: Tensor | None = None
    cache: Any = None

    def __call__(self, rows: list[list[int]], kept: list[int]) -> Float[Tensor, "batch d_vocab"]:
        if self.mask is None:
            tokens, self.mask = (grid.to(device_of(self.model)) for grid in padded(rows, pad_token(self.model), "left"))
        else:
            if len(kept) < len(self.mask):
                places = torch.tensor(kept, device=self.mask.device)
                kept_in_cache(self.cache, places)
                self.mask = self.mask[places]
            tokens = torch.tensor([row[-1:] for row in rows], device=self.mask.device)
            self.mask = torch.cat([self.mask, torch.ones_like(tokens, dtype=torch.bool)], 1)
        logits, self.cache = last_logits(self.model, tokens, self.mask, self.cache)
        return logits


def _continued(model: Model, prompts: Prompts, n_tokens: int) -> list[list[int]]:
    """The new tokens after each prompt without its answer, up to an end of text."""
    columns = torch.arange(prompts.tokens.shape[1], device=prompts.tokens.device)
    own = prompts.attention_mask & (columns <= prompts.positions[:, :1])
    rows = [tokens[real].tolist() for tokens, real in zip(prompts.tokens, own, strict=True)]
    end = model.tokenizer.eos_token_id
    return greedy(model, rows, [n_tokens] * len(rows), lambda i, new: new[-1] == end)


def _text(model: Model, ids: list[int]) -> str:
    """The tokens as text, up to the first one that ends a text."""
    end = model.tokenizer.eos_token_id
    ids = ids[: ids.index(end)] if end in ids else ids
    return model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _strength(logits: Float[Tensor, "batch answer d_vocab"], prompts: Prompts) -> Float[Tensor, "batch"]:
    real = prompts.answer_mask
    length = real.sum(1)
    wrong = (logits.argmax(-1) != prompts.answers) & real
    places = torch.arange(1, wrong.shape[1] + 1, device=wrong.device)
    last_wrong = (wrong * places).amax(1)  # up to the last wrong token
    strength = (length - 1 - last_wrong) / (length - 1).clamp(min=1)
    return torch.where(length > 1, strength.clamp(min=0.0), (last_wrong == 0).float())
