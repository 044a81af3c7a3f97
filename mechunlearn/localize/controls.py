"""Controls for a localization: random scores, random masks of equal size, all MLPs, and everything."""

import operator
from collections import Counter
from random import Random

import torch

from mechunlearn.arguments import chosen_components
from mechunlearn.components import Component, ComponentMask, Components, ComponentScores
from mechunlearn.components.component import Cover, heads, heads_and_mlps, layers, matrices, mlps, neurons, resolve
from mechunlearn.model import Model, shape


def random(model: Model, *, seed: int, components: Components = heads_and_mlps) -> ComponentScores:
    """Scores uniform in [0, 1), independent of the model's weights. Cost: none."""
    sizes = shape(model)
    chosen = chosen_components(components, sizes)
    values = torch.rand(len(chosen), generator=torch.Generator().manual_seed(operator.index(seed)), dtype=torch.float64)
    return ComponentScores(chosen, values, sizes, "random", "", {"seed": seed})


def random_like(mask: ComponentMask, model: Model, seed: int, *, pool: Components | None = None) -> ComponentMask:
    """A random mask that covers as many weights as `mask`: its control.

    Without `pool`, two MLPs and three heads are matched by two MLPs and three heads drawn from all MLPs and
    all heads of the model, so that the control differs in place only. Some of the mask's own components may
    be among them (`provenance["shared"]` counts them), but never all: use several seeds, or pass a pool
    without them. With `pool`, components are drawn from it alone, of whatever kind.

    Components that would exceed the count are passed over, so the control has at most as many weights as the mask, and
    falls short by less than one smallest component of the pool. Where query heads share KV heads, which count once, the
    number of heads may differ. ValueError if the pool cannot cover so many weights or holds nothing but the mask.
    """
    sizes = shape(model)
    if mask.shape != sizes:
        raise ValueError(
            f"expected a mask of a model of the same shape ({sizes}), got one of {mask.shape}: "
            f"localize on the model that you edit."
        )
    kinds, levels = {component.kind for component in mask}, (heads, mlps, layers, matrices, neurons)
    same_kinds = (component for level in levels for component in level(sizes) if component.kind in kinds)
    members = sorted(set(same_kinds if pool is None else resolve(pool, sizes)))
    generator = Random(f"random_like {seed}")
    for _ in range(100):
        chosen = _matching(mask, members, generator, by_kind=pool is None)
        if chosen != mask.components:
            break
    else:
        raise ValueError(
            f"expected a pool with other components than the mask's {len(mask)}, got one of {len(members)}: "
            f"a control equal to the mask is none; pass a larger pool, such as heads_and_mlps."
        )
    provenance = {"method": "random_like", "seed": seed, "weights": sizes.n_parameters(chosen)}
    provenance |= {"matched": mask.n_parameters, "shared": len(chosen & mask.components)}
    provenance["pool"] = "the same kinds" if pool is None else [str(member) for member in members]
    return ComponentMask(chosen, sizes, provenance)


def all_mlps(model: Model) -> ComponentMask:
    """Every MLP of the model."""
    sizes = shape(model)
    return ComponentMask(frozenset(mlps(sizes)), sizes, {"method": "all_mlps"})


def everything(model: Model) -> ComponentMask:
    """Every attention layer and MLP: unlearning without localization (embeddings and norms stay frozen)."""
    sizes = shape(model)
    return ComponentMask(frozenset(layers(sizes)), sizes, {"method": "everything"})


def _matching(
    mask: ComponentMask, members: list[Component], generator: Random, *, by_kind: bool
) -> frozenset[Component]:
    """Members in random order for as long as they fit into the mask's number of weights.

    By kind, as many of each as the mask has come first, the largest kind first.
    """
    sizes = mask.shape
    left = Counter(component.kind for component in mask if by_kind)
    first, rest = [], []
    for member in generator.sample(members, len(members)):
        (first if left[member.kind] > 0 else rest).append(member)
        left[member.kind] -= 1
    weights = {kind: sizes.n_parameters([member]) for kind, member in {m.kind: m for m in first}.items()}
    one_of_each = {member.kind: member for member in members}.values()
    target, smallest = mask.n_parameters, min((sizes.n_parameters([m]) for m in one_of_each), default=0)
    chosen, cover, count = [], Cover(sizes), 0
    for member in sorted(first, key=lambda member: -weights[member.kind]) + rest:
        gain = cover.gain(member)
        if 0 < gain <= target - count:
            chosen.append(member)
            cover.add(member)
            count += gain
    if not chosen or target - count >= smallest:
        raise ValueError(
            f"expected a pool that can cover {target:,} weights within one smallest component ({smallest:,}), got "
            f"{count:,} out of {len(members)} components: pass a larger pool or one with smaller components."
        )
    return frozenset(chosen)
