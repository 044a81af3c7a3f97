"""Attacks on the weights: round them to few bits, or add noise, which may undo an edit that moved them little."""

import operator
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.evaluate.attacks.exam import Asked, worst_case
from mechunlearn.evaluate.results import Result
from mechunlearn.evaluate.scoring import side_of
from mechunlearn.metrics import Metric, candidate_probability
from mechunlearn.model import Model, device_of
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Entries, select
from mechunlearn.weights.rounding import Rounding, as_linear, every_entry, from_linear, rewritten, roundings_on


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

    Each weight of a matrix W gets scale * RMS(W) * N(0, 1). `mask`: which weights, such as `edit.mask`; default: every
    matrix of attention and MLPs. A point is the mean over `draws`; all scales share their draws. Nothing is trained, so
    all forgotten facts of the test split are tested. The control has the same questions about nobody. The first point
    is scale 0. Cost: 1 + draws * scales F; memory: the masked matrices once more.
    """
    if draws < 1 or min(scales, default=0.0) < 0:
        raise ValueError(f"expected scales of 0 or more and at least one draw, got {tuple(scales)} and {draws} draws.")
    entries = every_entry(model) if mask is None else select(model, mask)
    asked = Asked.of(model, task, side_of(task, format=format), metric=metric, seed=seed)
    runs = {"0": [asked.scores_of(model)]}
    for scale in sorted({*scales} - {0.0}):
        scores = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(operator.index(1000 * seed + draw))
            with rewritten(model, entries, lambda e, scale=scale, g=generator: with_noise(e, scale, g)):
                scores.append(asked.scores_of(model))
        runs[f"{scale:g}"] = [torch.stack(scores).mean(0)]
    return worst_case(runs, asked, axis="noise, in root mean squares of each matrix")


def with_noise(entries: Entries, scale: float, generator: torch.Generator) -> Float[Tensor, "unit width d_model"]:
    """The entries with noise added, relative to the root mean square of their whole matrix."""
    # Drawn on the CPU in the layout of units: both model classes and all devices get the same noise.
    parameter = entries.slot.parameter.detach()
    precise = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    noise = torch.randn(entries.read(precise).shape, generator=generator).to(precise)
    return entries.read(precise) + scale * precise.square().mean().sqrt() * noise


def quantized(
    model: Model,
    task: Task,
    *,
    roundings: Mapping[str, Rounding] | None = None,
    format: str | None = None,
    metric: Metric = candidate_probability,
    seed: int = 0,
) -> Result:
    """Accuracy on the forgotten facts with weights rounded to fewer bits: one point per rounding, and the best.

    The matrices of attention and MLPs are rounded as bitsandbytes does it: on a GPU by bitsandbytes itself, if it is
    installed, and the point says so; elsewhere by the same arithmetic, bit for bit. int8 and int4 have one scale per
    row, NF4 one per 64 weights. `roundings`: name -> any function from a matrix [out, in] to a rounded one. The model
    computes in its own dtype, so its speed is not that of few bits, and activations are not rounded, as LLM.int8()
    does.

    Nothing is trained, so all forgotten facts of the test split are tested. The first point is the model as it is,
    under the name of its dtype; the control has the same questions about nobody. An edit that moves weights by less
    than half a step of the rounding is rounded away: Zhang et al. 2024, https://arxiv.org/abs/2410.16454. `seed` draws
    whom the control asks about. Cost: (1 + roundings) F; memory: the matrices once more.
    """
    prompts, entries = side_of(task, format=format), every_entry(model)
    asked = Asked.of(model, task, prompts, metric=metric, seed=seed)
    as_it_is = str(entries[0].slot.parameter.dtype).removeprefix("torch.")
    runs = {as_it_is: [asked.scores_of(model)]}
    chosen = roundings_on(device_of(model)) if roundings is None else roundings
    for name, rounding in chosen.items():
        with rewritten(model, entries, lambda e, rounding=rounding: from_linear(e, rounding(as_linear(e)))):
            runs[name] = [asked.scores_of(model)]
    return worst_case(runs, asked, axis="weights")
