"""Runs in which every destination reads a residual stream of its own: circuits of edges, and input gradients."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechunlearn.components.component import Component
from mechunlearn.components.edge import destinations
from mechunlearn.model.classes import Model, unchecked_shape
from mechunlearn.model.decomposition import scales_of
from mechunlearn.model.edges import (
    PROJECTIONS,
    DestinationInputs,
    head_readers,
    keep_read_by_attention,
    mlp_reader,
    output_norm,
)
from mechunlearn.model.hooks import Hook
from mechunlearn.model.matrices import slots
from mechunlearn.model.norms import input_norm, post_norm
from mechunlearn.model.running import logits_at


class EdgeCircuits:
    """Runs a model with edges removed: along those, a destination reads what the source writes in another run.

    A destination v reads r + sum over removed edges u -> v of (other_u - own_u), with r the residual stream of this
    run and own_u what u adds to it here, where u's inputs are the circuit's too. One forward is enough: sources come
    before the destinations that read them.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sizes = unchecked_shape(model)
        self.norms = [input_norm(model, layer) for layer in range(len(model.blocks))]
        self.outputs = [output_norm(model, layer) for layer in range(self.sizes.n_layers)]
        self.slots = slots(model)
        self.scales = scales_of(model)
        self.column = {destination: place for place, destination in enumerate(destinations(self.sizes))}

    @torch.no_grad()
    def logits(
        self,
        tokens: Int[Tensor, "row pos"],
        mask: Bool[Tensor, "row pos"],
        positions: Int[Tensor, "row answer"],
        other: Float[Tensor, "source row pos d_model"],
        removed: Bool[Tensor, "row source destination"],
    ) -> Float[Tensor, "row answer d_vocab"]:
        """Logits of the rows, each with its own edges removed; `other` is what sources add in the other run."""
        with _Pass(self, other, removed).hooked():
            return logits_at(self.model, tokens, mask, positions)


