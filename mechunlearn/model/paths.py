"""Direct paths: what a receiver reads when senders write what they write in another run and all else is held.

A sender acts on a receiver through the residual stream, which is a sum: what arrives is the base run's stream plus the
senders' changes, and no forward pass is needed unless MLPs between them are to respond.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.components import Component
from mechunlearn.model.classes import Model, at_least_float32, unchecked_shape
from mechunlearn.model.decomposition import scales_of
from mechunlearn.model.hooks import Hook
from mechunlearn.model.matrices import attention_change, cast_weights
from mechunlearn.model.norms import post_norm
from mechunlearn.model.suffix import Run, run_from, through_layer


@dataclass(frozen=True, eq=False)
class Changes:
    """What senders write in another run less what they write in the base run; a row is a set of senders on a prompt."""

    rows: Int[Tensor, "row"]
    """The prompt of each row."""
    attention: dict[int, Float[Tensor, "row pos d_model"]]
    """Layer -> change of its attention's output, before a post-norm."""
    mlps: dict[int, tuple[Bool[Tensor, "row"], Float[Tensor, "row pos d_model"]]]
    """Layer -> the rows in which its MLP is a sender, and the change of what it adds to the residual stream."""


def sender_sites(layers: Collection[int]) -> list[str]:
    """The hook points that both runs must have recorded for `changes`."""
    return [f"blocks.{layer}.{name}" for layer in sorted(layers) for name in ("attn.hook_z", "hook_mlp_out")]


def at_answers(run: Run) -> Run:
    """The run cut to the answers' positions: enough where no attention runs, since nothing else mixes positions."""
    index = torch.arange(len(run.tokens), device=run.tokens.device)[:, None], run.positions
    tokens = run.tokens[index]
    return Run(
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens),
        run.logits,
        tuple(residual[index] for residual in run.residuals),
        tuple(output[index] for output in run.attention),
        {name: value[index] for name, value in run.values.items()},
    )


def sender_changes(
    model: Model, base: Run, other: Run, senders: Sequence[Collection[Component]], rows: Int[Tensor, "row"]
) -> Changes:
    """The changes of each row: of its set of senders (heads, attention layers, MLPs), on its prompt."""
    n_heads = unchecked_shape(model).n_heads
    attention, mlps = {}, {}
    for layer in sorted({component.layer for members in senders for component in members}):
        here = [{(part.part, part.index) for part in members if part.layer == layer} for members in senders]
        heads = [[("ATTN", None) in parts or ("H", head) in parts for head in range(n_heads)] for parts in here]
        is_sender = torch.tensor(heads, device=rows.device)
        sends = torch.tensor([("MLP", None) in parts for parts in here], device=rows.device)
        if bool(is_sender.any()):
            name = f"blocks.{layer}.attn.hook_z"
            z = _difference(other, base, name)[rows] * is_sender[:, None, :, None]
            attention[layer] = attention_change(model, layer, base.values[name][rows], z)
        if bool(sends.any()):
            name = f"blocks.{layer}.hook_mlp_out"
            mlps[layer] = sends, _difference(other, base, name)[rows] * sends[:, None, None]
    return Changes(rows, attention, mlps)


def _difference(other: Run, base: Run, name: str) -> Tensor:
    return at_least_float32(other.values[name]) - at_least_float32(base.values[name])


def arriving_residuals(
    model: Model, base: Run, sent: Changes, layers: Collection[int], *, through_mlps: bool
) -> dict[int, Float[Tensor, "row pos d_model"]]:
    """The residual stream that enters each of `layers` (`n_layers`: the final norm), all attention as in the base run.

    With `through_mlps`, MLPs that are no senders respond to what reaches them; else they, too, are as in the base run.
    """
    if through_mlps:
        return _after_responses(model, base, sent, layers)
    changes, scales = [], scales_of(model)
    for layer, change in sent.attention.items():
        norm, own, added = post_norm(model, layer, "ATTN"), at_least_float32(base.attention[layer][sent.rows]), change
        if norm is not None:
            # A post-norm is not linear: what is added differs by the difference of the normalized outputs.
            with cast_weights(norm):
                added = norm(own + change) - norm(own)
        changes.append((layer, scales.heads * added))
    changes += [(layer, scales.written * change) for layer, (_, change) in sent.mlps.items()]
    residuals = {layer: at_least_float32(base.residuals[layer][sent.rows]) for layer in layers}
    return {layer: sum((new for below, new in changes if below < layer), own) for layer, own in residuals.items()}


def read_by_attention(
    model: Model, base: Run, sent: Changes, layer: int, residual: Float[Tensor, "row pos d_model"], names: Sequence[str]
) -> dict[str, Tensor]:
    """Values at hook points of the layer's queries, keys and values when `residual` enters it."""
    return through_layer(model, base, sent.rows, layer, residual=residual, names=names, with_mlp=False)[1]


def read_by_mlp(
    model: Model, base: Run, sent: Changes, layer: int, residual: Float[Tensor, "row pos d_model"], names: Sequence[str]
) -> dict[str, Tensor]:
    """Values at hook points of the layer's MLP when `residual` enters the layer and its attention is the base run's.

    Senders among the layer's own heads change its attention, which an MLP in parallel blocks does not read.
    """
    attention = base.attention[layer][sent.rows]
    if layer in sent.attention:
        attention = attention + sent.attention[layer]
    return through_layer(model, base, sent.rows, layer, residual=residual, attention=attention, names=names)[1]


def _after_responses(
    model: Model, base: Run, sent: Changes, layers: Collection[int]
) -> dict[int, Float[Tensor, "row pos d_model"]]:
    """The same, by a run from the lowest sender's layer to the highest of `layers`: attention fixed, MLPs free."""
    n_layers = len(model.blocks)
    first, highest = min([*sent.attention, *sent.mlps]), max(layers)
    entering = {layer: base.residuals[layer][sent.rows] for layer in layers if layer <= first}
    if highest <= first:
        return entering
    fixed = {layer: base.attention[layer][sent.rows] for layer in range(first, highest)}
    fixed |= {
        layer: (own + sent.attention[layer]).to(own.dtype) for layer, own in fixed.items() if layer in sent.attention
    }
    unneeded = [*list(model.blocks)[highest:], model.unembed]
    names = [f"blocks.{layer}.hook_resid_pre" for layer in layers if first < layer < min(highest, n_layers)]
    options = {"fixed": fixed, "unneeded": unneeded, "hooks": _sending_mlps(base, sent), "names": names}
    # The blocks above are identities, so the final norm gets what enters the highest layer.
    final, recorded = run_from(model, base, sent.rows, first, base.residuals[first][sent.rows], **options)
    entering |= {layer: recorded[f"blocks.{layer}.hook_resid_pre"] for layer in layers if first < layer < highest}
    return entering | {highest: final}


def _sending_mlps(base: Run, sent: Changes) -> list[Hook]:
    def hook(name: str, sends: Tensor, change: Tensor) -> Hook:
        value = (base.values[name][sent.rows] + change).to(base.values[name].dtype)
        return name, lambda own, hook: torch.where(sends[:, None, None], value, own)

    return [hook(f"blocks.{layer}.hook_mlp_out", *parts) for layer, parts in sent.mlps.items()]
