"""Losses: (logits, targets) -> one value per token, in nats. Lower is what training goes for.

The caller averages over the tokens that count (answers of forget and retain prompts, every token of a
text), so padding and prompt tokens never reach a loss. Any function of this signature is a loss.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

Loss: TypeAlias = Callable[[Float[Tensor, "token d_vocab"], Int[Tensor, "token"]], Float[Tensor, "token"]]
"""Any function of logits and targets that gives one value per token."""


def cross_entropy(logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, "token"]) -> Float[Tensor, "token"]:
    """-log p(target): to learn, retain or inject an answer.

    Example: logits (0, log 3), target 1: p = 3/4, loss log(4/3) = 0.2877.
    """
    return functional.cross_entropy(_at_least_float32(logits), targets, reduction="none")


def log_one_minus_probability(
    logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, "token"], *, cutoff: float = -5.0
) -> Float[Tensor, "token"]:
    """-log(1 - p(target)): to erase an answer without saying what should come instead.

    Computed as logsumexp over the vocabulary minus logsumexp over all but the target. A token whose
    log p is below `cutoff` (nats) contributes 0 to the sum but still counts in the mean: an implicit
    stop. The default, -5, stops at p = 0.0067 as the paper's code does; `-math.inf` never stops.

    Example: logits (0, log 3), target 1: p = 3/4, loss log 4 = 1.3863. Guo et al. 2025,
    https://arxiv.org/abs/2410.12949 (section 3.1), after Mazeika et al. 2024, https://arxiv.org/abs/2402.04249.
    """
    logits = _at_least_float32(logits)
    total = logits.logsumexp(-1)
    others = logits.scatter(-1, targets[:, None], -torch.inf).logsumexp(-1)
    log_probability = logits.gather(-1, targets[:, None])[:, 0] - total
    return torch.where(log_probability.detach() < cutoff, torch.zeros_like(total), total - others)


def gradient_ascent(logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, "token"]) -> Float[Tensor, "token"]:
    """log p(target): cross-entropy with the other sign. Has no lower end: bound the steps, or the model breaks.

    Example: logits (0, log 3), target 1: p = 3/4, loss log(3/4) = -0.2877. Jang et al. 2022,
    https://arxiv.org/abs/2210.01504.
    """
    return -cross_entropy(logits, targets)


def weighted_gradient_ascent(
    logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, "token"], *, beta: float = 1.0
) -> Float[Tensor, "token"]:
    """p(target)**beta * log p(target), the weight without a gradient: ascent that fades where the token is forgotten.

    Example: logits (0, log 3), target 1: p = 3/4, loss 3/4 log(3/4) = -0.2158. Wang et al. 2025 (WGA),
    https://arxiv.org/abs/2502.19301.
    """
    log_probability = -cross_entropy(logits, targets)
    return (beta * log_probability.detach()).exp() * log_probability


def maximum_entropy(logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, "token"]) -> Float[Tensor, "token"]:
    """KL(uniform || p): to know nothing about the answer, whatever it is; 0 where all tokens are equally likely.

    Example: logits (0, log 3): log(4/2) - log(3)/2 = 0.1438. Tamirisa et al. 2024, https://arxiv.org/abs/2408.00761.
    """
    logits = _at_least_float32(logits)
    return logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])


def cross_entropy_unlearning(
    logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, "token"]
) -> Float[Tensor, "token"]:
    """Cross-entropy to the model's own prediction without the target, which has no gradient.

    The distribution that is learned is the softmax of the logits with the target's set to -inf: where the rest of
    the vocabulary stands to itself is kept, and nothing is pushed to minus infinity.

    Example: logits (0, 0, log 2), target 2: learned (1/2, 1/2, 0), loss log 4 = 1.3863. Yang 2025 (CE-U),
    https://arxiv.org/abs/2503.01224.
    """
    logits = _at_least_float32(logits)
    wanted = logits.detach().scatter(-1, targets[:, None], -torch.inf).softmax(-1)
    return -(wanted * logits.log_softmax(-1)).sum(-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