class _Pass:
    """One forward pass: what sources have changed so far, and the hooks that hand it to the destinations.

    The residual stream of the pass itself is never changed. Each destination gets, at its own input only, the changes
    of the sources whose edges to it are removed:

    - an MLP and the logits at the input of the norm in front of them, or of the MLP itself where it has none;
    - queries, keys and values, whose norm is shared, at their own outputs: a projection is linear in the normalized
      residual stream, so what it gives more for the changed stream is added to it.
    """

    def __init__(
        self,
        circuits: EdgeCircuits,
        other: Float[Tensor, "source row pos d_model"],
        removed: Bool[Tensor, "row source destination"],
    ) -> None:
        self.circuits = circuits
        self.other = other
        self.removed = removed.to(other.dtype)
        # other - own, filled in source by source. No source is read before it has written: zeros do until then.
        self.change = torch.zeros_like(other)
        self.residual: dict[int, Tensor] = {}
        self.attention: dict[int, Tensor] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside, a forward pass of the model is this pass."""
        model, sizes = self.circuits.model, self.circuits.sizes
        hooks: list[Hook] = [("blocks.0.hook_resid_pre", self._keep_embedding)]
        with ExitStack() as stack:
            for layer in range(sizes.n_layers):
                prefix = f"blocks.{layer}."
                hooks += [(f"{prefix}attn.hook_{x}", self._changed_projection(layer, m)) for m, x in PROJECTIONS]
                hooks.append((f"{prefix}attn.hook_z", partial(self._keep_heads, layer)))
                hooks.append((f"{prefix}hook_mlp_out", partial(self._keep_mlp, layer)))
                mlp_hook = partial(self._changed_input, self.circuits.column[Component(layer, "MLP")])
                module_hooks: dict[nn.Module, Any] = {mlp_reader(model, layer): mlp_hook}
                module = post_norm(model, layer, "ATTN")
                if module is not None:
                    module_hooks[module] = partial(self._keep_attention, layer)
                for module, hook in module_hooks.items():
                    stack.callback(module.register_forward_pre_hook(hook).remove)
                stack.callback(keep_read_by_attention(model, layer, self.residual).remove)
            logits_hook = partial(self._changed_input, self.circuits.column["logits"])
            stack.callback(model.ln_final.register_forward_pre_hook(logits_hook).remove)
            stack.enter_context(model.hooks(fwd_hooks=hooks))
            yield

    def _keep_embedding(self, value: Tensor, hook: object) -> None:
        self.change[0] = self.other[0] - value

    def _changed_projection(self, layer: int, matrix: str) -> Any:
        """A hook that gives the queries, keys or values of residual streams that differ from head to head."""
        circuits = self.circuits
        readers = [d for d in head_readers(layer, circuits.sizes) if isinstance(d, Component) and d.matrix == matrix]
        columns = [circuits.column[reader] for reader in readers]

        def add(value: Tensor, hook: object) -> Tensor:
            removed = self.removed[:, :, columns]
            if not bool(removed.any()):
                return value
            norm, slot, own = circuits.norms[layer], circuits.slots[layer, matrix], self.residual[layer]
            # The residual stream as each head's matrix reads it, normalized as in the model: scales differ by head.
            read = own + self._gained(removed)
            difference = norm.without_bias(read) - norm.without_bias(own)
            weight = slot.weight.to(difference.dtype)
            added = einsum(difference, weight, "unit row pos model, unit width model -> row pos unit width")
            return value + added.to(value.dtype)

        return add

    def _keep_attention(self, layer: int, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.attention[layer] = arguments[0]

    def _keep_heads(self, layer: int, z: Tensor, hook: object) -> None:
        """What heads write; where a post-norm follows (Gemma 2), before it."""
        weight = self.circuits.slots[layer, "W_O"].weight.to(self.other.dtype) * self.circuits.scales.heads
        places = self._head_places(layer)
        written = einsum(z.to(weight.dtype), weight, "row pos unit width, unit width model -> unit row pos model")
        self.change[places] = self.other[places] - written.to(self.other.dtype)

    def _keep_mlp(self, layer: int, value: Tensor, hook: object) -> None:
        place = self._head_places(layer).stop
        self.change[place] = self.other[place] - value * self.circuits.scales.written

    def _changed_input(self, column: int, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A hook by which a norm gets its reader's residual stream; the stream itself goes on as it is."""
        removed = self.removed[:, :, column]
        read = arguments[0] + self._gained(removed[:, :, None])[0]
        is_final = module is self.circuits.model.ln_final  # which takes float32 too
        return (read if is_final else read.to(arguments[0].dtype), *arguments[1:])

    def _gained(self, removed: Float[Tensor, "row source unit"]) -> Float[Tensor, "unit row pos model"]:
        """What a destination reads more along its removed edges, by their changes."""
        sums = "row source unit, source row pos model -> unit row pos model"
        if not self.attention:
            return einsum(removed, self.change, sums)
        # The heads of a layer with a post-norm (Gemma 2) change together what enters it: it normalizes anew.
        linear, gained = removed.clone(), 0
        for layer, entering in self.attention.items():
            heads, norm = self._head_places(layer), self.circuits.outputs[layer]
            assert norm is not None
            if bool(removed[:, heads].any()):
                # Summed anew, not changed by a difference: the norm would blow the rounding of a sum of 0 up.
                other, own = self.other[heads], self.other[heads] - self.change[heads]
                mixed = einsum(removed[:, heads], other, sums) + einsum(1 - removed[:, heads], own, sums)
                bias = getattr(self.circuits.model.blocks[layer].attn, "b_O", None)
                mixed = mixed if bias is None else mixed + bias
                gained = gained + norm.without_bias(mixed) - norm.without_bias(entering)
            linear[:, heads] = 0
        return gained + einsum(linear, self.change, sums)

    def _head_places(self, layer: int) -> slice:
        """The layer's heads among the sources; its MLP comes after them."""
        heads = self.circuits.sizes.n_heads
        start = 1 + layer * (heads + 1)
        return slice(start, start + heads)


