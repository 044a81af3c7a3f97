"""Change it there. Each editor: (model, task, mask) -> `Edit`; the model is left as it was."""

from mechunlearn.edit.alpha_edit import alpha_edit
from mechunlearn.edit.arithmetic import combined, scaled, zeroed
from mechunlearn.edit.closed_form import eigenvalues_below, smallest_eigenvalues
from mechunlearn.edit.contexts import generated_prefixes
from mechunlearn.edit.dampened import dampened
from mechunlearn.edit.finetune import finetune
from mechunlearn.edit.ft_l import ft_l
from mechunlearn.edit.gradient_mask import LocalizedTraining, gradient_mask
from mechunlearn.edit.key_covariance import KeyCovariance, key_covariance
from mechunlearn.edit.learn_weight_mask import distance_from_one, learn_weight_mask, mask_value
from mechunlearn.edit.learn_weight_mask_in_place import (
    distance_from_original,
    learn_weight_mask_in_place,
    magnitude,
)
from mechunlearn.edit.learned_mask import LearnedMask
from mechunlearn.edit.lora import lora
from mechunlearn.edit.mean_ablated import mean_ablated
from mechunlearn.edit.memit import memit
from mechunlearn.edit.presets import PAPER_PRODUCT, PAPER_STAGES, paper_settings
from mechunlearn.edit.rome import rome
from mechunlearn.edit.search import Search, Trial, search
from mechunlearn.edit.sequence import EditSequence, sequence
from mechunlearn.edit.task_vector import learned_further, task_vector
from mechunlearn.edit.weight_mask import MaskTraining, weight_mask
from mechunlearn.training import adamw, adamw_8bit
from mechunlearn.weights import Edit

__all__ = [
    "PAPER_PRODUCT",
    "PAPER_STAGES",
    "Edit",
    "EditSequence",
    "KeyCovariance",
    "LearnedMask",
    "LocalizedTraining",
    "MaskTraining",
    "Search",
    "Trial",
    "adamw",
    "adamw_8bit",
    "alpha_edit",
    "combined",
    "dampened",
    "distance_from_one",
    "distance_from_original",
    "eigenvalues_below",
    "finetune",
    "ft_l",
    "generated_prefixes",
    "gradient_mask",
    "key_covariance",
    "learn_weight_mask",
    "learn_weight_mask_in_place",
    "learned_further",
    "lora",
    "magnitude",
    "mask_value",
    "mean_ablated",
    "memit",
    "paper_settings",
    "rome",
    "scaled",
    "search",
    "sequence",
    "smallest_eigenvalues",
    "task_vector",
    "weight_mask",
    "zeroed",
]
