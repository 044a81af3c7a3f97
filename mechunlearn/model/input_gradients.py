"""The metric's gradient with respect to what each destination reads, without splitting the model's inputs."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.model.kinds import Model, unchecked_shape
from mechunlearn.model.norms import norm_of
from mechunlearn.model.readers import READ, Reading
from mechunlearn.model.slots import slots


class InputGradients:
    """The metric's gradient with respect to every destination's own copy of the residual stream, averaged over runs.

    Kept in d_head coordinates until it is made large, for a few prompts at a time. For one run the gradient at
    the copy that a head's W_Q reads is

        turned(W_Q g) / s - x (x . turned(W_Q g)) / (d_model s)

    with g the gradient at the query, x and s the direction and scale of the norm's input; see `Norm`.
    """

    def __init__(self, model: Model, mask: Bool[Tensor, "batch pos"]) -> None:
        self.sizes = unchecked_shape(model)
        self.slots = slots(model)
        self.norms = [norm_of(block.ln1, model) for block in model.blocks]
        self._mask = mask
        self._runs = 0
        self._heads: list[Tensor] = []
        self._along: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.norms]
        self._copies: list[Tensor] = []

    def add(self, read: Reading, gradients: Sequence[Tensor | None]) -> None:
        """One more run: what it read, and the gradients with respect to `read.tensors()` (None: zero)."""
        dtype = self.norms[0].weight.dtype
        real = [
            self._at_real(torch.zeros_like(tensor) if gradient is None else gradient).to(dtype)
            for tensor, gradient in zip(read.tensors(), gradients, strict=True)
        ]
        count = 3 * self.sizes.n_layers
        heads = []
        for layer, norm in enumerate(self.norms):
            direction, scale = norm.direction_and_scale(self._at_real(read.residuals[layer]))
            gradient = torch.cat(real[3 * layer : 3 * layer + 3], dim=2) / scale[..., None]
            along = (gradient * self._projected(layer, direction * norm.weight)).sum(-1) / self.sizes.d_model
            self._along[layer].append((along, direction))
            heads.append(gradient)
        self._heads = [a + b for a, b in zip(self._heads, heads, strict=True)] if self._runs else heads
        self._copies = [a + b for a, b in zip(self._copies, real[count:], strict=True)] if self._runs else real[count:]
        self._runs += 1

    def at_heads(self, layer: int, rows: slice, places: slice) -> Float[Tensor, "destination batch pos d_model"]:
        """At the copies that the layer's queries, keys and values read, in the order of `head_readers`."""
        gradient = self._heads[layer][rows, places]
        units, shape = gradient.shape[2], gradient.shape[:2]
        weight = self.norms[layer].turned(torch.cat(self._weights(layer)))
        found = torch.bmm(gradient.permute(2, 0, 1, 3).flatten(1, 2), weight).view(units, *shape, -1)
        for along, direction in self._along[layer]:
            found.addcmul_(along[rows, places].permute(2, 0, 1)[..., None], direction[rows, places], value=-1)
        return found.div_(self._runs)

    def at_mlp(self, layer: int, rows: slice, places: slice) -> Float[Tensor, "1 batch pos d_model"]:
        """At the copy that the layer's MLP reads."""
        return self._copies[layer][None, rows, places] / self._runs

    def at_logits(self, rows: slice, places: slice) -> Float[Tensor, "1 batch pos d_model"]:
        """At the final norm's input."""
        return self._copies[-1][None, rows, places] / self._runs

    def _projected(self, layer: int, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos unit d_head"]:
        return torch.cat([torch.einsum("bpd,uwd->bpuw", x, weight) for weight in self._weights(layer)], dim=2)

    def _weights(self, layer: int) -> list[Float[Tensor, "unit d_head d_model"]]:
        dtype, found = self.norms[layer].weight.dtype, (self.slots[layer, matrix] for matrix, _ in READ)
        return [slot.view(slot.parameter.detach()).to(dtype) for slot in found]

    def _at_real(self, value: Tensor) -> Tensor:
        return value.masked_fill(~self._mask.view(*self._mask.shape, *[1] * (value.ndim - 2)), 0.0)
