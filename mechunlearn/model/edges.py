"""Edges of a model: what every destination reads, what every source adds, and whether their sum is the model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mechunlearn.components.component import Component, ModelShape
from mechunlearn.components.edge import Destination, Edge, edge_mask, mask_of
from mechunlearn.components.edge_scores import EdgeMask
from mechunlearn.model.admission import check_unforked
from mechunlearn.model.classes import Model, architecture, device_of, shape, unchecked_shape
from mechunlearn.model.guard import preserved
from mechunlearn.model.hooks import recording
from mechunlearn.model.matrices import slots
from mechunlearn.model.norms import Norm, norm_of, post_norm
from mechunlearn.model.running import logits_at

_checked: WeakSet[nn.Module] = WeakSet()


def is_parallel(model: Model) -> bool:
    """True if attention and MLP of a layer read the same input (GPT-NeoX): its heads do not feed its MLP."""
    return bool(model.cfg.parallel_attn_mlp)


def edges_of(model: Model, chosen: Iterable[Edge | str] | None = None) -> Bool[Tensor, "source destination"]:
    """Which edges are meant (default: all), as a mask; ValueError for one that the model does not have.

    Also for a model that is not the sum of its parts: checked once for each model, with two short forwards.
    """
    sizes = shape(model)
    check_unforked(model)
    if model not in _checked:
        _check_sums(model)
        _checked.add(model)
    if isinstance(chosen, EdgeMask) and chosen.shape != sizes:
        raise ValueError(
            f"expected edges of this model ({sizes}), got a circuit of {chosen.shape}: it belongs to the model that it "
            f"was found in."
        )
    real = edge_mask(sizes, parallel=is_parallel(model))
    return real if chosen is None else _only_real(list(chosen), real, sizes)


def _only_real(
    chosen: list[Edge | str], real: Bool[Tensor, "source destination"], sizes: ModelShape
) -> Bool[Tensor, "source destination"]:
    if not chosen:
        raise ValueError("expected at least one edge, got none: leave edges=... out to have all of them.")
    unreal = [str(edge) for edge in chosen if bool((mask_of([edge], sizes) & ~real).any())]
    if unreal:
        raise ValueError(
            f"expected edges of this model, got {', '.join(unreal[:5])}: in its parallel blocks attention and MLP read "
            f"the same input, so that a layer's heads do not feed its MLP; leave these edges out."
        )
    return mask_of(chosen, sizes)


@torch.no_grad()
def _check_sums(model: Model) -> None:
    """ValueError unless reads and writes are what edges take them for."""
    with preserved(model):
        first, second = _short_run(model, 1), _short_run(model, 3)
        tolerance = 1e-3 if first[1].logits.dtype in (torch.float32, torch.float64) else 5e-2
        for what, found, expected in _claims(model, first, second):
            if not torch.allclose(found.float(), expected.float(), atol=tolerance * float(expected.abs().max())):
                raise ValueError(
                    f"expected a model whose residual stream is the sum of its parts, got "
                    f"{architecture(model) or type(model).__name__}, in which {what}: use a method for components."
                )


def _claims(
    model: Model, first: "tuple[Written, Reading]", second: "tuple[Written, Reading]"
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """What must be equal: differences between two runs, so that biases drop out."""
    (mine, read), (its, other) = first, second
    change = contributions(model, mine.minus(its, torch.ones_like(mine.embed[..., 0], dtype=torch.bool)))
    yield "sources do not sum to the last residual stream", change.sum(0), read.logits - other.logits
    matrices, heads = slots(model), model.cfg.n_heads
    for layer, block in enumerate(model.blocks):
        entering = 1 + layer * (heads + 1)
        count = entering if is_parallel(model) else entering + heads
        said = "parallel" if is_parallel(model) else "sequential"
        yield f"the MLP of block {layer} is not {said}", change[:count].sum(0), read.mlps[layer] - other.mlps[layer]
        norm = norm_of(block.ln1, model)
        a, b = (norm.direction_and_scale(run.residuals[layer])[0] * norm.weight for run in (read, other))
        for i, (matrix, _) in enumerate(READ):
            slot = matrices[layer, matrix]
            linear = torch.einsum("bpd,uwd->bpuw", a - b, slot.view(slot.parameter).to(a.dtype))
            projected = read.projections[layer][i] - other.projections[layer][i]
            yield f"L{layer} {matrix} does not act on the normalized residual stream", linear, projected


def _short_run(model: Model, start: int) -> "tuple[Written, Reading]":
    tokens = torch.arange(start, start + 6, device=device_of(model))[None]
    with writing(model) as written, reading(model) as read:
        logits_at(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    return written(), read[0]


READ = (("W_Q", "q"), ("W_K", "k"), ("W_V", "v"))


@dataclass(frozen=True, eq=False)
class Reading:
    """What the destinations of a run read: tensors that autograd can differentiate a metric by."""

    residuals: tuple[Float[Tensor, "batch pos d_model"], ...]
    """Per layer: what enters the norm before attention."""
    projections: tuple[tuple[Tensor, ...], ...]
    """Per layer: queries, keys and values [batch, pos, head, d_head], before rotary embedding and qk-norm."""
    mlps: tuple[Float[Tensor, "batch pos d_model"], ...]
    """Per layer: the MLP's own copy of the residual stream, before its norm."""
    logits: Float[Tensor, "batch pos d_model"]
    """The final norm's input."""

    def tensors(self) -> list[Tensor]:
        """What to differentiate by."""
        return [*(tensor for layer in self.projections for tensor in layer), *self.mlps, self.logits]


