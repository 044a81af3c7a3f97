"""Replacements: functions that give what a patch puts in place of an activation."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from mechunlearn.arguments import Direction, check_batch_size
from mechunlearn.identity import described, name_of
from mechunlearn.model import Model, recording
from mechunlearn.model.tokens import leading_bos
from mechunlearn.tasks.prompts import Prompts

Replacement: TypeAlias = Callable[[Model, Prompts, Mapping[str, Tensor]], dict[str, Tensor]]
"""(model, prompts, hook point -> value in the prompts' own run [batch, pos, ...]) -> hook point -> its replacement."""


def resample(model: Model, prompts: Prompts, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The activations of each prompt's corrupted counterpart. Cost: 1F. ValueError without corrupted prompts."""
    return activations_at(model, prompts.corrupted(), values)


def zero(model: Model, prompts: Prompts, values: Mapping[str, Tensor], *, with_bos: bool = False) -> dict[str, Tensor]:
    """Zeros, which take the model off the distribution that it was trained on. Cost: none.

    A BOS that a prompt begins with keeps its own values, unless `with_bos` (`partial(zero, with_bos=True)`): heads that
    have nothing to do attend to it, and to take it away breaks all of them. Where prompts have no BOS nothing is left
    out, though their first token then is what such heads attend to.
    """
    zeros = {name: torch.zeros_like(value) for name, value in values.items()}
    return zeros if with_bos else _with_own_bos(model, prompts, values, zeros)


def mean_over(
    reference: Prompts, *, positional: bool = False, with_bos: bool = False, batch_size: int = 64
) -> Replacement:
    """The mean over a reference set: over all its real tokens, or at each position (rows of one length).

    BOS, as in `zero`, is in no mean and keeps its own values, unless `with_bos`.

    Cost: 1F of the reference, `batch_size` rows at a time, for each batch of prompts.
    """
    check_batch_size(batch_size)
    options = {"positional": positional, "with_bos": with_bos, "batch_size": batch_size}
    return partial(_mean_over, reference=reference, **options)


def gaussian(*, std: float, seed: int = 0) -> Replacement:
    """The prompt's own value plus noise N(0, std**2), the same for every prompt at its i-th real token. Cost: none."""
    return partial(_gaussian, std=std, seed=seed)


def _mean_over(
    model: Model,
    prompts: Prompts,
    values: Mapping[str, Tensor],
    *,
    reference: Prompts,
    positional: bool,
    with_bos: bool,
    batch_size: int,
) -> dict[str, Tensor]:
    reference = reference.on(model)
    if positional:
        lengths = sorted({int(n) for p in (reference, prompts) for n in p.attention_mask.sum(1)})
        if len(lengths) > 1 or reference.tokens.shape[1] != prompts.tokens.shape[1]:
            raise ValueError(
                f"expected a reference set and prompts that all have one length for positional means, got lengths "
                f"{lengths}: pad nothing, choose prompts of one length, or leave out positional=True."
            )
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in reference.batches(batch_size):
        left_out = leading_bos(model, batch.tokens, batch.attention_mask) & (not with_bos and not positional)
        counted = batch.attention_mask & ~left_out
        count += len(batch) if positional else int(counted.sum())
        for name, value in activations_at(model, batch, values).items():
            rows = value if positional else value[counted]
            sums[name] = sums.get(name, 0) + rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
    means = {name: (total / count).to(values[name]).expand_as(values[name]) for name, total in sums.items()}
    return means if with_bos else _with_own_bos(model, prompts, values, means)


def _with_own_bos(
    model: Model, prompts: Prompts, values: Mapping[str, Tensor], replacements: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The replacements, but each prompt's own values at a BOS that it begins with."""
    bos = leading_bos(model, prompts.tokens, prompts.attention_mask)
    if not bool(bos.any()):
        return dict(replacements)
    shaped = {name: bos.view(*bos.shape, *[1] * (value.ndim - 2)) for name, value in values.items()}
    return {name: torch.where(shaped[name], values[name], value) for name, value in replacements.items()}


def _gaussian(
    model: Model, prompts: Prompts, values: Mapping[str, Tensor], *, std: float, seed: int
) -> dict[str, Tensor]:
    place = (prompts.attention_mask.cumsum(1) - 1).clamp(min=0)
    longest = int(place.max()) + 1
    noisy = {}
    for name, value in values.items():
        # A generator for each hook point: its noise does not depend on which others are patched, nor on their order.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        drawn = torch.stack([torch.randn(value.shape[2:], generator=generator) for _ in range(longest)])
        noisy[name] = value + std * drawn.to(value)[place]
    return noisy


@torch.no_grad()
def activations_at(model: Model, prompts: Prompts, names: Iterable[str]) -> dict[str, Tensor]:
    """The values at the hook points `names` in one forward pass."""
    with recording(model, names) as activations:
        prompts.logits(model)
    return activations


def replacement_values(
    replacement: Replacement, model: Model, prompts: Prompts, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The replacement's values; ValueError unless they are a tensor of the same shape for each hook point."""
    replacements = replacement(model, prompts, values)
    for name, value in values.items():
        got = replacements.get(name) if isinstance(replacements, Mapping) else replacements
        if not isinstance(got, Tensor) or got.shape != value.shape:
            shown = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise ValueError(
                f"expected {name_of(replacement)} to give a tensor of shape {tuple(value.shape)} for {name}, got "
                f"{shown}: give one for each hook point that it is handed, in a dict."
            )
    return replacements


def patched_run(prompts: Prompts, direction: Direction, replacement: Replacement) -> Prompts:
    """The clean prompts for noising, the corrupt ones for denoising; ValueError where a replacement cannot denoise."""
    if direction == "noising":
        return prompts
    if getattr(replacement, "func", replacement) in (zero, _mean_over, _gaussian):
        raise ValueError(
            f"expected a replacement from the clean run for denoising, got {described(replacement)}: use resample, or "
            f'direction="noising", which ablates the clean run.'
        )
    return prompts.exchanged()
