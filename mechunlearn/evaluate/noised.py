"""Attack: noise on the weights, which may shake an edit off before it shakes the knowledge."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.evaluate.attacked import Asked, worst_case
from mechunlearn.evaluate.halves import formatted
from mechunlearn.evaluate.result import Result
from mechunlearn.metrics import Metric, candidate_probability
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Entries, select
from mechunlearn.weights.rewritten import every_entry, rewritten


def noised(
    model: Model,
    task: Task,
    *,
    scales: Sequence[float] = (0.0, 0.01, 0.03, 0.1, 0.3),
    mask: ComponentMask | None = None,
    draws: int = 3,
    format: str | None = None,
    metric: Metric = candidate_probability,
    seed: int = 0,
) -> Result:
    """Accuracy on the forgotten facts with Gaussian noise on the weights: one point per scale, and the best.

    Each weight of a matrix W gets scale * RMS(W) * N(0, 1). `mask`: whose weights, such as `edit.mask` (default: every
    matrix of attention and MLPs). A point is the mean over `draws`; the scales share their draws, and both model
    classes and all devices get the same noise. Nothing is trained, so all forgotten facts of the test split count. The
    control has the same questions about nobody.

    The scale 0 comes first, whether it is asked for or not. Cost: 1 + draws * scales F; memory: the masked matrices
    once more. ValueError for a negative scale and for no draws.
    """
    if draws < 1 or min(scales, default=0.0) < 0:
        raise ValueError(f"expected scales of 0 or more and at least one draw, got {tuple(scales)} and {draws} draws.")
    entries = every_entry(model) if mask is None else select(model, mask)
    asked = Asked.of(model, task, formatted(task, format), metric=metric, seed=seed)
    runs = {"0": [asked.scores_of(model)]}
    for scale in sorted({*scales} - {0.0}):
        found = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(1000 * seed + draw)
            with rewritten(model, entries, lambda e, scale=scale, g=generator: with_noise(e, scale, g)):
                found.append(asked.scores_of(model))
        runs[f"{scale:g}"] = [torch.stack(found).mean(0)]
    return worst_case(runs, asked, axis="noise, in root mean squares of each matrix")


def with_noise(entries: Entries, scale: float, generator: torch.Generator) -> Float[Tensor, "unit width d_model"]:
    """The entries with noise added, relative to the root mean square of their whole matrix."""
    parameter = entries.slot.parameter.detach()
    precise = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    noise = torch.randn(entries.read(precise).shape, generator=generator).to(precise)
    return entries.read(precise) + scale * precise.square().mean().sqrt() * noise