@contextmanager
def reading(model: Model) -> Iterator[list[Reading]]:
    """Inside, a forward pass records what every destination reads; on leaving, the yielded list holds it.

    An MLP and the final norm get a copy of the residual stream of their own, so that the gradient with respect to it
    is that of this one reader.
    """
    layers = range(unchecked_shape(model).n_layers)
    names = {(layer, m): f"blocks.{layer}.attn.hook_{letter}" for layer in layers for m, letter in READ}
    copies: dict[nn.Module, Tensor] = {}
    found: list[Reading] = []

    def hand_in_a_copy(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        copies[module] = arguments[0].clone()
        return (copies[module], *arguments[1:])

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        copies[module] = arguments[0].detach()

    attention_norms = [block.ln1 for block in model.blocks]
    norms = [mlp_norm(model, layer) for layer in layers]
    with ExitStack() as stack:
        for module in (*norms, model.ln_final):
            stack.callback(module.register_forward_pre_hook(hand_in_a_copy).remove)
        for module in attention_norms:
            stack.callback(module.register_forward_pre_hook(keep).remove)
        recorded = stack.enter_context(recording(model, names.values()))
        yield found
    projections = tuple(tuple(recorded[names[layer, m]] for m, _ in READ) for layer in layers)
    residuals, mlps = tuple(copies[norm] for norm in attention_norms), tuple(copies[norm] for norm in norms)
    found.append(Reading(residuals, projections, mlps, copies[model.ln_final]))


def mlp_norm(model: Model, layer: int) -> nn.Module:
    """The norm in front of a layer's MLP; ValueError if the MLP shares the attention's."""
    module = dict(model.blocks[layer].named_children()).get("ln2")
    if module is None:
        raise ValueError(
            f"expected a norm in front of every MLP, got a block {layer} without ln2: what its MLP reads cannot be "
            f"told from what its attention reads; use a method for components."
        )
    return module


def head_readers(layer: int, shape: ModelShape) -> list[Destination]:
    """The destinations in a layer's attention, in the order of `InputGradients.at_heads`."""
    found: list[Destination] = []
    for matrix, _ in READ:
        group = shape.n_heads // shape.units(matrix)
        found += [Component(layer, "H", head, matrix) for head in range(0, shape.n_heads, group)]
    return found


@dataclass(frozen=True, eq=False)
class Written:
    """What the sources of a run wrote, heads still in their own d_head coordinates."""

    embed: Float[Tensor, "batch pos d_model"]
    """The residual stream that enters layer 0."""
    heads: tuple[Float[Tensor, "batch pos head d_head"], ...]
    """Per layer: each head's z, divided by the scale of the post-norm that follows in Gemma 2."""
    mlps: tuple[Float[Tensor, "batch pos d_model"], ...]
    """Per layer: the MLP's output, after its post-norm."""

    def minus(self, other: "Written", mask: Bool[Tensor, "batch pos"]) -> "Written":
        """The difference at real tokens, 0 at padding."""
        return Written(
            _difference(self.embed, other.embed, mask),
            tuple(_difference(mine, its, mask) for mine, its in zip(self.heads, other.heads, strict=True)),
            tuple(_difference(mine, its, mask) for mine, its in zip(self.mlps, other.mlps, strict=True)),
        )

    def at(self, rows: slice, places: slice) -> "Written":
        """Those prompts and positions."""
        here = rows, places
        return Written(self.embed[here], tuple(x[here] for x in self.heads), tuple(x[here] for x in self.mlps))


def source_sites(sizes: ModelShape) -> list[str]:
    """The hook points whose values are all that the sources write."""
    layers = range(sizes.n_layers)
    names = [(f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out") for layer in layers]
    return ["blocks.0.hook_resid_pre", *(name for pair in names for name in pair)]


def written_as(model: Model, values: Mapping[str, Tensor]) -> Written:
    """What the sources would write with these values at `source_sites`, whatever run they are from.

    Where a post-norm follows attention (Gemma 2), its scale is that of these heads together.
    """
    layers, heads = range(unchecked_shape(model).n_layers), []
    for layer in layers:
        z, norm = values[f"blocks.{layer}.attn.hook_z"], output_norm(model, layer)
        if norm is not None:
            slot = slots(model)[layer, "W_O"]
            z = z.to(norm.weight.dtype)
            weight = slot.view(slot.parameter.detach()).to(z.dtype)
            whole = einsum(z, weight, "batch pos head width, head width model -> batch pos model")
            z = z / norm.direction_and_scale(whole)[1][..., None]
        heads.append(z)
    mlps = tuple(values[f"blocks.{layer}.hook_mlp_out"] for layer in layers)
    return Written(values["blocks.0.hook_resid_pre"], tuple(heads), mlps)


@contextmanager
def writing(model: Model) -> Iterator[Callable[[], Written]]:
    """Inside, a forward pass keeps what every source writes; what is yielded gives it once the pass is over."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def record(value: Tensor, hook: object) -> None:
            found[name] = value.detach()

        return record

    def keep_input(layer: int) -> Callable[..., None]:
        def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[f"blocks.{layer}.attn out"] = arguments[0].detach()

        return record

    names = ["blocks.0.hook_resid_pre"]
    with ExitStack() as stack:
        for layer in range(unchecked_shape(model).n_layers):
            names += [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"]
            module = post_norm(model, layer, "ATTN")
            if module is not None:
                stack.callback(module.register_forward_pre_hook(keep_input(layer)).remove)
        stack.enter_context(model.hooks(fwd_hooks=[(name, keep(name)) for name in names]))
        yield lambda: _written(model, found)


def contributions(model: Model, written: Written) -> Float[Tensor, "source batch pos d_model"]:
    """What each source adds to the residual stream, in the order of `sources(shape)`.

    Their sum is the residual stream, up to the biases of the output projections, which belong to no head. Where a
    post-norm follows attention (Gemma 2), a head's contribution is what becomes of its part with the norm's scale
    held at what it is in this run; the scale depends on all heads of the layer.

    Large: hand in a few prompts at a time (`written.at(...)`).
    """
    sizes, matrices = unchecked_shape(model), slots(model)
    batch, places = written.embed.shape[:2]
    dtype = torch.promote_types(written.embed.dtype, torch.float32)
    count = 1 + sizes.n_layers * (sizes.n_heads + 1)
    found = written.embed.new_empty(count, batch, places, sizes.d_model, dtype=dtype)
    found[0] = written.embed
    for layer in range(sizes.n_layers):
        start = 1 + layer * (sizes.n_heads + 1)
        stop, slot, norm = start + sizes.n_heads, matrices[layer, "W_O"], output_norm(model, layer)
        weight = slot.view(slot.parameter.detach()).to(dtype)
        weight = weight if norm is None else norm.part(weight)
        z = written.heads[layer].to(dtype).permute(2, 0, 1, 3).flatten(1, 2)
        torch.bmm(z, weight, out=found[start:stop].flatten(1, 2))
        found[stop] = written.mlps[layer]
    return found


def output_norm(model: Model, layer: int) -> Norm | None:
    """The norm between a layer's attention and the residual stream, if there is one (Gemma 2)."""
    module = post_norm(model, layer, "ATTN")
    return None if module is None else norm_of(module, model)


def _written(model: Model, found: dict[str, Tensor]) -> Written:
    layers = range(unchecked_shape(model).n_layers)
    heads = []
    for layer in layers:
        z, norm = found[f"blocks.{layer}.attn.hook_z"], output_norm(model, layer)
        if norm is not None:
            scale = norm.direction_and_scale(found[f"blocks.{layer}.attn out"])[1]
            z = z.to(scale.dtype) / scale[..., None]
        heads.append(z)
    mlps = tuple(found[f"blocks.{layer}.hook_mlp_out"] for layer in layers)
    return Written(found["blocks.0.hook_resid_pre"], tuple(heads), mlps)


def _difference(
    mine: Float[Tensor, "batch pos *unit"], its: Float[Tensor, "batch pos *unit"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos *unit"]:
    dtype = torch.promote_types(mine.dtype, torch.float32)
    real = mask.view(*mask.shape, *[1] * (mine.ndim - 2))
    return (mine.to(dtype) - its.to(dtype)).masked_fill(~real, 0.0)
