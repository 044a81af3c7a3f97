"""What a localization talks about: components, scores over them, and masks that select them."""

from mechunlearn.components.component import (
    Component,
    Components,
    ModelShape,
    heads,
    heads_and_mlps,
    layers,
    matrices,
    mlps,
    neurons,
    resolve,
)
from mechunlearn.components.mask import ComponentMask
from mechunlearn.components.scores import ComponentScores

__all__ = [
    "Component",
    "ComponentMask",
    "ComponentScores",
    "Components",
    "ModelShape",
    "heads",
    "heads_and_mlps",
    "layers",
    "matrices",
    "mlps",
    "neurons",
    "resolve",
]
