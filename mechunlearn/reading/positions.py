"""One or some tokens of each prompt: functions of prompts."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.tasks.prompts import Prompts

Where: TypeAlias = Callable[[Prompts], Bool[Tensor, "batch pos"]]
"""True at the tokens meant. Padding never counts, whatever the function says."""


def subject(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    """All tokens of the subject. ValueError for prompts without one."""
    if prompts.subject is None or not bool(prompts.subject.any(1).all()):
        without = [] if prompts.subject is None else (~prompts.subject.any(1)).nonzero()[:, 0].tolist()
        missing = f"prompts {without[:5]}" if without else "all of them"
        raise ValueError(
            f"expected prompts that say where their subject is, got none for {missing}: pass subjects=... to "
            f"tasks.build, or choose other positions."
        )
    return prompts.subject & prompts.attention_mask


def subject_last(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    """The subject's last token, where facts are looked up."""
    return last_of(subject(prompts))


def answer(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    """The token that predicts the answer's first token: the last one of the prompt."""
    return torch.zeros_like(prompts.attention_mask).scatter(1, prompts.positions[:, :1], True)


def answers(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    """The tokens that predict the answer's tokens: the last one of the prompt, then all but the last of the answer."""
    found = torch.zeros_like(prompts.attention_mask)
    rows = prompts.answer_mask.nonzero()[:, 0]
    found[rows, prompts.positions[prompts.answer_mask]] = True
    return found


def from_subject(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    """From the subject's last token on: all that later tokens can read about it, but for its own first tokens."""
    return (subject_last(prompts).cumsum(1) > 0) & prompts.attention_mask


def last_of(where: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Only the last True of each row that has one."""
    return where & (where.flip(1).cumsum(1).flip(1) == 1)
