"""Which tokens of each prompt: functions of prompts, for methods that patch or read at some tokens only."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.reading.positions import Where, answer, last_of, subject, subject_last
from mechunlearn.tasks.prompts import Prompts

__all__ = ["ROLES", "Groups", "Where", "answer", "everywhere", "roles", "subject", "subject_last"]

Groups: TypeAlias = Callable[[Prompts], Mapping[str, Bool[Tensor, "batch pos"]]]
"""Named groups of tokens of each prompt, True at theirs; the same names for all prompts."""

ROLES = ("before the subject", "first of the subject", "inside the subject", "last of the subject", "after", "last")
"""What `roles` divides a prompt into; `"last"` is the token that predicts the answer."""


def everywhere(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    """Every token of the prompt, and those of the answer that are teacher-forced."""
    return prompts.attention_mask


def roles(prompts: Prompts) -> dict[str, Bool[Tensor, "batch pos"]]:
    """A partition of each prompt's tokens by `ROLES`, which makes prompts of different lengths comparable.

    A subject of one token is the last of the subject; one of two has nothing inside. Where the subject ends the
    prompt, its last token counts as the last of the subject, and `"last"` is empty. Teacher-forced tokens of the
    answer are in no role.
    """
    is_subject = subject(prompts)
    order = torch.arange(is_subject.shape[1], device=is_subject.device).expand_as(is_subject)
    last, first = last_of(is_subject), last_of(is_subject.flip(1)).flip(1)
    end = answer(prompts) & ~last
    real = prompts.attention_mask & (order <= prompts.positions[:, :1])
    before = real & (order < first.int().argmax(1, keepdim=True)) & ~end
    after = real & (order > last.int().argmax(1, keepdim=True)) & ~end
    first = first & ~last
    inside = real & ~(before | after | first | last | end)
    return dict(zip(ROLES, (before, first, inside, last, after, end), strict=True))
