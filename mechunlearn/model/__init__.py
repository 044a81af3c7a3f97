"""Everything that depends on TransformerLens and on architectures; nothing else in the package does."""

from mechunlearn.model.admission import check_editable, check_model
from mechunlearn.model.classes import Model, device_of, shape
from mechunlearn.model.guard import differentiable, fingerprint, preserved
from mechunlearn.model.hooks import Hook, recording, site
from mechunlearn.model.huggingface import n_parameters, save_huggingface
from mechunlearn.model.matrices import Slot, slots
from mechunlearn.model.running import logits_at
from mechunlearn.model.suffix import Run, base_run, continued

__all__ = [
    "Hook", "Model", "Run", "Slot", "base_run", "check_editable", "check_model", "continued",
    "device_of", "differentiable", "fingerprint", "logits_at", "n_parameters", "preserved", "recording",
    "save_huggingface", "shape", "site", "slots",
]  # fmt: skip
