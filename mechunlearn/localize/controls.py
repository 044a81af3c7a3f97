"""Random localizations, all MLPs and everything: the controls beside every claim."""

import operator

import torch

from mechunlearn.arguments import chosen_components
from mechunlearn.components import ComponentMask, Components, ComponentScores, heads_and_mlps, layers, matched, mlps
from mechunlearn.model import Model, shape


def random(
    model: Model,
    *,
    seed: int,
    components: Components = heads_and_mlps,
) -> ComponentScores:
    """Scores uniform in [0, 1), independent of the model's weights. Cost: none."""
    sizes = shape(model)
    chosen = chosen_components(components, sizes)
    values = torch.rand(len(chosen), generator=torch.Generator().manual_seed(operator.index(seed)), dtype=torch.float64)
    return ComponentScores(chosen, values, sizes, "random", "", {"seed": seed})


def random_like(
    mask: ComponentMask,
    model: Model,
    seed: int,
    *,
    pool: Components | None = None,
) -> ComponentMask:
    """A random mask that covers as many weights as `mask`: the control beside it.

    Without `pool`, two MLPs and three heads are matched by two MLPs and three heads drawn from all MLPs and
    all heads of the model, so that the control differs in place only. Some of the mask's own components may
    be among them (`provenance["shared"]` counts them), but never all: use several seeds, or pass a pool
    without them. With `pool`, components are drawn from it alone, of whatever kind.

    Components that would exceed the count are passed over, so the realised count is at most that of the
    mask and less than one smallest component of the pool below it. Where query heads share KV heads, which
    count once, the number of heads may differ by that. ValueError if the pool cannot cover so many weights
    or holds nothing but the mask.
    """
    sizes = shape(model)
    if mask.shape != sizes:
        raise ValueError(
            f"expected a mask of a model of the same shape ({sizes}), got one of {mask.shape}: "
            f"localize on the model that you edit."
        )
    return matched(mask, seed, pool=pool)


def all_mlps(model: Model) -> ComponentMask:
    """Every MLP of the model."""
    sizes = shape(model)
    return ComponentMask(frozenset(mlps(sizes)), sizes, {"method": "all_mlps"})


def everything(model: Model) -> ComponentMask:
    """Every attention layer and MLP: unlearning without localization (embeddings and norms stay frozen)."""
    sizes = shape(model)
    return ComponentMask(frozenset(layers(sizes)), sizes, {"method": "everything"})
