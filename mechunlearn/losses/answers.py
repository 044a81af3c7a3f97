"""Losses of whole answers: make one less likely than it was, or than another. One value per row (prompt)."""

import math

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mechunlearn.model.classes import at_least_float32


def npo(
    log_probability: Float[Tensor, "row"], original_log_probability: Float[Tensor, "row"], *, beta: float = 0.1
) -> Float[Tensor, "row"]:
    """Negative preference optimization: ascent that fades as the answer gets less likely than it was; in nats.

        -(2 / beta) log sigmoid(-beta r),   r = log p(answer) - log p_original(answer)

    (2 / beta) log 2 at r = 0 (13.8629 by default: the value at the start); 0 as p nears 0; about 2 r for large r. Its
    slope in r is 2 sigmoid(beta r): 1 at the start, which is `gradient_ascent` of the answer's sum, and half of that at
    r = -log(3) / beta (-11 nats). So the smaller beta, the longer it acts as ascent, and as beta nears 0 it is that
    plus a constant. It does not know what p was: an answer that was hardly known is pushed as hard as one that was
    certain.

    Example: p = 1/4, was 3/4, beta 1: r = log(1/3), sigmoid(-r) = 3/4, loss 2 log(4/3) = 0.5754. Zhang et al. 2024,
    https://arxiv.org/abs/2404.05868, whose beta is the default.
    """
    return _less_preferred(_ratio(log_probability, original_log_probability), beta)


def simnpo(
    log_probability: Float[Tensor, "row"], length: Int[Tensor, "row"], *, beta: float = 4.5, margin: float = 0.0
) -> Float[Tensor, "row"]:
    """NPO without the original model, of the mean over the answer's tokens; in nats.

        -(2 / beta) log sigmoid(beta (-log p(answer) / length - margin))

    At margin 0: (2 / beta) log 2 at p = 1 (0.3081 by default), 0 as p nears 0. Its slope in the mean log p is 1 at p =
    1, and 1/6 where the geometric mean of the tokens' p is 0.59, by default: it stops early. With a `margin` (nats per
    token) the slope is 1 where the mean -log p is `margin`, and fades beyond. The paper's gamma is beta * margin.

    Example: p = 1/9 over 2 tokens, beta 1: mean log p = -log 3, sigmoid(log 3) = 3/4, loss 2 log(4/3) = 0.5754.
    Fan et al. 2024, https://arxiv.org/abs/2410.07163. The defaults are those of open-unlearning; the authors' own beta
    for TOFU is 2.5, with a coefficient of 0.1375.
    """
    return _less_preferred(at_least_float32(log_probability) / length + margin, beta)


def dpo(
    log_probability: Float[Tensor, "row"],
    alternative_log_probability: Float[Tensor, "row"],
    original_log_probability: Float[Tensor, "row"],
    original_alternative_log_probability: Float[Tensor, "row"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, "row"]:
    """Direct preference optimization: prefer the alternative ("I don't know", an injected answer) to the answer.

        -(2 / beta) log sigmoid(beta (r_alternative - r)),   r = log p(answer) - log p_original(answer)

    and r_alternative the same of the alternative; in nats. (2 / beta) log 2 where both are as likely as they were, or
    changed by the same factor (13.8629 by default: the value at the start); 0 as the alternative gains over the answer.
    Only the difference counts: it can fall while both get less likely, and the model says a third thing.

    Example: p from 3/4 to 1/4, alternative as it was, beta 1: loss 2 log(4/3) = 0.5754, as `npo`. Rafailov et al. 2023,
    https://arxiv.org/abs/2305.18290, for unlearning Zhang et al. 2024, https://arxiv.org/abs/2404.05868, whose beta is
    the default. The factor 2 / beta makes it comparable to `npo`; Rafailov et al. have 1.
    """
    ratio = _ratio(log_probability, original_log_probability)
    alternative = _ratio(alternative_log_probability, original_alternative_log_probability)
    return _less_preferred(ratio - alternative, beta)


def _ratio(now: Float[Tensor, "row"], original: Float[Tensor, "row"]) -> Float[Tensor, "row"]:
    """How much more likely than it was, in nats."""
    return at_least_float32(now) - at_least_float32(original.detach())


def _less_preferred(reward: Float[Tensor, "row"], beta: float) -> Float[Tensor, "row"]:
    """Falls with the reward, to 0; logsigmoid, since the sigmoid itself underflows."""
    if not 0 < beta < math.inf:
        raise ValueError(f"expected a positive, finite beta, got {beta}: the papers use 0.1 to 4.5.")
    return -2 / beta * functional.logsigmoid(-beta * reward)
