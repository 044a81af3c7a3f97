"""The shipped model, which knows athletes and general knowledge, and a real pretrained one: see the cards."""

from mechunlearn.tasks.facts import athletes
from mechunlearn.testbed.loading import (
    bridge,
    counterfact,
    hooked,
    load,
    load_huggingface,
    smollm2,
    smollm2_huggingface,
)
from mechunlearn.testbed.overlap import Agreement, agreement, within
from mechunlearn.testbed.planting import NotPlantedError, plant

__all__ = [
    "Agreement", "NotPlantedError", "agreement", "athletes", "bridge", "counterfact", "hooked", "load",
    "load_huggingface", "plant", "smollm2", "smollm2_huggingface", "within",
]  # fmt: skip
