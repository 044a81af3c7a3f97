"""Positions: functions that say which tokens of each prompt are meant, alone or in named groups."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.tasks.prompts import Prompts, with_subjects

Where: TypeAlias = Callable[[Prompts], Bool[Tensor, "batch pos"]]
"""A function from prompts to a mask that is True at the tokens meant. Padding never counts, whatever it says."""

Groups: TypeAlias = Callable[[Prompts], Mapping[str, Bool[Tensor, "batch pos"]]]
"""A function from prompts to named masks, with the same names for all prompts."""

ROLES = ("before the subject", "first of the subject", "inside the subject", "last of the subject", "after", "last")
"""What `roles` divides a prompt into; `"last"` is the token that predicts the answer."""


def everywhere(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    """Every token of the prompt, and those of the answer that are teacher-forced."""
    return prompts.attention_mask


def subject(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    """All tokens of the subject. ValueError for prompts without one."""
    marks = with_subjects(prompts, hint=", or choose other positions").subject
    assert marks is not None  # checked by `with_subjects`
    return marks & prompts.attention_mask


def subject_last(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    """The subject's last token, where facts are looked up."""
    return _last_of(subject(prompts))


def answer(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    """The token that predicts the answer's first token: the last one of the prompt."""
    return torch.zeros_like(prompts.attention_mask).scatter(1, prompts.positions[:, :1], True)


def answers(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    """The tokens that predict the answer's tokens: the last one of the prompt, then all but the last of the answer."""
    predicts = torch.zeros_like(prompts.attention_mask)
    rows = prompts.answer_mask.nonzero()[:, 0]
    predicts[rows, prompts.positions[prompts.answer_mask]] = True
    return predicts


def from_subject(prompts: Prompts) -> Bool[Tensor, "batch pos"]:
    """The subject's last token and every token after it."""
    return (subject_last(prompts).cumsum(1) > 0) & prompts.attention_mask


def roles(prompts: Prompts) -> dict[str, Bool[Tensor, "batch pos"]]:
    """A partition of each prompt's tokens by `ROLES`, which makes prompts of different lengths comparable.

    A subject of one token is the last of the subject; one of two has nothing inside. Where the subject ends the
    prompt, its last token counts as the last of the subject, and `"last"` is empty. Teacher-forced tokens of the
    answer are in no role.
    """
    is_subject = subject(prompts)
    order = torch.arange(is_subject.shape[1], device=is_subject.device).expand_as(is_subject)
    last, first = _last_of(is_subject), _last_of(is_subject.flip(1)).flip(1)
    end = answer(prompts) & ~last
    real = prompts.attention_mask & (order <= prompts.positions[:, :1])
    before = real & (order < first.int().argmax(1, keepdim=True)) & ~end
    after = real & (order > last.int().argmax(1, keepdim=True)) & ~end
    first = first & ~last
    inside = real & ~(before | after | first | last | end)
    return dict(zip(ROLES, (before, first, inside, last, after, end), strict=True))


def _last_of(where: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Only the last True of each row that has one."""
    return where & (where.flip(1).cumsum(1).flip(1) == 1)
