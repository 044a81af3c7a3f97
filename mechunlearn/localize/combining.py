"""Combinations of scores: forget against retain, sizes instead of signs, per weight, means of several.

Each function takes scores over the same components (in any order; the first one's is kept) and gives new scores. Only
`mean_absolute` keeps per-prompt values: forget and retain are different prompts. ValueError for scores over other
components or of a model of another shape.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import ComponentScores


def contrast(forget: ComponentScores, retain: ComponentScores, *, weight: float = 1.0) -> ComponentScores:
    """forget - weight * retain, for components that matter to one task and not to the other.

    Signs are kept: take `mean_absolute` or `absolute` of both first to contrast sizes.
    """
    values = forget.tensor - weight * _aligned(forget, retain)
    return _combination("contrast", values, {"forget": forget, "retain": retain}, weight=weight)


def ratio(forget: ComponentScores, retain: ComponentScores, *, damping: float = 0.0) -> ComponentScores:
    """|forget| / (|retain| + damping), as selective synaptic dampening ranks weights by their Fisher information.

    High = matters much more to forget than to retain; 1 = as much to both (without damping). ValueError where a retain
    score is 0 without damping. Foster et al. 2024, https://arxiv.org/abs/2308.07707.
    """
    if damping < 0:
        raise ValueError(f"expected a damping of at least 0, got {damping}.")
    below = _aligned(forget, retain).abs() + damping
    if bool((below == 0).any()):
        zero = [str(c) for c, value in zip(forget.components, below.tolist(), strict=True) if value == 0]
        raise ValueError(
            f"expected retain scores other than 0, got 0 at {', '.join(zero[:5])}: pass damping=..., or use contrast."
        )
    return _combination("ratio", forget.tensor.abs() / below, {"forget": forget, "retain": retain}, damping=damping)


def standardised_difference(forget: ComponentScores, retain: ComponentScores) -> ComponentScores:
    """Difference of z-scores over the components: forget's scale and retain's need not be the same.

    In standard deviations; adding a constant to either side's scores, or a positive factor, changes nothing.
    """
    values = _standardised(forget.tensor, "forget") - _standardised(_aligned(forget, retain), "retain")
    return _combination("standardised_difference", values, {"forget": forget, "retain": retain})


def rank_difference(forget: ComponentScores, retain: ComponentScores) -> ComponentScores:
    """Difference of the ranks of |score|, as shares: (rank in forget - rank in retain) / (components - 1), in [-1, 1].

    1 = the largest of forget's scores and the smallest of retain's. Equal scores share their mean rank.
    """
    if len(forget) < 2:
        raise ValueError("expected at least two components to rank, got one.")
    difference = ranks(forget.tensor.abs()) - ranks(_aligned(forget, retain).abs())
    return _combination("rank_difference", difference / (len(forget) - 1), {"forget": forget, "retain": retain})


def absolute(scores: ComponentScores) -> ComponentScores:
    """|score|. In scores, effects of opposite sign on different prompts have cancelled already: see `mean_absolute`."""
    return _combination("absolute", scores.tensor.abs(), {"of": scores})


def mean_absolute(scores: ComponentScores) -> ComponentScores:
    """The mean over prompts of |effect|, by which the AtP papers rank, from any method with per-prompt values.

    It keeps per-prompt values (the sizes), so it has intervals. Kramár et al. 2024, https://arxiv.org/abs/2403.00745.
    """
    if scores.per_prompt is None:
        raise ValueError(
            f"expected scores with per-prompt values, got none: {scores.method} does not give them; use absolute, "
            f"which takes the size of the mean."
        )
    sizes = scores.per_prompt.abs()
    return _combination("mean_absolute", sizes.mean(0), {"of": scores}, per_prompt=sizes)


def per_weight(scores: ComponentScores) -> ComponentScores:
    """Score divided by the component's number of weights, since sums over weights favour large components."""
    counts = torch.tensor([scores.shape.n_parameters([component]) for component in scores], dtype=torch.float64)
    return _combination("per_weight", scores.tensor.double().cpu() / counts, {"of": scores})


def average(*scores: ComponentScores) -> ComponentScores:
    """The mean of several scores, such as those of seeds, prompt formats or tasks. All count the same."""
    if not scores:
        raise ValueError("expected at least one ComponentScores, got none.")
    values = torch.stack([_aligned(scores[0], other) for other in scores]).mean(0)
    return _combination("average", values, {str(place): one for place, one in enumerate(scores)})


def _aligned(first: ComponentScores, second: ComponentScores) -> Float[Tensor, "component"]:
    """The second scores' values in the first ones' order."""
    if first.shape != second.shape:
        raise ValueError(
            f"expected scores of models of the same shape, got {first.shape} and {second.shape}: "
            f"compute both on one model."
        )
    missing = sorted(set(first.components) ^ set(second.components))
    if missing:
        shown = ", ".join(str(component) for component in missing[:5])
        raise ValueError(
            f"expected scores over the same components, got {len(missing)} that only one of them has ({shown}): "
            f"compute both with the same components=..."
        )
    return torch.tensor([second[component] for component in first.components], dtype=torch.float64)


def _standardised(values: Float[Tensor, "component"], name: str) -> Float[Tensor, "component"]:
    spread = float(values.double().std()) if len(values) > 1 else 0.0
    if spread == 0:
        raise ValueError(f"expected {name} scores that differ between components, got the same everywhere.")
    return (values.double() - values.double().mean()) / spread


def ranks(values: Float[Tensor, "component"]) -> Float[Tensor, "component"]:
    """Ranks of values: 0 for the smallest; equal values share the mean of their ranks."""
    _, group, counts = values.double().unique(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    return (first + (counts - 1) / 2)[group]


def _combination(
    method: str, values: Tensor, operands: dict[str, ComponentScores], per_prompt: Tensor | None = None, **options: Any
) -> ComponentScores:
    """New scores of the first operand's components, with the origin of every operand in the settings."""
    first = next(iter(operands.values()))
    metrics = list(dict.fromkeys(scores.metric for scores in operands.values()))
    sources = {n: {"method": s.method, "metric": s.metric, "settings": dict(s.settings)} for n, s in operands.items()}
    label = metrics[0] if len(metrics) == 1 else ", ".join(metrics)
    values = values.double().cpu()
    return ComponentScores(first.components, values, first.shape, method, label, {**options, **sources}, per_prompt)