class InputGradients:
    """The metric's gradient with respect to every destination's own copy of the residual stream, averaged over runs.

    Gradients at heads are kept in d_head coordinates and made large (d_model) for a few prompts at a time. For one run
    the gradient at the copy that a head's W_Q reads is

        h(W_Q g) / s - x (x . h(W_Q g)) / (d_model s),    h = `Norm.numerator_transposed`

    with g the gradient at the query, x and s the direction and scale of the norm's input; see `Norm`. Without a norm
    in front of the attention (OLMo 2) it is W_Q g alone.
    """

    def __init__(self, model: Model, mask: Bool[Tensor, "batch pos"]) -> None:
        self.sizes = unchecked_shape(model)
        self.slots = slots(model)
        self.norms = [input_norm(model, layer) for layer in range(len(model.blocks))]
        self._mask = mask
        self._runs = 0
        self._heads: list[Tensor] = []
        self._along: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.norms]
        self._copies: list[Tensor] = []

    def add(self, inputs: DestinationInputs, gradients: Sequence[Tensor | None]) -> None:
        """Add a run: what its destinations read, and the gradients with respect to `inputs.tensors()` (None: zero)."""
        dtype = self.norms[0].weight.dtype
        real = [
            self._at_real(torch.zeros_like(tensor) if gradient is None else gradient).to(dtype)
            for tensor, gradient in zip(inputs.tensors(), gradients, strict=True)
        ]
        count = 3 * self.sizes.n_layers
        heads = []
        for layer, norm in enumerate(self.norms):
            direction, scale = norm.direction_and_scale(self._at_real(inputs.residuals[layer]))
            gradient = torch.cat(real[3 * layer : 3 * layer + 3], dim=2) / scale[..., None]
            # x . h(W g) = (W applied to weight * x) . g, a number per unit. The scale differs between runs, so g / s is
            # summed over runs before W; the part along x has another x in each run and is kept run by run.
            weighted = direction * norm.weight
            projected = [torch.einsum("bpd,uwd->bpuw", weighted, weight) for weight in self._weights(layer)]
            along = norm.scaled * (gradient * torch.cat(projected, dim=2)).sum(-1) / self.sizes.d_model
            self._along[layer].append((along, direction))
            heads.append(gradient)
        self._heads = [a + b for a, b in zip(self._heads, heads, strict=True)] if self._runs else heads
        self._copies = [a + b for a, b in zip(self._copies, real[count:], strict=True)] if self._runs else real[count:]
        self._runs += 1

    def at_heads(self, layer: int, rows: slice, places: slice) -> Float[Tensor, "destination batch pos d_model"]:
        """At the copies that the layer's queries, keys and values read, in the order of `head_readers`."""
        gradient = self._heads[layer][rows, places]
        units, shape = gradient.shape[2], gradient.shape[:2]
        weight = self.norms[layer].numerator_transposed(torch.cat(self._weights(layer)))
        large = torch.bmm(gradient.permute(2, 0, 1, 3).flatten(1, 2), weight).view(units, *shape, -1)
        for along, direction in self._along[layer]:
            large.addcmul_(along[rows, places].permute(2, 0, 1)[..., None], direction[rows, places], value=-1)
        return large.div_(self._runs)

    def at_mlp(self, layer: int, rows: slice, places: slice) -> Float[Tensor, "1 batch pos d_model"]:
        """At the copy that the layer's MLP reads."""
        return self._copies[layer][None, rows, places] / self._runs

    def at_logits(self, rows: slice, places: slice) -> Float[Tensor, "1 batch pos d_model"]:
        """At the final norm's input."""
        return self._copies[-1][None, rows, places] / self._runs

    def _weights(self, layer: int) -> list[Float[Tensor, "unit d_head d_model"]]:
        dtype = self.norms[layer].weight.dtype
        return [self.slots[layer, matrix].weight.to(dtype) for matrix, _ in PROJECTIONS]

    def _at_real(self, value: Tensor) -> Tensor:
        return value.masked_fill(~self._mask.view(*self._mask.shape, *[1] * (value.ndim - 2)), 0.0)
