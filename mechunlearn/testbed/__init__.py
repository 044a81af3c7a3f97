"""The shipped model: a small Llama that knows athletes and general knowledge, see MODEL_CARD.md."""

from mechunlearn.tasks.facts import athletes
from mechunlearn.testbed.loading import bridge, counterfact, hooked, load, load_huggingface
from mechunlearn.testbed.overlap import Agreement, agreement, within
from mechunlearn.testbed.planting import NotPlantedError, plant

__all__ = [
    "Agreement", "NotPlantedError", "agreement", "athletes", "bridge", "counterfact", "hooked", "load",
    "load_huggingface", "plant", "within",
]  # fmt: skip
