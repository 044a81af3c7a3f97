"""LayerNorm and RMSNorm as formulas: their output for a vector and, with the scale held, for a part of one."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechunlearn.model.classes import Model
from mechunlearn.model.matrices import cast_weights


@dataclass(frozen=True, eq=False)
class Norm:
    """A LayerNorm or RMSNorm: x -> weight * c(x) / s(x) + bias.

    c subtracts the mean (LayerNorm) or nothing (RMSNorm); s(x)^2 is the mean square of c(x), plus eps. With
    h = `numerator_transposed(g)`, the gradient with respect to x is, for a gradient g with respect to the output,

        h / s(x) - u * (u . h) / (d_model * s(x)),    u = c(x) / s(x)
    """

    weight: Float[Tensor, "d_model"]
    """The factor of each coordinate, an offset of 1 (Gemma) included."""
    bias: Float[Tensor, "d_model"]
    """The constant term; zero in an RMSNorm."""
    centred: bool
    """True for a LayerNorm."""
    eps: float
    scaled: bool = True
    """False for no norm at all, which is s(x) = 1: then `direction_and_scale` gives x, and the gradient is h."""

    def numerator(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """weight * c(x): what the norm divides by the scale. It is linear, so parts of an input can be taken alone."""
        return self._centre(x) * self.weight

    def numerator_transposed(self, gradient: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """c(weight * gradient): the transpose of `numerator`."""
        return self._centre(gradient * self.weight)

    def direction_and_scale(
        self, x: Float[Tensor, "*rows d_model"]
    ) -> tuple[Float[Tensor, "*rows d_model"], Float[Tensor, "*rows 1"]]:
        """c(x) / s(x) and s(x)."""
        x = self._centre(x.to(self.weight.dtype))
        scale = (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() if self.scaled else torch.ones_like(x[..., :1])
        return x / scale, scale

    def without_bias(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The norm's output for x, less its bias."""
        return self.direction_and_scale(x)[0] * self.weight

    def change(
        self, x: Float[Tensor, "*rows d_model"], more: Float[Tensor, "*any d_model"]
    ) -> Float[Tensor, "*any d_model"]:
        """What the output gains when the input x becomes x + more."""
        x = x.to(self.weight.dtype)
        return self.without_bias(x + more) - self.without_bias(x)

    def differential(
        self, x: Float[Tensor, "*rows d_model"], more: Float[Tensor, "*any d_model"]
    ) -> Float[Tensor, "*any d_model"]:
        """The first-order part of `change`: the derivative at x, applied to `more`."""
        direction, scale = self.direction_and_scale(x)
        centred = self._centre(more.to(self.weight.dtype)) / scale
        if not self.scaled:
            return self.weight * centred
        return self.weight * (centred - direction * (direction * centred).mean(-1, keepdim=True))

    def frozen(self, x: Float[Tensor, "*rows d_model"]) -> "FrozenNorm":
        """The norm with its scale held at s(x), which makes it linear up to the bias."""
        return FrozenNorm(self, self.direction_and_scale(x)[1])

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm with a fixed scale and without its bias: a linear map, which can be applied to parts of an input."""

    norm: Norm
    scale: Float[Tensor, "*rows 1"]

    def __call__(self, part: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        return self.norm.numerator(part) / self.scale

    def transposed(self, direction: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """The direction before the norm that reads what `direction` reads after it."""
        return self.norm.numerator_transposed(direction) / self.scale


@torch.no_grad()
def norm_of(module: nn.Module, model: Model) -> Norm:
    """The `Norm` that a module computes, measured by running it, since classes and conventions differ by model."""
    parameter = next(module.parameters(), next(model.parameters()))  # a folded norm has no parameters
    d_model, eps = model.cfg.d_model, model.cfg.eps
    # Signs v have mean 0 and mean square 1, so v and -v give the bias and the weight. v + 1 tells whether the mean is
    # subtracted. A small vector and an uneven one check eps and the formula as a whole.
    signs = torch.where(torch.arange(d_model) % 2 == 0, 1.0, -1.0)
    probes = torch.stack([signs, -signs, signs + 1, 1e-2 * signs, torch.linspace(-2, 3, d_model)])
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    probes = probes.to(parameter.device, dtype)
    with cast_weights(module):
        outputs = module(probes[None])[0].to(dtype)
    bias = (outputs[0] + outputs[1]) / 2
    weight = (outputs[0] - bias) * probes[0] * (1 + eps) ** 0.5
    norm = Norm(weight, bias, torch.allclose(outputs[2], outputs[0], rtol=1e-3, atol=1e-3), eps)
    expected = norm.without_bias(probes) + bias
    if not torch.allclose(expected, outputs, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"expected a LayerNorm or an RMSNorm with eps {eps}, got a {type(module).__name__} that computes something "
            f"else: what becomes of parts of its input cannot be told; use attribution_patching or activation_patching."
        )
    return norm


def input_norm(model: Model, layer: int) -> Norm:
    """What a layer's attention makes of the residual stream first: its norm, or in models without one nothing."""
    module = getattr(model.blocks[layer], "ln1", None)
    if module is not None:
        return norm_of(module, model)
    parameter = next(model.parameters())
    ones = torch.ones(
        model.cfg.d_model, device=parameter.device, dtype=torch.promote_types(parameter.dtype, torch.float32)
    )
    return Norm(ones, torch.zeros_like(ones), centred=False, eps=0.0, scaled=False)


def post_norm(model: Model, layer: int, part: str) -> nn.Module | None:
    """The norm between a layer's attention (`"H"`, `"ATTN"`) or MLP and the residual stream (Gemma 2); None without."""
    return getattr(model.blocks[layer], "ln1_post" if part in ("H", "ATTN") else "ln2_post", None)
