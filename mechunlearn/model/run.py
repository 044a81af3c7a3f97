"""Forward passes: with an attention mask always, logits only where they are read, from any layer on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechunlearn.model.hooks import Hook, recording
from mechunlearn.model.kinds import Model


def logits_at(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    positions: Int[Tensor, "batch place"] | None = None,
    *,
    hooks: Sequence[Hook] = (),
) -> Float[Tensor, "batch place d_vocab"]:
    """Logits at `positions` of each row (default: everywhere); the others are never computed.

    `hooks` are TransformerLens forward hooks for this pass. Padding may be left or right.
    """
    with _unembedding_only(model, positions), model.hooks(fwd_hooks=list(hooks)) if hooks else nullcontext():
        return model(tokens, attention_mask=mask.long(), return_type="logits")


def residual_before(
    model: Model, layer: int, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream that enters `layer`, after hooks of yours that change it; later layers are not run."""
    name = f"blocks.{layer}.hook_resid_pre"
    last = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
    with recording(model, [name]) as recorded, _skipped(list(model.blocks)[layer + 1 :]), torch.no_grad():
        logits_at(model, tokens, mask, last)
    return recorded[name].detach()


@contextmanager
def running_from(model: Model, layer: int, residual: Float[Tensor, "batch pos d_model"]) -> Iterator[None]:
    """Inside, a forward pass starts at `layer` with `residual` as its input; earlier layers do not run.

    Tokens of the same shape still have to be passed (they give positions and mask).
    """

    def enter(value: Tensor, hook: object) -> Tensor:
        return residual

    with _skipped(list(model.blocks)[:layer]), model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", enter)]):
        yield


@contextmanager
def _skipped(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Blocks that hand their input on unchanged (`start_at_layer` of a bridge still runs them)."""

    def identity(residual: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return residual

    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.__dict__["forward"] = identity
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward


@contextmanager
def _unembedding_only(model: Model, positions: Int[Tensor, "batch place"] | None) -> Iterator[None]:
    if positions is None:
        yield
        return
    rows = torch.arange(len(positions), device=positions.device)[:, None]

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        device = arguments[0].device
        return (arguments[0][rows.to(device), positions.to(device)], *arguments[1:])

    handle = model.unembed.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
