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
)
from mechunlearn.components.edge import Edge, destinations, edges, sources
from mechunlearn.components.edge_scores import EdgeMask, EdgeScores
from mechunlearn.components.mask import ComponentMask
from mechunlearn.components.plot import dressed, looks
from mechunlearn.components.scores import ComponentScores, PositionScores

__all__ = [
    "Component", "ComponentMask", "ComponentScores", "Components", "Edge", "EdgeMask", "EdgeScores", "ModelShape",
    "PositionScores", "destinations", "dressed", "edges", "heads", "heads_and_mlps", "layers", "looks", "matrices",
    "mlps", "neurons", "sources",
]  # fmt: skip
