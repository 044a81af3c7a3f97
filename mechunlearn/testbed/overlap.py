"""Agreement of a localization with the true one, where that is known."""

from dataclasses import dataclass

from mechunlearn.components import Component, ComponentMask, ComponentScores, heads_and_mlps
from mechunlearn.components.component import Cover


@dataclass(frozen=True)
class Agreement:
    """How well scores, or a mask, agree with the components that hold the facts."""

    auroc: float
    """Probability that a true component scores higher (by size) than another; ties count half. Chance: 0.5."""
    auroc_of_weights: float
    """The same probability for a random weight of the truth and a random other weight. Chance: 0.5."""
    precision: float
    """Share of true ones among as many of the highest-scoring components as the truth has."""
    chance: float
    """Expected precision of random scores: the share of true components."""
    covered: float
    """Share of the truth's weights that a mask of at most as many weights covers, as `within` selects it."""


def agreement(scores: ComponentScores | ComponentMask, truth: ComponentMask) -> Agreement:
    """How well scores, by their size, agree with the components that hold the facts.

    A component is true if `truth` covers at least half of its weights, so an attention layer makes each of its heads
    true. A mask counts as scores of 1 for the heads and MLPs of which it covers at least half, and of 0 for the others.
    Where scores are tied, precision is the expected one. Some of the scored components must be true and some not.
    """
    from sklearn.metrics import roc_auc_score

    if scores.shape != truth.shape:
        raise ValueError(f"expected scores of a model of the truth's shape ({truth.shape}), got {scores.shape}.")
    ranked = scores
    if isinstance(ranked, ComponentMask):
        members = {member: float(is_covered(member, ranked)) for member in heads_and_mlps(ranked.shape)}
        ranked = ComponentScores.of(members, ranked.shape)
    sizes = ranked.tensor.abs().tolist()
    true = [is_covered(component, truth) for component in ranked.components]
    if all(true) or not any(true):
        raise ValueError(
            f"expected some scored components in the truth and some not, got {sum(true)} of {len(true)}: score heads "
            f"and MLPs, or take another truth."
        )
    weights = [truth.shape.n_parameters([component]) for component in ranked.components]
    mask = scores if isinstance(scores, ComponentMask) else within(scores, truth.n_parameters)
    return Agreement(
        float(roc_auc_score(true, sizes)),
        float(roc_auc_score(true, sizes, sample_weight=weights)),
        _precision(sizes, true),
        sum(true) / len(true),
        _n_shared(mask, truth) / truth.n_parameters,
    )


def within(scores: ComponentScores, parameters: int) -> ComponentMask:
    """The components that score highest (by size) within a budget of weights, without those that would exceed it.

    `scores.top(parameters=...)` ends at the first component that exceeds the budget. This function goes on to smaller
    ones of lower rank, so that localizations by heads and by MLPs have about as many weights. Of equals the first in
    the model comes first.
    """
    ranks = {component: (-abs(value), component) for component, value in scores.items()}
    chosen: list[Component] = []
    cover, count = Cover(scores.shape), 0
    for component in sorted(ranks, key=lambda component: ranks[component]):
        gain = cover.gain(component)
        if count + gain <= parameters:
            chosen.append(component)
            cover.add(component)
            count += gain
    if not chosen:
        raise ValueError(f"expected a budget that holds at least one component, got {parameters:,} weights.")
    about = {"method": scores.method, "metric": scores.metric, "settings": dict(scores.settings), "within": parameters}
    return ComponentMask(frozenset(chosen), scores.shape, about)


def is_covered(component: Component, mask: ComponentMask) -> bool:
    """Whether the mask covers at least half of the component's weights."""
    own = ComponentMask(frozenset({component}), mask.shape)
    return 2 * _n_shared(own, mask) >= own.n_parameters


def _n_shared(a: ComponentMask, b: ComponentMask) -> int:
    return a.n_parameters + b.n_parameters - a.shape.n_parameters({*a, *b})


def _precision(sizes: list[float], true: list[bool]) -> float:
    """The share of true ones among the `sum(true)` largest; ties at the edge count by their share of true ones."""
    count = sum(true)
    edge = sorted(sizes, reverse=True)[count - 1]
    above = [right for size, right in zip(sizes, true, strict=True) if size > edge]
    tied = [right for size, right in zip(sizes, true, strict=True) if size == edge]
    return (sum(above) + (count - len(above)) * sum(tied) / len(tied)) / count
