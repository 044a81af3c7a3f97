"""Edges of a model: what every destination reads, what every source adds, and whether their sum is the model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mechunlearn.components.component import ATTENTION_MATRICES, Component, ModelShape
from mechunlearn.components.edge import Destination, Edge, edge_mask, mask_of
from mechunlearn.components.edge_scores import EdgeMask
from mechunlearn.model.admission import check_unforked
from mechunlearn.model.classes import Model, architecture, device_of, shape, unchecked_shape
from mechunlearn.model.decomposition import scales_of
from mechunlearn.model.guard import preserved
from mechunlearn.model.hooks import recording
from mechunlearn.model.matrices import check_plain, slots
from mechunlearn.model.norms import Norm, input_norm, norm_of, post_norm
from mechunlearn.model.running import logits_at
from mechunlearn.model.suffix import Run, through_layer

_checked: WeakSet[nn.Module] = WeakSet()
"""Models whose residual stream has been found to be the sum of its parts."""

PROJECTIONS = (("W_Q", "q"), ("W_K", "k"), ("W_V", "v"))
"""The matrices by which a head reads, and the letters of their hook points."""


def is_parallel(model: Model) -> bool:
    """True if attention and MLP of a layer read the same input (GPT-NeoX): its heads do not feed its MLP."""
    return bool(model.cfg.parallel_attn_mlp)


def edges_of(model: Model, chosen: Iterable[Edge | str] | None = None) -> Bool[Tensor, "source destination"]:
    """A mask that is True at the chosen edges (default: at all edges of the model).

    ValueError for an edge that the model does not have, and for a model that is not the sum of its parts; the latter is
    checked once for each model, with two short forwards.
    """
    sizes = shape(model)
    check_unforked(model)
    check_plain(model, ATTENTION_MATRICES)
    if model not in _checked:
        _check_sums(model)
        _checked.add(model)
    if isinstance(chosen, EdgeMask) and chosen.shape != sizes:
        raise ValueError(
            f"expected edges of this model ({sizes}), got a circuit of {chosen.shape}: it belongs to the model that it "
            f"was found in."
        )
    existing = edge_mask(sizes, parallel=is_parallel(model))
    if chosen is None:
        return existing
    chosen = list(chosen)
    if not chosen:
        raise ValueError("expected at least one edge, got none: leave edges=... out to have all of them.")
    absent = [str(edge) for edge in chosen if bool((mask_of([edge], sizes) & ~existing).any())]
    if absent:
        raise ValueError(
            f"expected edges of this model, got {', '.join(absent[:5])}: in its parallel blocks attention and MLP read "
            f"the same input, so that a layer's heads do not feed its MLP; leave these edges out."
        )
    return mask_of(chosen, sizes)


@dataclass(frozen=True, eq=False)
class DestinationInputs:
    """What the destinations of a run read: tensors that autograd can differentiate a metric by."""

    residuals: tuple[Float[Tensor, "batch pos d_model"], ...]
    """What enters each layer: its attention reads it, mostly through a norm."""
    projections: tuple[tuple[Tensor, ...], ...]
    """Each layer's queries, keys and values [batch, pos, head, d_head], before rotary embedding and qk-norm."""
    mlps: tuple[Float[Tensor, "batch pos d_model"], ...]
    """Each MLP's own copy of the residual stream, before its norm, if it has one."""
    logits: Float[Tensor, "batch pos d_model"]
    """The final norm's input."""

    def tensors(self) -> list[Tensor]:
        """The tensors to differentiate by: layer by layer the projections, then the MLPs' copies, then the logits'."""
        return [*(tensor for layer in self.projections for tensor in layer), *self.mlps, self.logits]


