"""Norms with their scale held fixed, which makes them linear: what each part of their input becomes."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechunlearn.model.kinds import Model


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """x -> slope * (x - mean of x, if it is a LayerNorm): the norm without its bias, at the scale of one input."""

    slope: Float[Tensor, "*batch d_model"]
    """Gain over scale, at each place of that input."""
    bias: Float[Tensor, "d_model"]
    """What the norm adds, whatever its input."""
    centred: bool
    """Whether the mean is subtracted."""

    def __call__(self, value: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        return self.slope * self._centre(value)

    def transposed(self, direction: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """The direction before the norm that reads what `direction` reads after it."""
        return self._centre(self.slope * direction)

    def _centre(self, value: Tensor) -> Tensor:
        return value - value.mean(-1, keepdim=True) if self.centred else value


@torch.no_grad()
def frozen_norm(norm: nn.Module, value: Float[Tensor, "batch pos d_model"]) -> FrozenNorm:
    """`norm` (a LayerNorm or RMS norm of any class) with its scale held at what it is for `value`.

    Gain and bias are found by asking the norm for large vectors of alternating signs, whose scale is their size:
    so it does not matter how an architecture stores them.
    """
    d_model = value.shape[-1]
    assert d_model % 2 == 0, "alternating signs have mean zero only over an even number of entries"
    signs = torch.ones_like(value[:1, :1])
    signs[..., 1::2] = -1.0
    dtype = torch.promote_types(value.dtype, torch.float32)
    up, down, shifted = (norm(1024 * x)[0, 0].to(dtype) for x in (signs, -signs, signs + 1))
    bias, gain = (up + down) / 2, (up - down) / 2 * signs[0, 0].to(dtype)
    centred = bool((shifted - up).abs().max() < 0.1 * gain.abs().max())
    product = gain * (value - value.mean(-1, keepdim=True) if centred else value).to(bias.dtype)
    inverse = ((norm(value).to(dtype) - bias) * product).sum(-1, keepdim=True) / product.square().sum(-1, keepdim=True)
    return FrozenNorm(gain * inverse, bias, centred)


def post_norm(model: Model, layer: int, part: str) -> nn.Module | None:
    """The norm that the output of the layer's attention (`"H"`, `"ATTN"`) or MLP passes, as in Gemma 2, if any."""
    return getattr(model.blocks[layer], "ln1_post" if part in ("H", "ATTN") else "ln2_post", None)
