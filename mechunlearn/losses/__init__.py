"""Losses: pure functions whose parameters' names say what they are given. Lower is what training goes for.

A loss of logits or of the residual stream gives one value per token, one of log-probabilities one per answer; the
caller averages. Only real answer tokens come in, no padding. Any function with parameters of `losses.inputs` is a loss.
"""

from mechunlearn.losses.answers import dpo, npo, simnpo
from mechunlearn.losses.inputs import Loss, is_per_row, needs
from mechunlearn.losses.tokens import (
    cross_entropy,
    cross_entropy_unlearning,
    gradient_ascent,
    kl_to_original,
    log_one_minus_probability,
    maximum_entropy,
    representation_matching,
    rmu,
    satimp,
    undial,
    weighted_gradient_ascent,
)

__all__ = [
    "Loss", "cross_entropy", "cross_entropy_unlearning", "dpo", "gradient_ascent", "is_per_row", "kl_to_original",
    "log_one_minus_probability", "maximum_entropy", "needs", "npo", "representation_matching", "rmu", "satimp",
    "simnpo", "undial", "weighted_gradient_ascent",
]  # fmt: skip
