"""Suffix runs: changed copies of one run, each computed only from the layer in which it is changed.

Exact patching needs the logits of thousands of runs that differ from one base run at one place. Only what comes after
that place is computed: no layer below, no attention where its output is known, and in the last layer the MLP, the
final norm and the unembedding only at the positions that a metric reads.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mechunlearn.model.classes import Model, is_bridge
from mechunlearn.model.hooks import Hook, recording
from mechunlearn.model.running import idle, logits_at, replaced_forwards, running_from

_INSIDE_ATTENTION = re.compile(r"blocks\.\d+\.(hook_resid_pre|attn\.hook_(q|k|v|z|rot_q|rot_k|attn_scores|pattern))")


@dataclass(frozen=True, eq=False)
class Run:
    """A finished forward pass that changed copies start from."""

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    positions: Int[Tensor, "batch answer"]
    logits: Float[Tensor, "batch answer d_vocab"]
    residuals: tuple[Float[Tensor, "batch pos d_model"], ...]
    """The residual stream that enters each layer and, last, the final norm."""
    attention: tuple[Float[Tensor, "batch pos d_model"], ...]
    """Each layer's attention output, before a post-norm."""
    values: dict[str, Tensor]
    """Hook point -> value, for the hook points that were named."""


@torch.no_grad()
def base_run(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    positions: Int[Tensor, "batch answer"],
    *,
    names: Iterable[str] = (),
    hooks: Sequence[Hook] = (),
) -> Run:
    """One forward pass, with `hooks`, as a `Run` that `continued` can start from, with the values at `names`."""
    names = list(names)
    entering = [f"blocks.{layer}.hook_resid_pre" for layer in range(len(model.blocks))]
    attention: list[Tensor] = []
    final: list[Tensor] = []
    with ExitStack() as stack:
        for block in model.blocks:
            stack.enter_context(_keeping_output(block.attn, attention))
        stack.callback(model.ln_final.register_forward_pre_hook(lambda module, inputs: final.append(inputs[0])).remove)
        stack.enter_context(model.hooks(fwd_hooks=list(hooks)))  # before the recording, which sees what they change
        recorded = stack.enter_context(recording(model, [*entering, *names]))
        logits = logits_at(model, tokens, mask, positions)
    residuals = (*(recorded[name] for name in entering), final[0])
    return Run(tokens, mask, positions, logits, residuals, tuple(attention), {name: recorded[name] for name in names})


def continued(
    model: Model,
    run: Run,
    rows: Int[Tensor, "row"],
    layer: int,
    *,
    residual: Float[Tensor, "row pos d_model"] | None = None,
    attention: Float[Tensor, "row pos d_model"] | None = None,
    hooks: Sequence[Hook] = (),
) -> Float[Tensor, "row answer d_vocab"]:
    """Logits of copies of the run's prompts `rows`, computed from `layer` on; `n_layers` is the final norm.

    `residual` enters that layer (default: the run's own). `attention` is the output of the layer's attention, before a
    post-norm; without it the attention runs. Both are rounded to the run's dtype, but for a residual that enters the
    final norm. `hooks` act on the copies, at hook points of `layer` and above.
    """
    last = len(model.blocks) - 1
    residual = run.residuals[layer][rows] if residual is None else residual
    if layer <= last:  # the final norm takes float32 too
        residual = residual.to(run.residuals[layer].dtype)
    # A hook behind the last attention must see all positions: then no part of the last layer is left out.
    fixed = {} if attention is None else {layer: attention.to(residual.dtype)}
    late = [name for name, _ in hooks if name.startswith(f"blocks.{last}.") and not _INSIDE_ATTENTION.fullmatch(name)]
    if late:
        with running_from(model, layer, residual), fixed_attention(model, fixed):
            return logits_at(model, run.tokens[rows], run.attention_mask[rows], run.positions[rows], hooks=hooks)
    if layer < last or (layer == last and attention is None):
        # Up to what the last attention gives: its MLP and the unembedding do not run.
        outputs, block, name = list[Tensor](), model.blocks[last], f"blocks.{last}.hook_resid_pre"
        with _keeping_output(block.attn, outputs):
            unneeded = (block.mlp, model.unembed)
            options = {"fixed": fixed, "unneeded": unneeded, "hooks": hooks, "names": [name]}
            values = run_from(model, run, rows, layer, residual, **options)[1]
        residual, fixed, layer = values[name], {last: outputs[0]}, last
    # Only attention mixes positions. What is left after the last one runs at the answers' positions alone, as if they
    # were the whole prompt.
    index, places = torch.arange(len(rows), device=rows.device)[:, None], run.positions[rows]
    tokens = run.tokens[rows][:, : places.shape[1]]
    fixed = {number: output[index, places] for number, output in fixed.items()}
    with running_from(model, layer, residual[index, places]), fixed_attention(model, fixed):
        order = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return logits_at(model, tokens, torch.ones_like(tokens, dtype=torch.bool), order)


