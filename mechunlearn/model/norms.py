"""What a normalisation does to a vector and, with its scale held, to a part of one; and how it turns gradients."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechunlearn.model.classes import Model


@dataclass(frozen=True, eq=False)
class Norm:
    """A LayerNorm or RMSNorm: x -> weight * c(x) / s(x) + bias.

    c takes the mean away (LayerNorm) or nothing (RMSNorm); s(x) is the root of the mean square of c(x), plus eps.
    The derivative at x, transposed, takes a gradient g to

        turned(g) / s(x) - u * (u . turned(g)) / (d_model * s(x)),    u = c(x) / s(x)
    """

    weight: Float[Tensor, "d_model"]
    """The factor of each coordinate, an offset of 1 (Gemma) included."""
    bias: Float[Tensor, "d_model"]
    """What is added, whatever the input; zero in an RMSNorm."""
    centred: bool
    """True for a LayerNorm."""
    eps: float

    def part(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """weight * c(x): what becomes of a part of the input, up to the scale of the whole."""
        return self._centre(x) * self.weight

    def turned(self, gradient: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """c(weight * gradient): the transpose of `part`."""
        return self._centre(gradient * self.weight)

    def direction_and_scale(
        self, x: Float[Tensor, "*rows d_model"]
    ) -> tuple[Float[Tensor, "*rows d_model"], Float[Tensor, "*rows 1"]]:
        """c(x) / s(x) and s(x)."""
        x = self._centre(x.to(self.weight.dtype))
        scale = (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return x / scale, scale

    def frozen(self, x: Float[Tensor, "*rows d_model"]) -> "FrozenNorm":
        """The norm with its scale held at what it is for x, which makes it linear up to the bias."""
        return FrozenNorm(self, self.direction_and_scale(x)[1])

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """What a norm does to parts of its input, without its bias, at the scale of the whole."""

    norm: Norm
    scale: Float[Tensor, "*rows 1"]

    def __call__(self, part: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        return self.norm.part(part) / self.scale

    def transposed(self, direction: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """The direction before the norm that reads what `direction` reads after it."""
        return self.norm.turned(direction) / self.scale


@torch.no_grad()
def norm_of(module: nn.Module, model: Model) -> Norm:
    """The `Norm` that a module computes, found by running it: classes and conventions differ between models.

    ValueError for a module that computes something else.
    """
    parameter = next(module.parameters(), next(model.parameters()))  # a folded norm has none of its own
    d_model, eps = model.cfg.d_model, model.cfg.eps
    signs = torch.where(torch.arange(d_model) % 2 == 0, 1.0, -1.0)
    probes = torch.stack([signs, -signs, signs + 1, 1e-2 * signs, torch.linspace(-2, 3, d_model)]).to(parameter)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    outputs = module(probes[None])[0].to(dtype)
    probes, bias = probes.to(dtype), (outputs[0] + outputs[1]) / 2
    weight = (outputs[0] - bias) * probes[0] * (1 + eps) ** 0.5
    tolerance = 1e-3 if parameter.dtype == dtype else 3e-2
    found = Norm(weight, bias, torch.allclose(outputs[2], outputs[0], rtol=tolerance, atol=tolerance), eps)
    expected = found.direction_and_scale(probes)[0] * weight + bias
    if not torch.allclose(expected, outputs, rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"expected a LayerNorm or an RMSNorm with eps {eps}, got a {type(module).__name__} that computes something "
            f"else: what becomes of parts of its input cannot be told; use attribution_patching or activation_patching."
        )
    return found


def post_norm(model: Model, layer: int, part: str) -> nn.Module | None:
    """The norm that the output of the layer's attention (`"H"`, `"ATTN"`) or MLP passes, as in Gemma 2, if any."""
    return getattr(model.blocks[layer], "ln1_post" if part in ("H", "ATTN") else "ln2_post", None)
