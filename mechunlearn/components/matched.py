"""Random masks of as many weights as another: what says whether the place matters."""

from collections import Counter
from collections.abc import Iterable
from random import Random

from mechunlearn.components.component import (
    Component,
    Components,
    Cover,
    ModelShape,
    heads,
    layers,
    matrices,
    mlps,
    neurons,
    resolve,
)
from mechunlearn.components.mask import ComponentMask


def matched(mask: ComponentMask, seed: int, *, pool: Components | None = None) -> ComponentMask:
    """A random mask that covers as many weights as `mask`; see `mu.localize.random_like`, which is for users."""
    sizes = mask.shape
    members = sorted(set(resolve(pool, sizes))) if pool is not None else _same_kinds(mask, sizes)
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


def _matching(
    mask: ComponentMask, members: list[Component], generator: Random, *, by_kind: bool
) -> frozenset[Component]:
    """Members in random order for as long as they fit into the mask's number of weights."""
    sizes = mask.shape
    one_of_each = {member.kind: member for member in members}.values()
    target, smallest = mask.n_parameters, min((sizes.n_parameters([m]) for m in one_of_each), default=0)
    chosen, cover, count = [], Cover(sizes), 0
    for member in _drawn(members, mask if by_kind else (), sizes, generator):
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


def _same_kinds(mask: ComponentMask, sizes: ModelShape) -> list[Component]:
    kinds = {component.kind for component in mask}
    levels = (heads, mlps, layers, matrices, neurons)
    return sorted({c for level in levels for c in level(sizes) if c.kind in kinds})


def _drawn(
    members: list[Component], mask: Iterable[Component], sizes: ModelShape, generator: Random
) -> list[Component]:
    """In random order; first as many of each kind as the mask has, the largest kind first, then the rest."""
    shuffled = generator.sample(members, len(members))
    left = Counter(component.kind for component in mask)
    first, rest = [], []
    for member in shuffled:
        (first if left[member.kind] > 0 else rest).append(member)
        left[member.kind] -= 1
    weights = {member.kind: sizes.n_parameters([member]) for member in {m.kind: m for m in first}.values()}
    return sorted(first, key=lambda member: -weights[member.kind]) + rest
