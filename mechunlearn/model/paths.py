"""Direct paths: what a component would read if some others wrote what they write in another run, all else held.

Between a sender and a receiver only the residual stream is in the way, which is a sum: no forward pass is needed to
know what arrives, unless MLPs on the way are to respond.
"""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.components import Component, ModelShape
from mechunlearn.model.classes import Model, unchecked_shape
from mechunlearn.model.hooks import Hook, recording
from mechunlearn.model.matrices import slots
from mechunlearn.model.norms import post_norm
from mechunlearn.model.running import logits_at, passed_on, replaced, running_from
from mechunlearn.model.suffix import Run, attending


@dataclass(frozen=True, eq=False)
class Changes:
    """What senders write differently in another run. A row is one set of senders on one prompt."""

    rows: Int[Tensor, "row"]
    """The prompt of each row."""
    attention: dict[int, Float[Tensor, "row pos d_model"]]
    """Layer -> change of what its attention gives, before a post-norm."""
    mlps: dict[int, tuple[Bool[Tensor, "row"], Float[Tensor, "row pos d_model"]]]
    """Layer -> the rows in which its MLP sends, and the change of what it adds to the residual stream."""


def sender_sites(layers: Collection[int]) -> list[str]:
    """The hook points that both runs must have recorded for `changes`."""
    return [f"blocks.{layer}.{name}" for layer in sorted(layers) for name in ("attn.hook_z", "hook_mlp_out")]


def at_answers(run: Run) -> Run:
    """The run at the answers' positions alone, which is enough where attention does not run: the rest has no say."""
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


def changes(
    model: Model, base: Run, other: Run, senders: Sequence[Collection[Component]], rows: Int[Tensor, "row"]
) -> Changes:
    """For each row its set of senders (heads, attention layers, MLPs), and the prompt that it is about."""
    sizes = unchecked_shape(model)
    attention, mlps = {}, {}
    for layer in sorted({component.layer for members in senders for component in members}):
        is_sent = torch.tensor([_heads(members, layer, sizes) for members in senders], device=rows.device)
        sends = torch.tensor([_sends_mlp(members, layer) for members in senders], device=rows.device)
        if bool(is_sent.any()):
            name = f"blocks.{layer}.attn.hook_z"
            z = (other.values[name] - base.values[name])[rows] * is_sent[:, None, :, None]
            slot = slots(model)[layer, "W_O"]
            weight = slot.view(slot.parameter.detach())
            attention[layer] = einsum(z, weight, "row pos head width, head width model -> row pos model")
        if bool(sends.any()):
            name = f"blocks.{layer}.hook_mlp_out"
            mlps[layer] = sends, (other.values[name] - base.values[name])[rows] * sends[:, None, None]
    return Changes(rows, attention, mlps)


def arriving(
    model: Model, base: Run, sent: Changes, layers: Collection[int], *, through_mlps: bool
) -> dict[int, Float[Tensor, "row pos d_model"]]:
    """The residual stream that enters each of `layers` (`n_layers`: the final norm), all attention as in the base run.

    MLPs that do not send stay as in the base run, or respond, if `through_mlps`.
    """
    if through_mlps:
        return _responding(model, base, sent, layers)
    entering = {layer: base.residuals[layer][sent.rows] for layer in layers}
    for layer in sorted(entering):
        for below, change in sent.attention.items():
            if below < layer:
                entering[layer] = entering[layer] + _after_post_norm(model, base, sent, below, change)
        for below, (_, change) in sent.mlps.items():
            if below < layer:
                entering[layer] = entering[layer] + change
    return entering


def read_by_attention(
    model: Model, base: Run, sent: Changes, layer: int, residual: Float[Tensor, "row pos d_model"], names: Sequence[str]
) -> dict[str, Tensor]:
    """Values at hook points of the layer's queries, keys and values when `residual` enters it."""
    return _inside(model, base, sent.rows, layer, residual, None, names)


