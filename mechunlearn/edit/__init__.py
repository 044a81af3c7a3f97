"""Change it there. Each editor: (model, task, mask) -> `Edit`; the model is left as it was."""

from mechunlearn.edit.arithmetic import combined, dampened, learned_further, mean_ablated, scaled, task_vector, zeroed
from mechunlearn.edit.finetuning import finetune, ft_l
from mechunlearn.edit.inject.facts import generated_prefixes
from mechunlearn.edit.inject.keys import KeyCovariance, key_covariance
from mechunlearn.edit.inject.mass_editing import alpha_edit, memit
from mechunlearn.edit.inject.rank_one import rome
from mechunlearn.edit.inject.solving import eigenvalues_below, smallest_eigenvalues
from mechunlearn.edit.learned_masks import LearnedMask
from mechunlearn.edit.low_rank import lora
from mechunlearn.edit.own_loop import LocalizedTraining, MaskTraining, gradient_mask, weight_mask
from mechunlearn.edit.paper import PAPER_PRODUCT, PAPER_STAGES, paper_settings
from mechunlearn.edit.searching import Search, Trial, search, trials
from mechunlearn.edit.sequences import EditSequence, sequence
from mechunlearn.edit.weight_masks import (
    distance_from_one,
    distance_from_original,
    learn_weight_mask,
    learn_weight_mask_in_place,
    magnitude,
    mask_value,
)
from mechunlearn.training import adamw, adamw_8bit, constant_schedule, cosine_schedule, warmup_schedule
from mechunlearn.weights import Edit, Editor

__all__ = [
    "PAPER_PRODUCT", "PAPER_STAGES", "Edit", "EditSequence", "Editor", "KeyCovariance", "LearnedMask",
    "LocalizedTraining", "MaskTraining", "Search", "Trial", "adamw", "adamw_8bit", "alpha_edit", "combined",
    "constant_schedule", "cosine_schedule", "dampened", "distance_from_one", "distance_from_original",
    "eigenvalues_below", "finetune",
    "ft_l", "generated_prefixes", "gradient_mask", "key_covariance", "learn_weight_mask", "learn_weight_mask_in_place",
    "learned_further", "lora", "magnitude", "mask_value", "mean_ablated", "memit", "paper_settings", "rome",
    "scaled", "search", "sequence", "smallest_eigenvalues", "task_vector", "trials", "warmup_schedule", "weight_mask",
    "zeroed",
]  # fmt: skip
