"""The training loop that editors (and relearning attacks) share: only the given entries move."""

from mechunlearn.training.checkpoints import Checkpoints
from mechunlearn.training.fitting import fit
from mechunlearn.training.movers import Master, Moving, collecting
from mechunlearn.training.optimizers import (
    MakesOptimizer,
    adamw,
    adamw_8bit,
    constant_schedule,
    cosine_schedule,
    warmup_schedule,
)
from mechunlearn.training.terms import Term

__all__ = [
    "Checkpoints", "MakesOptimizer", "Master", "Moving", "Term", "adamw", "adamw_8bit", "collecting",
    "constant_schedule", "cosine_schedule", "fit", "warmup_schedule",
]  # fmt: skip
