"""Everything that depends on TransformerLens and on architectures; nothing else in the package does."""

from mechunlearn.model.admission import check_editable, check_model, check_unforked
from mechunlearn.model.classes import Model, device_of, shape
from mechunlearn.model.guard import differentiable, fingerprint, preserved
from mechunlearn.model.hooks import Hook, recording, site
from mechunlearn.model.huggingface import n_parameters, save_huggingface
from mechunlearn.model.matrices import Slot, slots
from mechunlearn.model.running import embeddings, logits_at, residual_after, residual_before, running_from, unembedded
from mechunlearn.model.suffix import Run, base_run, continued, through_layer

__all__ = [
    "Hook",
    "Model",
    "Run",
    "Slot",
    "base_run",
    "check_editable",
    "check_model",
    "check_unforked",
    "continued",
    "device_of",
    "differentiable",
    "embeddings",
    "fingerprint",
    "logits_at",
    "n_parameters",
    "preserved",
    "recording",
    "residual_after",
    "residual_before",
    "running_from",
    "save_huggingface",
    "shape",
    "site",
    "slots",
    "through_layer",
    "unembedded",
]