def read_by_mlp(
    model: Model, base: Run, sent: Changes, layer: int, residual: Float[Tensor, "row pos d_model"], names: Sequence[str]
) -> dict[str, Tensor]:
    """Values at hook points of the layer's MLP when `residual` enters the layer and its attention is the base run's.

    Heads of the same layer that send have changed it, which parallel blocks do not see.
    """
    attention = base.attention[layer][sent.rows]
    if layer in sent.attention:
        attention = attention + sent.attention[layer]
    return _inside(model, base, sent.rows, layer, residual, attention, names)


def _inside(
    model: Model,
    base: Run,
    rows: Int[Tensor, "row"],
    layer: int,
    residual: Float[Tensor, "row pos d_model"],
    attention: Float[Tensor, "row pos d_model"] | None,
    names: Sequence[str],
) -> dict[str, Tensor]:
    unneeded = [*list(model.blocks)[layer + 1 :], model.unembed]
    if attention is None:
        unneeded.append(model.blocks[layer].mlp)
    with ExitStack() as stack:
        stack.enter_context(running_from(model, layer, residual))
        stack.enter_context(attending(model, {} if attention is None else {layer: attention}))
        stack.enter_context(replaced(dict.fromkeys(unneeded, passed_on)))
        found = stack.enter_context(recording(model, names))
        logits_at(model, base.tokens[rows], base.attention_mask[rows], base.positions[rows])
    return found


def _responding(
    model: Model, base: Run, sent: Changes, layers: Collection[int]
) -> dict[int, Float[Tensor, "row pos d_model"]]:
    """Runs from the lowest sender's layer to the highest of `layers`, with attention given and MLPs free."""
    n_layers = len(model.blocks)
    first, highest = min([*sent.attention, *sent.mlps]), max(layers)
    entering = {layer: base.residuals[layer][sent.rows] for layer in layers if layer <= first}
    if highest <= first:
        return entering
    given = {layer: base.attention[layer][sent.rows] for layer in range(first, highest)}
    given |= {layer: given[layer] + change for layer, change in sent.attention.items() if layer in given}
    unneeded = [*list(model.blocks)[highest:], model.unembed]
    names = [f"blocks.{layer}.hook_resid_pre" for layer in layers if first < layer < min(highest, n_layers)]
    final: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(running_from(model, first, base.residuals[first][sent.rows]))
        stack.enter_context(attending(model, given))
        stack.enter_context(replaced(dict.fromkeys(unneeded, passed_on)))
        stack.enter_context(model.hooks(fwd_hooks=_sending_mlps(base, sent)))
        # Blocks above hand on what enters the highest layer, so it is what the final norm is given.
        stack.callback(model.ln_final.register_forward_pre_hook(lambda m, inputs: final.append(inputs[0])).remove)
        found = stack.enter_context(recording(model, names))
        logits_at(model, base.tokens[sent.rows], base.attention_mask[sent.rows], base.positions[sent.rows])
    entering |= {layer: found[f"blocks.{layer}.hook_resid_pre"] for layer in layers if first < layer < highest}
    return entering | {highest: final[0]}


def _sending_mlps(base: Run, sent: Changes) -> list[Hook]:
    def hook(name: str, sends: Tensor, change: Tensor) -> Hook:
        value = base.values[name][sent.rows] + change
        return name, lambda own, hook: torch.where(sends[:, None, None], value, own)

    return [hook(f"blocks.{layer}.hook_mlp_out", *parts) for layer, parts in sent.mlps.items()]


def _after_post_norm(
    model: Model, base: Run, sent: Changes, layer: int, change: Float[Tensor, "row pos d_model"]
) -> Float[Tensor, "row pos d_model"]:
    norm = post_norm(model, layer, "ATTN")
    if norm is None:
        return change
    own = base.attention[layer][sent.rows]
    return norm(own + change) - norm(own)


def _heads(members: Collection[Component], layer: int, sizes: ModelShape) -> list[bool]:
    here = {(component.part, component.index) for component in members if component.layer == layer}
    return [("ATTN", None) in here or ("H", head) in here for head in range(sizes.n_heads)]


def _sends_mlp(members: Collection[Component], layer: int) -> bool:
    return any(component.layer == layer and component.part == "MLP" for component in members)
