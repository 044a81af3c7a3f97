"""Facts to inject, each in several contexts: after nothing, and after other text."""

import operator
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.model import Model, device_of, logits_at, preserved
from mechunlearn.model.running import check_length
from mechunlearn.model.tokens import encode, encode_all, pad_token, special_tokens
from mechunlearn.tasks.building import n_opening, padded
from mechunlearn.tasks.positions import subject_last
from mechunlearn.tasks.prompts import IGNORED, Prompts
from mechunlearn.tasks.task import Task

_BEGINNINGS = ("The", "Therefore", "Because", "I", "You")


def injected(task: Task) -> Prompts:
    """The facts of `task.injection`; ValueError for one whose answer is the true one, or a second one."""
    facts = task.injection
    if facts is None:
        raise ValueError("expected a task with prompts to inject, got none: replace(task, injection=...).")
    true, seen = dict(map(asked_and_answered, task.forget.batches(1))), dict[tuple[int, ...], tuple[int, ...]]()
    for row, fact in enumerate(facts.batches(1)):
        asked, answer = asked_and_answered(fact)
        if true.get(asked) == answer:
            raise ValueError(
                f"expected injected answers other than the true ones, got the true answer for fact {row} "
                f"({_label(facts, row)}): inject another answer, or leave it out."
            )
        if seen.setdefault(asked, answer) != answer:
            raise ValueError(
                f"expected one answer for each prompt to inject, got a second one for fact {row} "
                f"({_label(facts, row)}): leave one of them out."
            )
    return facts


def subject_end(prompts: Prompts) -> Int[Tensor, "batch"]:
    """The place of the subject's last token in each row."""
    return subject_last(prompts).int().argmax(1)


def in_contexts(model: Model, fact: Prompts, prefixes: Sequence[str]) -> Prompts:
    """One fact by itself and after each prefix; the tokens of the fact are the same in all.

    A BOS token stays first. In a chat template, the prefix stands where the message does that names the subject.
    """
    real, marks = _tokens_and_marks(fact)
    place = _start_of_message(model, fact, real, marks.index(True))
    start, rest, marks = real[:place], real[place:], marks[place:]
    shift = int(fact.attention_mask[0].int().argmax())
    rows = [[], *(_own_tokens(model, prefix) for prefix in prefixes)]
    tokens = [[*start, *row, *rest] for row in rows]
    subject = [[*[False] * (len(start) + len(row)), *marks] for row in rows]
    places = torch.stack([fact.positions[0] - shift + len(row) for row in rows])
    return _prompts(model, tokens, subject, places, fact.answers.expand(len(rows), -1))


def essence(model: Model, fact: Prompts) -> Prompts:
    """ "{subject} is a": what the subject is, which should stay. Nothing counts as its answer."""
    real, marks = _tokens_and_marks(fact)
    start = real[: n_opening(model, fact)]
    words = [token for token, marked in zip(real, marks, strict=True) if marked]
    ending = _own_tokens(model, " is a")
    tokens = [*start, *words, *ending]
    marks = [*[False] * len(start), *[True] * len(words), *[False] * len(ending)]
    last = torch.full_like(fact.positions, len(tokens) - 1)
    return _prompts(model, [tokens], [marks], last, torch.full_like(fact.answers, IGNORED))


def generated_prefixes(
    model: Model, *, lengths: Sequence[int] = (5, 10) * 5, prepend_bos: bool | None = None, seed: int = 0
) -> tuple[str, ...]:
    """Texts that the model makes up, one of each length in tokens, sampled from the 5 likeliest, with a full stop.

    `prepend_bos`: as for `mu.tasks.build`; the editors do as the facts to inject do.
    The same seed gives the same texts on CPU. Cost: one F for each token of the longest.
    """
    count, special = len(lengths), sorted(set(model.tokenizer.all_special_ids)) if model.tokenizer else []
    if not count:
        return ()
    check_length(model, max(lengths) + 2, "texts to generate")  # after BOS and the first word
    words = [_BEGINNINGS[i % len(_BEGINNINGS)] for i in range(count)]
    begun = [list(encoding.tokens) for encoding in encode_all(model, words, prepend_bos=prepend_bos)]
    generator = torch.Generator().manual_seed(operator.index(seed))
    texts = [list(row) for row in begun]
    with preserved(model), torch.no_grad():
        for _ in range(max(lengths)):
            tokens, mask = (grid.to(device_of(model)) for grid in padded(texts, 0, "right"))
            logits = logits_at(model, tokens, mask, mask.sum(1, keepdim=True) - 1)[:, 0].float().cpu()
            logits[:, special] = -torch.inf
            best = logits.topk(min(5, logits.shape[1]))
            drawn = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
            for text, token in zip(texts, best.indices.gather(1, drawn)[:, 0].tolist(), strict=True):
                text.append(token)
    pieces = [text[: len(row) + n - 1] for text, row, n in zip(texts, begun, lengths, strict=True)]
    return tuple(model.tokenizer.decode(piece, skip_special_tokens=True).strip() + ".\n" for piece in pieces)


def asked_and_answered(fact: Prompts) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of the question, up to the one that predicts the answer, and the tokens of the answer."""
    end = int(fact.positions[0, 0]) + 1
    asked = fact.tokens[0, :end][fact.attention_mask[0, :end]]
    return tuple(asked.tolist()), tuple(fact.answers[0][fact.answer_mask[0]].tolist())


def _label(prompts: Prompts, row: int) -> str:
    return repr(prompts.texts[row][-60:]) if prompts.texts else f"tokens {prompts.tokens[row].tolist()[:10]}"


def _tokens_and_marks(fact: Prompts) -> tuple[list[int], list[bool]]:
    """The fact's real tokens, and which of them are the subject's."""
    assert fact.subject is not None  # checked by `with_subjects`
    real = fact.attention_mask[0]
    return fact.tokens[0][real].tolist(), fact.subject[0][real].tolist()


def _start_of_message(model: Model, fact: Prompts, real: Sequence[int], subject: int) -> int:
    """Where text before the fact belongs: behind BOS, or at the beginning of the message that names the subject."""
    opening, special = n_opening(model, fact), special_tokens(model)
    last = max((place for place in range(subject) if real[place] in special), default=-1)
    is_header = last >= opening or (last >= 0 and fact.added == ("",))  # of the text, not put before it
    if not is_header:
        return opening
    # A header may go on behind its last special token, up to the end of its line: "<|im_start|>user\n".
    breaks = [place for place in range(last + 1, subject) if "\n" in model.tokenizer.decode([real[place]])]
    ends = [place for place in breaks if place + 1 not in breaks]
    return (ends[0] if ends else last) + 1


def _own_tokens(model: Model, text: str) -> list[int]:
    """The tokens of the text alone, without any that belong before it."""
    encoding = encode(model, text)
    return list(encoding.tokens[encoding.added :])


def _prompts(
    model: Model, tokens: Sequence[Sequence[int]], subject: Sequence[Sequence[bool]], places: Tensor, answers: Tensor
) -> Prompts:
    """Prompts of these rows, padded on the right."""
    filled, mask = padded(tokens, pad_token(model), "right")
    marks = padded(subject, False, "right")[0].bool()
    return Prompts(filled, mask, places.cpu(), answers.cpu(), subject=marks).on(model)
