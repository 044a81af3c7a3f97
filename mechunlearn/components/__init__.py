"""What a localization talks about: components, scores over them, and masks that select them."""

from mechunlearn.components.component import (
    Component,
    ModelShape,
    heads,
    heads_and_mlps,
    layers,
    matrices,
    mlps,
    neurons,
)
from mechunlearn.components.mask import ComponentMask
from mechunlearn.components.scores import ComponentScores

__all__ = [
    "Component",
    "ComponentMask",
    "ComponentScores",
    "ModelShape",
    "heads",
    "heads_and_mlps",
    "layers",
    "matrices",
    "mlps",
    "neurons",
]