@contextmanager
def recording_inputs(model: Model) -> Iterator[list[DestinationInputs]]:
    """Inside, a forward pass records what every destination reads; on leaving, the yielded list holds it.

    An MLP and the final norm get a copy of the residual stream of their own, so that the gradient with respect to it
    is that of this one reader.
    """
    layers = range(unchecked_shape(model).n_layers)
    names = {(layer, m): f"blocks.{layer}.attn.hook_{letter}" for layer in layers for m, letter in PROJECTIONS}
    residuals: dict[int, Tensor] = {}
    copies: dict[nn.Module, Tensor] = {}
    inputs: list[DestinationInputs] = []

    def hand_in_a_copy(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        copies[module] = arguments[0].clone()
        return (copies[module], *arguments[1:])

    readers = [mlp_reader(model, layer) for layer in layers]
    with ExitStack() as stack:
        for module in (*readers, model.ln_final):
            stack.callback(module.register_forward_pre_hook(hand_in_a_copy).remove)
        for layer in layers:
            stack.callback(keep_read_by_attention(model, layer, residuals).remove)
        recorded = stack.enter_context(recording(model, names.values()))
        yield inputs
    projections = tuple(tuple(recorded[names[layer, m]] for m, _ in PROJECTIONS) for layer in layers)
    entering, mlps = tuple(residuals[layer].detach() for layer in layers), tuple(copies[reader] for reader in readers)
    inputs.append(DestinationInputs(entering, projections, mlps, copies[model.ln_final]))


def keep_read_by_attention(model: Model, layer: int, residuals: dict[int, Tensor]) -> RemovableHandle:
    """Inside this context, the residual stream that a layer's attention reads, before its norm, is put at `layer`."""
    block = model.blocks[layer]

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        residuals[layer] = arguments[0] if arguments else options["hidden_states"]

    reader = dict(block.named_children()).get("ln1", block.attn)
    return reader.register_forward_pre_hook(keep, with_kwargs=True)


def mlp_reader(model: Model, layer: int) -> nn.Module:
    """What takes in the residual stream for a layer's MLP: the norm before it, or the MLP itself (OLMo 2).

    ValueError if the MLP shares the attention's norm.
    """
    block = model.blocks[layer]
    children = dict(block.named_children())
    if "ln2" in children:
        return children["ln2"]
    if "ln1" in children:
        raise ValueError(
            f"expected MLPs that read the residual stream by a norm of their own, got a layer {layer} whose "
            f"attention and MLP share a norm: their inputs cannot be told apart; use a method for components."
        )
    return block.mlp


def heads_are_tied(model: Model, run: Run, layer: int, matrix: str) -> bool:
    """Whether one head's query or key changes what the others give: a norm of all heads together follows (OLMo 2)."""
    first, z = torch.zeros(1, dtype=torch.long, device=run.tokens.device), f"blocks.{layer}.attn.hook_z"

    def enlarge(value: Tensor, hook: object) -> Tensor:
        return value * (1 + (torch.arange(value.shape[2], device=value.device) == 0)[:, None].to(value.dtype))

    hooks = [(f"blocks.{layer}.attn.hook_{matrix[-1].lower()}", enlarge)]
    plain, other = (
        through_layer(model, run, first, layer, hooks=own, names=[z], with_mlp=False)[1][z] for own in ([], hooks)
    )
    group = model.cfg.n_heads // unchecked_shape(model).units(matrix)
    return not torch.equal(plain[:, :, group:], other[:, :, group:])


def head_readers(layer: int, shape: ModelShape) -> list[Destination]:
    """The destinations in a layer's attention: the query of each head, then the key and the value of each KV head."""
    readers: list[Destination] = []
    for matrix, _ in PROJECTIONS:
        group = shape.n_heads // shape.units(matrix)
        readers += [Component(layer, "H", head, matrix) for head in range(0, shape.n_heads, group)]
    return readers


@dataclass(frozen=True, eq=False)
class SourceOutputs:
    """What the sources of a run add to the residual stream, heads still in their own d_head coordinates."""

    embed: Float[Tensor, "batch pos d_model"]
    """The residual stream that enters layer 0."""
    heads: tuple[Float[Tensor, "batch pos head d_head"], ...]
    """Each layer's z by head."""
    mlps: tuple[Float[Tensor, "batch pos d_model"], ...]
    """Each MLP's output, after its post-norm."""
    attention: dict[int, tuple[Float[Tensor, "batch pos d_model"], ...]]
    """Layer -> what enters the post-norm of its attention (Gemma 2), in the runs at which it is linearised."""

    def minus(
        self, other: "SourceOutputs", mask: Bool[Tensor, "batch pos"], *, at: Sequence["SourceOutputs"] = ()
    ) -> "SourceOutputs":
        """The difference at real tokens, 0 at padding; post-norms are linearised `at` these runs (default: `other`)."""

        def difference(values: Tensor, others: Tensor) -> Tensor:
            dtype = torch.promote_types(values.dtype, torch.float32)
            padding = ~mask.view(*mask.shape, *[1] * (values.ndim - 2))
            return (values.to(dtype) - others.to(dtype)).masked_fill(padding, 0.0)

        runs = at or (other,)
        attention = {layer: tuple(run.attention[layer][0] for run in runs) for layer in other.attention}
        heads, mlps = map(difference, self.heads, other.heads), map(difference, self.mlps, other.mlps)
        return SourceOutputs(difference(self.embed, other.embed), tuple(heads), tuple(mlps), attention)

    def at(self, rows: slice, places: slice) -> "SourceOutputs":
        """The outputs of these prompts at these positions."""
        here = rows, places
        attention = {layer: tuple(x[here] for x in runs) for layer, runs in self.attention.items()}
        heads, mlps = tuple(x[here] for x in self.heads), tuple(x[here] for x in self.mlps)
        return SourceOutputs(self.embed[here], heads, mlps, attention)


def source_sites(sizes: ModelShape) -> list[str]:
    """The hook points whose values are all that the sources write."""
    layers = range(sizes.n_layers)
    names = [(f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out") for layer in layers]
    return ["blocks.0.hook_resid_pre", *(name for pair in names for name in pair)]


def source_outputs(
    model: Model, values: Mapping[str, Tensor], attention: Mapping[int, Tensor] | None = None
) -> SourceOutputs:
    """What the sources write when these are the values at `source_sites`.

    `attention`: layer -> what enters its post-norm; without it, heads are seen before their post-norm.
    """
    layers = range(unchecked_shape(model).n_layers)
    heads = tuple(values[f"blocks.{layer}.attn.hook_z"] for layer in layers)
    mlps = tuple(values[f"blocks.{layer}.hook_mlp_out"] for layer in layers)
    entering = {layer: (value,) for layer, value in (attention or {}).items()}
    return SourceOutputs(values["blocks.0.hook_resid_pre"], heads, mlps, entering)


@contextmanager
def recording_outputs(model: Model) -> Iterator[Callable[[], SourceOutputs]]:
    """Inside, a forward pass records what every source writes; the yielded function gives it once the pass is over."""
    values: dict[str, Tensor] = {}
    attention: dict[int, Tensor] = {}

    def keep(value: Tensor, hook: object, *, name: str) -> None:
        values[name] = value.detach()

    def keep_input(module: nn.Module, arguments: tuple[Tensor, ...], *, layer: int) -> None:
        attention[layer] = arguments[0].detach()

    sizes = unchecked_shape(model)
    with ExitStack() as stack:
        for layer in range(sizes.n_layers):
            module = post_norm(model, layer, "ATTN")
            if module is not None:
                stack.callback(module.register_forward_pre_hook(partial(keep_input, layer=layer)).remove)
        hooks = [(name, partial(keep, name=name)) for name in source_sites(sizes)]
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        yield lambda: source_outputs(model, values, attention)


def contributions(model: Model, outputs: SourceOutputs) -> Float[Tensor, "source batch pos d_model"]:
    """What each source adds to the residual stream, in the order of `sources(shape)`, for differences of outputs.

    Their sum is the residual stream, up to the biases of the output projections, which belong to no head. Where a
    post-norm follows attention (Gemma 2), a head adds what the norm makes of it to first order, in the mean over the
    runs of `outputs.attention`; without any, heads are left as they are before the norm.

    The result is large: pass a few prompts at a time (`outputs.at(...)`).
    """
    sizes, matrices, scale = unchecked_shape(model), slots(model), scales_of(model)
    batch, places = outputs.embed.shape[:2]
    dtype = torch.promote_types(outputs.embed.dtype, torch.float32)
    count = 1 + sizes.n_layers * (sizes.n_heads + 1)
    added = outputs.embed.new_empty(count, batch, places, sizes.d_model, dtype=dtype)
    added[0] = outputs.embed
    for layer in range(sizes.n_layers):
        start = 1 + layer * (sizes.n_heads + 1)
        stop, norm = start + sizes.n_heads, output_norm(model, layer)
        weight = matrices[layer, "W_O"].weight.to(dtype) * scale.heads
        z = outputs.heads[layer].to(dtype).permute(2, 0, 1, 3).flatten(1, 2)
        torch.bmm(z, weight, out=added[start:stop].flatten(1, 2))
        runs = outputs.attention.get(layer, ())
        if norm is not None and runs:
            heads = added[start:stop].clone()
            added[start:stop] = sum(norm.differential(run, heads) for run in runs) / len(runs)
        added[stop] = outputs.mlps[layer] * scale.written
    return added


def behind_post_norms(
    model: Model, change: Float[Tensor, "source batch pos d_model"], attention: Sequence[Tensor]
) -> Float[Tensor, "source batch pos d_model"]:
    """What the residual stream gains by each source's change alone; `attention`: by layer what enters its post-norm."""
    n_heads = unchecked_shape(model).n_heads
    for layer, entering in enumerate(attention):
        norm = output_norm(model, layer)
        if norm is not None:
            heads = slice(1 + layer * (n_heads + 1), 1 + layer * (n_heads + 1) + n_heads)
            change[heads] = norm.change(entering, change[heads].clone())
    return change


def output_norm(model: Model, layer: int) -> Norm | None:
    """The norm between a layer's attention and the residual stream, if there is one (Gemma 2)."""
    module = post_norm(model, layer, "ATTN")
    return None if module is None else norm_of(module, model)


@torch.no_grad()
def _check_sums(model: Model) -> None:
    """ValueError unless sources add up to what destinations read, in two short runs."""
    with preserved(model):
        first, second = _short_run(model, 1), _short_run(model, 3)
        tolerance = 1e-3 if first[1].logits.dtype in (torch.float32, torch.float64) else 5e-2
        for failure, actual, expected in _equations(model, first, second):
            if not torch.allclose(actual.float(), expected.float(), atol=tolerance * float(expected.abs().max())):
                raise ValueError(
                    f"expected a model whose residual stream is the sum of its parts, got "
                    f"{architecture(model) or type(model).__name__}, in which {failure}: use a method for components."
                )


def _equations(
    model: Model, first: tuple[SourceOutputs, DestinationInputs], second: tuple[SourceOutputs, DestinationInputs]
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """What is wrong if two tensors differ, and the two: differences between the runs, so that biases drop out."""
    (outputs, inputs), (other_outputs, other) = first, second
    real = torch.ones_like(outputs.embed[..., 0], dtype=torch.bool)
    change = contributions(model, replace(outputs.minus(other_outputs, real), attention={}))
    for layer in outputs.attention:
        # A post-norm is not linear: heads must add up before it, and as a layer behind it.
        start, norm = 1 + layer * (model.cfg.n_heads + 1), output_norm(model, layer)
        (here,), (there,) = outputs.attention[layer], other_outputs.attention[layer]
        heads = slice(start, start + model.cfg.n_heads)
        yield f"the heads of layer {layer} do not sum to its attention", change[heads].sum(0), here - there
        assert norm is not None
        change[heads] = (norm.without_bias(here) - norm.without_bias(there)) / model.cfg.n_heads
    yield "sources do not sum to the last residual stream", change.sum(0), inputs.logits - other.logits
    matrices, heads = slots(model), model.cfg.n_heads
    for layer in range(len(model.blocks)):
        # What the MLP reads is the sum of the sources below it: with its own layer's heads, unless blocks are parallel.
        entering = 1 + layer * (heads + 1)
        count = entering if is_parallel(model) else entering + heads
        order = "parallel" if is_parallel(model) else "sequential"
        yield f"the MLP of block {layer} is not {order}", change[:count].sum(0), inputs.mlps[layer] - other.mlps[layer]
        norm = input_norm(model, layer)
        normed, other_normed = (norm.without_bias(run.residuals[layer]) for run in (inputs, other))
        for i, (matrix, _) in enumerate(PROJECTIONS):
            weight = matrices[layer, matrix].weight.to(normed.dtype)
            linear = torch.einsum("bpd,uwd->bpuw", normed - other_normed, weight)
            projected = inputs.projections[layer][i] - other.projections[layer][i]
            yield f"L{layer} {matrix} does not act on the normalized residual stream", linear, projected


def _short_run(model: Model, start: int) -> tuple[SourceOutputs, DestinationInputs]:
    tokens = torch.arange(start, start + 6, device=device_of(model))[None]
    with recording_outputs(model) as outputs, recording_inputs(model) as inputs:
        logits_at(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    return outputs(), inputs[0]