def through_layer(
    model: Model,
    run: Run,
    rows: Int[Tensor, "row"],
    layer: int,
    *,
    residual: Float[Tensor, "row pos d_model"] | None = None,
    attention: Float[Tensor, "row pos d_model"] | None = None,
    hooks: Sequence[Hook] = (),
    names: Iterable[str] = (),
    with_mlp: bool = True,
) -> tuple[Float[Tensor, "row pos d_model"], dict[str, Tensor]]:
    """Copies of the run's prompts through one layer alone: the layer's output, and the values at `names`.

    `with_mlp=False` leaves the MLP out: then only values from before the MLP mean something.
    """
    residual = run.residuals[layer][rows] if residual is None else residual
    fixed = {} if attention is None else {layer: attention.to(run.attention[layer].dtype)}
    unneeded = [*list(model.blocks)[layer + 1 :], model.ln_final, model.unembed]
    unneeded += [] if with_mlp else [model.blocks[layer].mlp]
    return run_from(model, run, rows, layer, residual, fixed=fixed, unneeded=unneeded, hooks=hooks, names=names)


def run_from(
    model: Model,
    run: Run,
    rows: Int[Tensor, "row"],
    layer: int,
    residual: Float[Tensor, "row pos d_model"],
    *,
    fixed: dict[int, Float[Tensor, "row pos d_model"]],
    unneeded: Iterable[nn.Module],
    hooks: Sequence[Hook] = (),
    names: Iterable[str] = (),
) -> tuple[Float[Tensor, "row pos d_model"], dict[str, Tensor]]:
    """A run from `layer` on, with fixed attention, without unneeded modules: the final norm's input, and values."""
    final: list[Tensor] = []
    with (
        running_from(model, layer, residual.to(run.residuals[layer].dtype)),
        fixed_attention(model, fixed),
        replaced_forwards(idle(unneeded)),
        model.ln_final.register_forward_pre_hook(lambda module, inputs: final.append(inputs[0])),
        model.hooks(fwd_hooks=list(hooks)),
        recording(model, names) as recorded,
    ):
        logits_at(model, run.tokens[rows], run.attention_mask[rows], run.positions[rows])
    return final[0], dict(recorded)


@contextmanager
def fixed_attention(model: Model, outputs: dict[int, Float[Tensor, "row pos d_model"]]) -> Iterator[None]:
    """Inside, the attention of these layers gives `outputs` (before a post-norm) without running."""

    def constant(module: Any, value: Tensor) -> Callable[..., Any]:
        def forward(*arguments: Any, **options: Any) -> Any:
            return (module.hook_out(value), None) if is_bridge(model) else value

        return forward

    attentions = {model.blocks[layer].attn: value for layer, value in outputs.items()}
    with replaced_forwards({module: constant(module, value) for module, value in attentions.items()}):
        yield


def _keeping_output(attention: nn.Module, outputs: list[Tensor]) -> RemovableHandle:
    """Inside this context, the module's outputs are appended to `outputs`."""

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    return attention.register_forward_hook(keep)
