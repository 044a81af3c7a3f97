"""Generation: what the model says itself, and how much of an answer must be shown before it says the rest."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.evaluate.results import Result
from mechunlearn.evaluate.scoring import Side, measure, side_of
from mechunlearn.model import Model, check_model, logits_at, preserved
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

    `format`: default the first, the trained prompt. `continuations` gives the texts. Cost: a forward for each token.
    """
    prompts = side_of(task, format=format, side=side)
    rights = right_answers(prompts)
    longest = max(len(answer) for right in rights for answer in right)
    texts = continuations(model, prompts, longest + 1, batch_size=batch_size)
    said = [
        any(says(text, _text(model, answer)) for answer in right) for text, right in zip(texts, rights, strict=True)
    ]
    right = torch.tensor(said, dtype=torch.float32)
    return Result(right, "exact match of greedy generation", 0.0, "share", prompts.names)


def continuations(model: Model, prompts: Prompts, n_tokens: int, *, batch_size: int = 64) -> tuple[str, ...]:
    """The text that follows each prompt: `n_tokens` tokens, each the most probable one, up to an end of text.

    The model does not see the answers of the prompts. Cost: `n_tokens` forwards.
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
        batches = [_greedy(model, batch, n_tokens) for batch in prompts.on(model).batches(batch_size)]
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


def _greedy(model: Model, prompts: Prompts, n_tokens: int) -> Int[Tensor, "batch new"]:
    columns = torch.arange(prompts.tokens.shape[1], device=prompts.tokens.device)
    own = prompts.attention_mask & (columns <= prompts.positions[:, :1])
    lengths = own.sum(1)
    # The prompts without their answers, padded on the right with room for new tokens, in reading order, row by row.
    tokens = prompts.tokens.new_zeros(len(prompts), int(lengths.max()) + n_tokens)
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    tokens[mask] = prompts.tokens[own]
    last = mask.sum(1, keepdim=True) - 1
    places = last + 1 + torch.arange(n_tokens, device=tokens.device)
    for step in range(n_tokens):
        width = int(last.max()) + 1 + step
        new = logits_at(model, tokens[:, :width], mask[:, :width], last + step).argmax(-1)
        tokens.scatter_(1, last + step + 1, new)
        mask.scatter_(1, last + step + 1, True)
    return tokens.gather(1, places)


def _text(model: Model, tokens: Int[Tensor, "new"]) -> str:
    """The tokens as text, up to the first one that ends a text."""
    ids = tokens.tolist()
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
