"""Metrics: (logits, prompts) -> one value per prompt.

`logits` are those that predict the answer tokens, [batch, answer, d_vocab]: for answers of one token
`logits[:, 0]` is the last token of the prompt. Any function of this signature is a metric.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.identity import name_of
from mechunlearn.tasks.prompts import Prompts

__all__ = [
    "Metric", "answer_log_probability", "answer_probability", "candidate_probability", "is_top_of_candidates",
    "is_top_of_vocabulary", "logit_difference",
]  # fmt: skip

Metric: TypeAlias = Callable[[Float[Tensor, "batch answer d_vocab"], Prompts], Tensor]
"""Any function of logits and prompts that gives one value per prompt."""


def logit_difference(logits: Float[Tensor, "batch answer d_vocab"], prompts: Prompts) -> Float[Tensor, "batch"]:
    """Logit of the answer minus the mean logit of the other candidates, in nats.

    Positive when the answer is preferred. Needs candidates and answers of one token.
    """
    chosen = _candidate_logits(logits, prompts, "logit_difference")
    return chosen[:, 0] - chosen[:, 1:].mean(1)


def answer_log_probability(logits: Float[Tensor, "batch answer d_vocab"], prompts: Prompts) -> Float[Tensor, "batch"]:
    """Log probability of the whole answer, in nats: the sum over its tokens, each given the ones before."""
    real = prompts.answer_mask
    log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    of_tokens = log_probabilities.gather(-1, prompts.answers.clamp(min=0)[..., None])[..., 0]
    return of_tokens.masked_fill(~real, 0.0).sum(1)


def answer_probability(logits: Float[Tensor, "batch answer d_vocab"], prompts: Prompts) -> Float[Tensor, "batch"]:
    """Probability of the whole answer, in [0, 1]."""
    return answer_log_probability(logits, prompts).exp()


def is_top_of_vocabulary(logits: Float[Tensor, "batch answer d_vocab"], prompts: Prompts) -> Bool[Tensor, "batch"]:
    """True where every answer token is the argmax over the vocabulary (teacher forced). Chance is about 0."""
    return ((logits.argmax(-1) == prompts.answers) | ~prompts.answer_mask).all(1)


def is_top_of_candidates(logits: Float[Tensor, "batch answer d_vocab"], prompts: Prompts) -> Bool[Tensor, "batch"]:
    """True where the answer has the highest logit among the candidates. Chance is 1 / candidates.

    A tie with another candidate counts as wrong. Compares first tokens, so answers of several tokens are allowed.
    """
    chosen = _candidate_logits(logits, prompts, "is_top_of_candidates", several_tokens=True)
    return chosen[:, 0] > chosen[:, 1:].amax(1)


def candidate_probability(logits: Float[Tensor, "batch answer d_vocab"], prompts: Prompts) -> Float[Tensor, "batch"]:
    """Probability of the answer after a softmax over the candidates alone. Chance is 1 / candidates.

    Its mean is what Guo et al. (2025, https://arxiv.org/abs/2410.12949) call accuracy.
    """
    return _candidate_logits(logits, prompts, "candidate_probability", several_tokens=True).softmax(1)[:, 0]


def scored(metric: Metric, logits: Callable[[Prompts], Tensor], prompts: Prompts) -> Tensor:
    """The metric's values, by whole answers where the prompts have options; checked as by `checked`.

    `logits` gives those of prompts. With options, the probability of the right ones counts (their sum): among the
    options, if some are wrong, and in the vocabulary otherwise. Metrics of one's own see the answer alone.
    """
    if prompts.options is None or prompts.n_right is None or metric not in _WHOLE:
        return checked(metric, logits(prompts), prompts)
    is_option = prompts.options[..., 0] >= 0
    is_right = torch.arange(is_option.shape[1], device=is_option.device) < prompts.n_right[:, None]
    among = metric in (candidate_probability, is_top_of_candidates) and bool((is_option & ~is_right).any())
    if metric is is_top_of_candidates and not among:
        return checked(metric, logits(prompts), prompts)  # which says that there are none
    counted = is_option if among else is_right
    of_one = is_top_of_vocabulary if metric is is_top_of_vocabulary else answer_log_probability
    columns = []
    for place in range(int(counted.sum(1).max())):
        chosen = prompts.choosing(place)
        columns.append(checked(of_one, logits(chosen), chosen).float())
    values, counted = torch.stack(columns, 1), counted[:, : len(columns)]
    right = counted & is_right[:, : len(columns)]
    if metric is is_top_of_vocabulary:
        return (right & values.bool()).any(1)
    values = values.masked_fill(~counted, -torch.inf)
    if metric is is_top_of_candidates:
        best_wrong = values.masked_fill(right, -torch.inf).amax(1)
        return values.masked_fill(~right, -torch.inf).amax(1) > best_wrong
    total = values.masked_fill(~right, -torch.inf).logsumexp(1)
    total = total - values.logsumexp(1) if among else total
    return total if metric is answer_log_probability else total.exp()


_WHOLE = (
    answer_log_probability,
    answer_probability,
    candidate_probability,
    is_top_of_candidates,
    is_top_of_vocabulary,
)
"""The metrics that whole answers can be scored by."""


def checked(metric: Metric, logits: Float[Tensor, "batch answer d_vocab"], prompts: Prompts) -> Tensor:
    """The metric's values; ValueError unless they are one finite number per prompt."""
    values = metric(logits, prompts)
    name = name_of(metric)
    if not isinstance(values, Tensor) or values.shape != (len(prompts),):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"expected {name} to give one value per prompt, shape ({len(prompts)},), got {got}: "
            f"do not average inside the metric."
        )
    if not bool(torch.isfinite(values).all()):
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        raise ValueError(
            f"expected finite values of {name}, got NaN or infinity for prompts {bad[:5]}: "
            f"check the metric and the model's dtype."
        )
    return values


def _candidate_logits(
    logits: Float[Tensor, "batch answer d_vocab"], prompts: Prompts, name: str, *, several_tokens: bool = False
) -> Float[Tensor, "batch candidate"]:
    if prompts.candidates is None:
        raise ValueError(
            f"expected prompts with candidate answers for {name}, got none: pass candidates=... when building "
            f"them, or use answer_log_probability."
        )
    longest = int(prompts.answer_mask.sum(1).max())
    if longest > 1 and not several_tokens:
        raise ValueError(
            f"expected answers of one token for {name}, got answers of up to {longest}: "
            f"use answer_log_probability, which scores whole answers."
        )
    return logits[:, 0].gather(1, prompts.candidates).to(torch.promote_types(logits.dtype, torch.float32))
