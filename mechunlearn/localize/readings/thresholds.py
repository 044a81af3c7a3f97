"""What thresholds make of evidence, and what lies so near to them that other prompts might decide otherwise."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from mechunlearn.components import Component, ComponentScores
from mechunlearn.localize.readings.probes import ProbeResult

MARGIN = 0.2
"""A value within this share of its threshold is borderline."""


def borderline(values: Mapping[str, float], threshold: float) -> dict[str, float]:
    """Label -> value, for the values that lie within 20 % of the threshold, on either side of it."""
    return {label: value for label, value in values.items() if abs(value - threshold) <= MARGIN * threshold}


def described_borderline(found: Mapping[str, Mapping[str, float]]) -> str:
    """What `borderline` found by each criterion, in words; "none" if nothing is near a threshold."""
    shown = [
        f"{name}: " + ", ".join(f"{label} ({value:.3g})" for label, value in sorted(values.items(), key=itemgetter(1)))
        for name, values in sorted(found.items())
        if values
    ]
    return "; ".join(shown) or "none"


def read_off(
    found: ProbeResult, rise: float, selectivity: float, saturation: float
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The layers from where both thresholds are passed to where accuracy saturates; and what is near a threshold."""
    risen, selective = (found.accuracy - found.chance)[1:].tolist(), found.selectivity[1:].tolist()
    share = _share_of_rise(found)
    above_chance = [layer for layer, value in enumerate(risen) if value > rise]
    above_control = [layer for layer, value in enumerate(selective) if value > selectivity]
    read = {
        "layers": _between(risen, selective, share, rise, selectivity, saturation),
        "first_layer_above_chance": next(iter(above_chance), None),
        "first_layer_above_control": next(iter(above_control), None),
    }
    missing = borderline(_by_mlp([1 - value for value in share]), 1 - saturation) if saturation < 1 else {}
    near = {
        "rise": borderline(_by_mlp(risen), rise),
        "selectivity": borderline(_by_mlp(selective), selectivity),
        "saturation": {label: 1 - value for label, value in missing.items()},
    }
    return read, near


def effects_near(scores: ComponentScores, threshold: float) -> dict[str, float]:
    """The components whose |effect| is near the threshold."""
    return borderline(_magnitudes(scores), threshold)


def heads_near_the_cut(scores: ComponentScores, count: int) -> dict[str, float]:
    """The components near the middle between the last one chosen and the next; none if all are chosen."""
    sizes = sorted(_magnitudes(scores).values(), reverse=True)
    return borderline(_magnitudes(scores), (sizes[count - 1] + sizes[count]) / 2) if count < len(sizes) else {}


def _between(
    risen: Sequence[float],
    selective: Sequence[float],
    share: Sequence[float],
    rise: float,
    selectivity: float,
    saturation: float,
) -> list[int]:
    """From the first layer above chance and control to the one that saturates; none if none is above both."""
    above = [layer for layer, (r, s) in enumerate(zip(risen, selective, strict=True)) if r > rise and s > selectivity]
    if not above:
        return []
    last = next(layer for layer, value in enumerate(share) if value >= saturation)
    return list(range(above[0], max(above[0], last) + 1))


def _share_of_rise(found: ProbeResult) -> list[float]:
    """For each layer's output, which share of the highest rise above chance has been reached; 1 at the last."""
    rises = (found.accuracy - found.chance).tolist()
    highest = max(rises)
    return [*(value / highest if highest > 0 else 0.0 for value in rises[1:-1]), 1.0]


def _by_mlp(values: Sequence[float]) -> dict[str, float]:
    return {str(Component(layer, "MLP")): value for layer, value in enumerate(values)}


def _magnitudes(scores: ComponentScores) -> dict[str, float]:
    return {str(component): abs(effect) for component, effect in scores.items()}
