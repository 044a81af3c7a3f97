"""The shipped model: a small Llama that knows athletes and general knowledge, see MODEL_CARD.md."""

from mechunlearn.testbed.agreement import Agreement, agreement, within
from mechunlearn.testbed.facts_as_records import counterfact
from mechunlearn.testbed.plant import plant
from mechunlearn.testbed.planting import NotPlantedError
from mechunlearn.testbed.shipped import bridge, hooked, load, load_huggingface

__all__ = [
    "Agreement",
    "NotPlantedError",
    "agreement",
    "bridge",
    "counterfact",
    "hooked",
    "load",
    "load_huggingface",
    "plant",
    "within",
]
