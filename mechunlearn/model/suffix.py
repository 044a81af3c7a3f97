"""Many changed copies of one run, each from the layer that is changed on.

Exact patching asks for the logits of thousands of runs that differ from one base run at one place. Only what comes
after that place is computed: no layer below, no attention where its output is known, and in the last layer
the MLP, the final norm and the unembedding at the positions that a metric reads.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechunlearn.model.classes import Model, is_bridge
from mechunlearn.model.hooks import Hook, recording
from mechunlearn.model.running import logits_at, passed_on, replaced, running_from

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
    """What each layer's attention gives, before a post-norm."""
    values: dict[str, Tensor]
    """What was at the hook points asked for."""


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
    """One forward pass, with `hooks`, that keeps what `continued` needs and the values at the hook points `names`."""
    names = list(names)
    entering = [f"blocks.{layer}.hook_resid_pre" for layer in range(len(model.blocks))]
    attention: list[Tensor] = []
    final: list[Tensor] = []
    with ExitStack() as stack:
        for block in model.blocks:
            stack.callback(_keeping_output(block.attn, attention))
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

    `residual` enters that layer (default: the run's own). `attention` is what the layer's attention gives,
    before a post-norm; without it the attention runs. `hooks` see the copies, at hook points of `layer` and above.
    """
    last = len(model.blocks) - 1
    residual = run.residuals[layer][rows] if residual is None else residual
    late = [name for name, _ in hooks if name.startswith(f"blocks.{last}.") and not _INSIDE_ATTENTION.fullmatch(name)]
    if late:
        return _whole(model, run, rows, layer, residual, attention, hooks)
    if layer < last or (layer == last and attention is None):
        residual, attention = _up_to_last_attention(model, run, rows, layer, residual, attention, hooks)
        layer = last
    index, places = torch.arange(len(rows), device=rows.device)[:, None], run.positions[rows]
    chosen = None if attention is None else attention[index, places]
    return _at_answers(model, run.tokens[rows][:, : places.shape[1]], layer, residual[index, places], chosen)


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
    """Copies of the run's prompts through one layer alone: what leaves it, and the values at the hook points `names`.

    Without its MLP what leaves the layer means nothing, and only the values are of use.
    """
    found: list[Tensor] = []
    residual = run.residuals[layer][rows] if residual is None else residual
    idle = [*list(model.blocks)[layer + 1 :], model.ln_final, model.unembed]
    idle += [] if with_mlp else [model.blocks[layer].mlp]
    with ExitStack() as stack:
        stack.enter_context(running_from(model, layer, residual))
        stack.enter_context(attending(model, {} if attention is None else {layer: attention}))
        stack.callback(model.ln_final.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0])).remove)
        stack.enter_context(replaced(dict.fromkeys(idle, passed_on)))
        stack.enter_context(model.hooks(fwd_hooks=list(hooks)))
        recorded = stack.enter_context(recording(model, names))
        logits_at(model, run.tokens[rows], run.attention_mask[rows], run.positions[rows])
    return found[0], dict(recorded)


def _whole(
    model: Model,
    run: Run,
    rows: Int[Tensor, "row"],
    layer: int,
    residual: Tensor,
    attention: Tensor | None,
    hooks: Sequence[Hook],
) -> Float[Tensor, "row answer d_vocab"]:
    given = {} if attention is None else {layer: attention}
    with running_from(model, layer, residual), attending(model, given):
        return logits_at(model, run.tokens[rows], run.attention_mask[rows], run.positions[rows], hooks=hooks)


def _up_to_last_attention(
    model: Model,
    run: Run,
    rows: Int[Tensor, "row"],
    layer: int,
    residual: Tensor,
    attention: Tensor | None,
    hooks: Sequence[Hook],
) -> tuple[Float[Tensor, "row pos d_model"], Float[Tensor, "row pos d_model"]]:
    """The last layer's input, and what its attention gives; its MLP and the unembedding do not run."""
    found: list[Tensor] = []
    last = len(model.blocks) - 1
    block = model.blocks[last]
    name = f"blocks.{last}.hook_resid_pre"
    with ExitStack() as stack:
        stack.enter_context(running_from(model, layer, residual))
        stack.enter_context(attending(model, {} if attention is None else {layer: attention}))
        stack.enter_context(replaced({block.mlp: passed_on, model.unembed: passed_on}))
        stack.callback(_keeping_output(block.attn, found))
        stack.enter_context(model.hooks(fwd_hooks=list(hooks)))
        recorded = stack.enter_context(recording(model, [name]))
        logits_at(model, run.tokens[rows], run.attention_mask[rows], run.positions[rows])
    return recorded[name], found[0]


def _at_answers(
    model: Model,
    tokens: Int[Tensor, "row answer"],
    layer: int,
    residual: Float[Tensor, "row answer d_model"],
    attention: Float[Tensor, "row answer d_model"] | None,
) -> Float[Tensor, "row answer d_vocab"]:
    """What follows the last attention acts on each position alone: the answers pass as if they were all."""
    with running_from(model, layer, residual), attending(model, {} if attention is None else {layer: attention}):
        return logits_at(model, tokens, torch.ones_like(tokens, dtype=torch.bool))


@contextmanager
def attending(model: Model, outputs: dict[int, Float[Tensor, "row pos d_model"]]) -> Iterator[None]:
    """Inside, the attention of these layers gives `outputs` (before a post-norm) without running."""

    def given(module: Any, value: Tensor) -> Callable[..., Any]:
        def forward(*arguments: Any, **options: Any) -> Any:
            return (module.hook_out(value), None) if is_bridge(model) else value

        return forward

    attentions = {model.blocks[layer].attn: value for layer, value in outputs.items()}
    with replaced({module: given(module, value) for module, value in attentions.items()}):
        yield


def _keeping_output(attention: nn.Module, kept: list[Tensor]) -> Callable[[], None]:
    """Puts what the module gives into `kept`, until what is returned is called."""

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    return attention.register_forward_hook(keep).remove
