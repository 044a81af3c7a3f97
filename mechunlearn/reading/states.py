"""The residual stream at chosen tokens, in all layers."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.metrics import name_of
from mechunlearn.model import Hook, Model, base_run, device_of, preserved
from mechunlearn.reading.positions import Where
from mechunlearn.tasks.prompts import Prompts


def states_at(
    model: Model, prompts: Prompts, at: Where, *, hooks: Sequence[Hook] = (), batch_size: int = 64
) -> Float[np.ndarray, "point prompt d_model"]:
    """At one token of each prompt, in double precision; ValueError if `at` gives another number of tokens."""

    def places(batch: Prompts) -> Int[Tensor, "batch _"]:
        return place_of(batch, at)[:, None]

    found = residuals_at(model, prompts, places, hooks=hooks, batch_size=batch_size)
    return found[:, :, 0].double().numpy()


def residuals_at(
    model: Model,
    prompts: Prompts,
    places: Callable[[Prompts], Int[Tensor, "batch _"]],
    *,
    hooks: Sequence[Hook] = (),
    batch_size: int = 64,
) -> Float[Tensor, "point prompt place d_model"]:
    """What enters each layer and, last, the final norm, at the places of each batch. On the CPU. Cost: 1 forward."""
    rows = []
    with preserved(model):
        for batch in prompts.to(device_of(model)).batches(batch_size):
            chosen = places(batch)
            run = base_run(model, batch.tokens, batch.attention_mask, batch.positions, hooks=hooks)
            index = torch.arange(len(batch), device=chosen.device)[:, None]
            rows.append(torch.stack([residual[index, chosen].cpu() for residual in run.residuals]))
    return torch.cat(rows, 1)


def place_of(prompts: Prompts, at: Where) -> Int[Tensor, "batch"]:
    """The column of the one token meant."""
    where = at(prompts) & prompts.attention_mask
    wrong = (where.sum(1) != 1).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"expected one real token of each prompt to probe, got {int(where[wrong[0]].sum())} for prompt {wrong[0]} "
            f"from {name_of(at)}: use subject_last or answer."
        )
    return where.int().argmax(1)
