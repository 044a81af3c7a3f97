"""Attacks on the weights: round them to few bits, or add noise, which may undo an edit that moved them little."""

import operator
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.evaluate.attacks.exam import Asked, formatted, worst_case
from mechunlearn.evaluate.results import Result
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
            generator = torch.Generator().manual_seed(operator.index(1000 * seed + draw))
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

    Rounded are the matrices of attention and MLPs, as bitsandbytes does it: not the embeddings, unembedding, norms and
    biases. On a GPU bitsandbytes rounds them itself, if it is installed, and the point says so; elsewhere the same
    arithmetic does, bit for bit. They are computed with in the model's own dtype: the numbers are those of 8-bit or
    4-bit weights, the speed is not. Activations stay as they are, which LLM.int8() rounds too. int8 and int4 have one
    scale per row, NF4 one per 64 weights. `roundings`: name -> any function from a matrix [out, in] to a rounded one.

    Nothing is trained, so all forgotten facts of the test split count. The first point is the model as it is, under the
    name of its dtype; the control has the same questions about nobody. An edit that moves weights by less than half a
    step of the rounding is rounded away: Zhang et al. 2024, https://arxiv.org/abs/2410.16454. `seed`: of the made-up
    names. Cost: (1 + roundings) F; memory: the matrices once more. ValueError for a model that is quantised already.
    """
    prompts, entries = formatted(task, format), every_entry(model)
    asked = Asked.of(model, task, prompts, metric=metric, seed=seed)
    as_it_is = str(entries[0].slot.parameter.dtype).removeprefix("torch.")
    runs = {as_it_is: [asked.scores_of(model)]}
    chosen = roundings_on(device_of(model)) if roundings is None else roundings
    for name, rounding in chosen.items():
        with rewritten(model, entries, lambda e, rounding=rounding: from_linear(e, rounding(as_linear(e)))):
            runs[name] = [asked.scores_of(model)]
    return worst_case(runs, asked, axis="weights")
