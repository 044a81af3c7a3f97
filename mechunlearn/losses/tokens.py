"""Losses per token: of the answer's probability, of the distance to a distribution, or of the residual stream."""

import math
import operator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mechunlearn.model.classes import at_least_float32


def cross_entropy(logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, "token"]) -> Float[Tensor, "token"]:
    """-log p(target), in nats: to learn, retain or inject an answer. 0 at p = 1, without bound as p nears 0.

    Example: logits (0, log 3), target 1: p = 3/4, loss log(4/3) = 0.2877.
    """
    return functional.cross_entropy(at_least_float32(logits), targets, reduction="none")


def log_one_minus_probability(
    logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, "token"], *, cutoff: float = -5.0
) -> Float[Tensor, "token"]:
    """-log(1 - p(target)), in nats: to erase an answer without saying what should come instead.

    0 at p = 0, without bound as p nears 1. Computed as logsumexp over the vocabulary minus logsumexp over all but the
    target. A token whose log p is below `cutoff` (nats) contributes 0 to the sum but still counts in the mean: an
    implicit stop. The default, -5, stops at p = 0.0067 as the paper's code does; `-math.inf` never stops.

    Example: logits (0, log 3), target 1: p = 3/4, loss log 4 = 1.3863. Guo et al. 2025,
    https://arxiv.org/abs/2410.12949 (section 3.1), after Mazeika et al. 2024, https://arxiv.org/abs/2402.04249.
    """
    logits = at_least_float32(logits)
    total = logits.logsumexp(-1)
    others = logits.scatter(-1, targets[:, None], -torch.inf).logsumexp(-1)
    log_probability = logits.gather(-1, targets[:, None])[:, 0] - total
    return torch.where(log_probability.detach() < cutoff, torch.zeros_like(total), total - others)


def gradient_ascent(logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, "token"]) -> Float[Tensor, "token"]:
    """log p(target), in nats: cross-entropy with the other sign. 0 at p = 1.

    Has no lower end: as p nears 0 the loss still falls without bound. Bound the steps, or the model breaks.

    Example: logits (0, log 3), target 1: p = 3/4, loss log(3/4) = -0.2877. Jang et al. 2022,
    https://arxiv.org/abs/2210.01504.
    """
    return -cross_entropy(logits, targets)


def weighted_gradient_ascent(
    logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, "token"], *, beta: float = 1.0
) -> Float[Tensor, "token"]:
    """p(target)**beta * log p(target), the weight without a gradient: ascent that fades where the token is forgotten.

    In nats. 0 at p = 1 and at p = 0, with its lowest value -1 / (e beta) at p = exp(-1 / beta): past that point
    the loss rises while forgetting goes on, so watch p, not the loss. The default beta is that of open-unlearning.

    Example: logits (0, log 3), target 1: p = 3/4, loss 3/4 log(3/4) = -0.2158. Wang et al. 2025 (WGA),
    https://arxiv.org/abs/2502.19301.
    """
    log_probability = -cross_entropy(logits, targets)
    return (beta * log_probability.detach()).exp() * log_probability


def satimp(
    logits: Float[Tensor, "token d_vocab"],
    targets: Int[Tensor, "token"],
    *,
    saturation: float = 5.0,
    importance: float = 1.0,
) -> Float[Tensor, "token"]:
    """p^saturation (1 - p)^importance log p, with p = p(target), the weight without a gradient.

    In nats. Ascent that fades where the token is forgotten, as `weighted_gradient_ascent`, and where it is certain. 0
    at p = 0 and at p = 1; the weight is largest at p = saturation / (saturation + importance). An answer that the model
    is certain of gets nearly no gradient (p = 0.999: a weight of 0.001), so it may never be forgotten.

    Example: logits (0, log 3), target 1: p = 3/4, loss (3/4)^5 (1/4) log(3/4) = -0.0171. Yang et al. 2025 (SatImp,
    beta1 and beta2), https://arxiv.org/abs/2505.11953; the defaults are those of open-unlearning.
    """
    for name, value in (("saturation", saturation), ("importance", importance)):
        if not value >= 0:
            raise ValueError(f"expected {name} to be 0 or more, got {value}: it is an exponent; 0 leaves its part out.")
    log_probability = -cross_entropy(logits, targets)
    held = log_probability.detach()
    return (saturation * held).exp() * (-held.expm1()).pow(importance) * log_probability


def maximum_entropy(logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, "token"]) -> Float[Tensor, "token"]:
    """KL(uniform || p), in nats: to know nothing about the answer, whatever it is.

    0 where all tokens are equally likely; without bound as any token's p nears 0. The targets are not looked at.

    Example: logits (0, log 3): log(4/2) - log(3)/2 = 0.1438. Yuan et al. 2024, https://arxiv.org/abs/2410.08109.
    """
    logits = at_least_float32(logits)
    return logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])


