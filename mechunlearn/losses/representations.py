"""Losses of the residual stream: lead it astray on what is to be forgotten, hold it on what is kept."""

import operator

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.losses.tokens import at_least_float32


def rmu(residual: Float[Tensor, "token d_model"], *, scale: float = 6.5, seed: int = 0) -> Float[Tensor, "token"]:
    """Mean over d_model of (h - scale * u)^2: steers the residual stream h to one fixed, random direction.

    u is drawn from the uniform distribution on [0, 1) in each dimension, then divided by its norm. It depends on
    `seed` and d_model alone: every batch, run and device has the same. Unit: that of h squared. 0 where h = scale * u,
    whose norm is `scale`; scale^2 / d_model where h = 0. It says nothing about what later layers make of h.

    `scale` has the unit of h: compare it with the norm of the model's own residual stream. The default is that
    of the paper for Zephyr-7B at layer 7 (Mixtral: 300); the forget side has a coefficient of 1 there, and
    `representation_matching` on the retain side one of 1200.

    Example: d_model 1, so u = 1, whatever the seed; h = 2.5: (2.5 - 6.5)^2 = 16. Li et al. 2024,
    https://arxiv.org/abs/2403.03218.
    """
    aim = scale * _direction(residual.shape[-1], seed).to(residual.device)
    return (at_least_float32(residual) - aim).square().mean(-1)


def representation_matching(
    residual: Float[Tensor, "token d_model"], original_residual: Float[Tensor, "token d_model"]
) -> Float[Tensor, "token"]:
    """Mean over d_model of (h - h_original)^2: to keep what the model computes, not only what it says.

    Unit: that of h squared. 0 where nothing changed, and so is its gradient there: at the start it does not act.

    Example: h = (1, 3), was (0, 1): (1 + 4) / 2 = 2.5. The retain side of RMU: Li et al. 2024,
    https://arxiv.org/abs/2403.03218.
    """
    return (at_least_float32(residual) - at_least_float32(original_residual.detach())).square().mean(-1)


def _direction(d_model: int, seed: int) -> Float[Tensor, "d_model"]:
    drawn = torch.rand(d_model, generator=torch.Generator().manual_seed(operator.index(seed)))
    return drawn / drawn.norm()
