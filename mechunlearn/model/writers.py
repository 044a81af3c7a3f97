"""What components add to the residual stream, and the last steps from there to the logits."""

from collections.abc import Iterable

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.components import Component
from mechunlearn.model.classes import Model
from mechunlearn.model.decomposition import scales_of
from mechunlearn.model.hooks import SITES
from mechunlearn.model.matrices import check_plain, slots
from mechunlearn.model.norms import FrozenNorm, norm_of, post_norm
from mechunlearn.model.suffix import Run


def writing_sites(components: Iterable[Component]) -> list[str]:
    """The hook points that `written_along` reads; ValueError for a component that writes nothing itself."""
    sites = {}
    for component in components:
        if component.matrix in ("W_Q", "W_K", "W_V", "W_in", "W_gate"):
            raise ValueError(
                f"expected components that write to the residual stream, got {component}: use the head or MLP that "
                f"it belongs to, or its W_O or W_out."
            )
        sites[f"blocks.{component.layer}.{SITES[component.part]}"] = None
    return list(sites)


def check_written(model: Model, components: Iterable[Component]) -> None:
    """ValueError unless what these components write, and the logits, are what weights say: see the two checks."""
    scales_of(model)
    parts = {component.part for component in components}
    check_plain(model, [matrix for part, matrix in (("H", "W_O"), ("N", "W_out")) if part in parts])


def written_along(
    model: Model,
    run: Run,
    component: Component,
    places: Int[Tensor, "batch"],
    direction: Float[Tensor, "batch d_model"],
) -> Float[Tensor, "batch unit"]:
    """Dot products of `direction` with what components of this kind and layer add to the residual stream at `places`.

    An attention layer or an MLP gives one column (its output bias included); a head or a neuron gives a column for
    every one of its layer (without the output bias, which belongs to none). The scale of a post-norm is the run's.
    """
    if component.part in ("ATTN", "MLP"):
        added = _at(run, component, places).to(direction.dtype) * scales_of(model).written
        return (added * direction).sum(-1, keepdim=True)
    inner, weight, norm = _factors(model, run, component, places, direction.dtype)
    before = direction if norm is None else norm.transposed(direction[:, None])[:, 0]
    read = einsum(weight, before, "unit width model, batch model -> batch unit width")
    return (inner * read).sum(-1) * _scale(model, component)


def written(
    model: Model, run: Run, component: Component, places: Int[Tensor, "batch"]
) -> Float[Tensor, "batch d_model"]:
    """What one component adds to the residual stream at `places`, as in `written_along`."""
    if component.part in ("ATTN", "MLP"):
        return _at(run, component, places) * scales_of(model).written
    dtype = torch.promote_types(run.residuals[0].dtype, torch.float32)
    inner, weight, norm = _factors(model, run, component, places, dtype)
    assert component.index is not None  # checked on construction
    output = inner[:, component.index] @ weight[component.index] * _scale(model, component)
    return output if norm is None else norm(output[:, None])[:, 0]


def _factors(
    model: Model, run: Run, component: Component, places: Int[Tensor, "batch"], dtype: torch.dtype
) -> tuple[Float[Tensor, "batch unit width"], Float[Tensor, "unit width d_model"], FrozenNorm | None]:
    """Activations and weights whose product is what the layer's heads or neurons give, and the post-norm after it."""
    inner = _at(run, component, places).to(dtype)
    inner = inner if component.part == "H" else inner[..., None]
    weight = slots(model)[component.layer, "W_O" if component.part == "H" else "W_out"].weight.to(dtype)
    norm = post_norm(model, component.layer, component.part)
    if norm is None:
        return inner, weight, None
    whole = einsum(inner, weight, "batch unit width, unit width model -> batch model")
    return inner, weight, norm_of(norm, model).frozen(whole[:, None])


def _scale(model: Model, component: Component) -> float:
    scales = scales_of(model)
    return scales.heads if component.part == "H" else scales.neurons


def _at(run: Run, component: Component, places: Int[Tensor, "batch"]) -> Tensor:
    name = f"blocks.{component.layer}.{SITES[component.part]}"
    return run.values[name][torch.arange(len(places), device=places.device), places]


def final_norm(model: Model, run: Run, places: Int[Tensor, "batch"]) -> FrozenNorm:
    """The norm before the unembedding, with its scale at `places` (of shape [batch, 1, 1])."""
    rows = torch.arange(len(places), device=places.device)
    norm = norm_of(model.ln_final, model)
    return norm.frozen(run.residuals[-1][rows, places][:, None])


def unembedding(model: Model) -> Float[Tensor, "d_model d_vocab"]:
    """The matrix from the normalized residual stream to logits, before a soft-cap and without a bias."""
    return _scaled(model, model.unembed.W_U.detach())


def unembedding_bias(model: Model) -> Float[Tensor, "d_vocab"]:
    """The bias of the logits; zero in most models."""
    zeros = torch.zeros_like(unembedding(model)[0])
    bias = getattr(model.unembed, "b_U", None)
    return zeros if bias is None else zeros + _scaled(model, bias.detach())


def _scaled(model: Model, values: Tensor) -> Tensor:
    scale = scales_of(model).logits
    return values if scale == 1 else values * scale