def cross_entropy_unlearning(
    logits: Float[Tensor, "token d_vocab"], targets: Int[Tensor, "token"]
) -> Float[Tensor, "token"]:
    """Cross-entropy to the model's own prediction without the target, which has no gradient; in nats.

    The distribution that is learned is the softmax of the logits with the target's set to -inf: where the rest of
    the vocabulary stands to itself is kept, and nothing is pushed to minus infinity. At p(target) = 0 the loss is
    the entropy of the prediction, not 0; it grows without bound as p nears 1.

    Example: logits (0, 0, log 2), target 2: learned (1/2, 1/2, 0), loss log 4 = 1.3863. Yang 2025 (CE-U),
    https://arxiv.org/abs/2503.01224.
    """
    logits = at_least_float32(logits)
    wanted = logits.detach().scatter(-1, targets[:, None], -torch.inf).softmax(-1)
    return -(wanted * logits.log_softmax(-1)).sum(-1)


def undial(
    logits: Float[Tensor, "token d_vocab"],
    targets: Int[Tensor, "token"],
    original_logits: Float[Tensor, "token d_vocab"],
    *,
    beta: float = 10.0,
) -> Float[Tensor, "token"]:
    """Cross-entropy to the original model's prediction with `beta` taken off the target's logit; in nats.

        sum over v of -q(v) log p(v),   q = softmax(original_logits - beta * onehot(target))

    q divides the odds of the target by exp(beta): 22026 by default. The aim is fixed, so training settles there. The
    lowest value is the entropy of q, not 0, and differs from token to token. Without bound as p(target) nears 1. A beta
    of 0 is distillation of the original model; of inf, `cross_entropy_unlearning` with the original's prediction.

    Example: both logits (0, log 3), target 1, beta log 3: q = (1/2, 1/2), loss -log(1/4)/2 - log(3/4)/2 = 0.8370.
    Dong et al. 2024 (UNDIAL), https://arxiv.org/abs/2402.10052; the default is that of open-unlearning, whose
    authors suggest 3, 10 and 30.
    """
    if not beta >= 0:
        raise ValueError(f"expected beta to be 0 or more, got {beta}: it is taken off the target's logit.")
    original = at_least_float32(original_logits.detach())
    penalty = torch.full_like(original[:, :1], -beta)
    wanted = original.scatter_add(-1, targets[:, None], penalty).softmax(-1)
    return -(wanted * at_least_float32(logits).log_softmax(-1)).sum(-1)


def kl_to_original(
    logits: Float[Tensor, "token d_vocab"], original_logits: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, "token"]:
    """KL(original || edited), in nats: to keep saying what the model said, right or wrong, over the whole vocabulary.

        sum over v of p0(v) (log p0(v) - log p(v)),   p0 = softmax(original_logits)

    0 where nothing changed; without bound where p nears 0 for a token that the original gives. Its gradient
    vanishes at the start of training, where the two models are the same. Rounding near 0: about 1e-7.

    Example: original logits (0, 0), edited (0, log 3): log(2)/2 + log(2/3)/2 = 0.1438. Maini et al. 2024 (TOFU, "KL
    minimization"), https://arxiv.org/abs/2401.06121.
    """
    original = at_least_float32(original_logits.detach()).log_softmax(-1)
    return (original.exp() * (original - at_least_float32(logits).log_softmax(-1))).sum(-1)


def rmu(residual: Float[Tensor, "token d_model"], *, scale: float = 6.5, seed: int = 0) -> Float[Tensor, "token"]:
    """Mean over d_model of (h - scale * u)^2: steers the residual stream h to one fixed, random direction.

    u is drawn from the uniform distribution on [0, 1) in each dimension and divided by its norm. It depends on `seed`
    and d_model alone: every batch, run and device has the same. The unit is that of h squared. The loss is 0 where h =
    scale * u, and scale^2 / d_model where h = 0. It does not control what later layers make of h.

    `scale` has the unit of h: compare it with the norm of the model's own residual stream. The default is that of the
    paper for Zephyr-7B at layer 7 (Mixtral: 300), where the coefficient is 1 on the forget side and 1200 for
    `representation_matching` on the retain side.

    Example: d_model 1, so u = 1, whatever the seed; h = 2.5: (2.5 - 6.5)^2 = 16. Li et al. 2024,
    https://arxiv.org/abs/2403.03218.
    """
    drawn = torch.rand(residual.shape[-1], generator=torch.Generator().manual_seed(operator.index(seed)))
    aim = scale * (drawn / drawn.norm()).to(residual.device)
    return (at_least_float32(residual) - aim).square().mean(-1)


def representation_matching(
    residual: Float[Tensor, "token d_model"], original_residual: Float[Tensor, "token d_model"]
) -> Float[Tensor, "token"]:
    """Mean over d_model of (h - h_original)^2: keeps what the model computes, not only what it says.

    The unit is that of h squared. Where nothing changed, as at the start, the loss and its gradient are 0.

    Example: h = (1, 3), was (0, 1): (1 + 4) / 2 = 2.5. The retain side of RMU: Li et al. 2024,
    https://arxiv.org/abs/2403.03218.
    """
    return (at_least_float32(residual) - at_least_float32(original_residual.detach())).square().mean(-1)
