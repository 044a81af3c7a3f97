"""MLPs as a memory of keys and values: reading both at a token, and adding to the value that an MLP gives."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechunlearn.model.classes import Model
from mechunlearn.model.decomposition import scales_of
from mechunlearn.model.hooks import recording
from mechunlearn.model.norms import norm_of, post_norm
from mechunlearn.model.running import residual_after


@dataclass(frozen=True, eq=False)
class MLPValues:
    """Keys and values of some MLPs at one token of each row."""

    keys: dict[int, Float[Tensor, "batch d_mlp"]]
    """Layer -> what W_out reads, after the nonlinearity (and the gate)."""
    outputs: dict[int, Float[Tensor, "batch d_model"]]
    """Layer -> key @ W_out, with its bias, before a post-norm."""
    residual: Float[Tensor, "batch d_model"]
    """The residual stream that leaves the highest of the layers."""


@torch.no_grad()
def mlp_values(
    model: Model,
    layers: Iterable[int],
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    places: Int[Tensor, "batch"],
) -> MLPValues:
    """Keys and outputs of the MLPs of `layers` at token `places[i]` of row i. Cost: 1F up to the highest of them."""
    layers = sorted(layers)
    rows = torch.arange(len(tokens), device=tokens.device)
    outputs: dict[int, Tensor] = {}
    names = {layer: f"blocks.{layer}.mlp.hook_post" for layer in layers}

    def keep(module: nn.Module, inputs: object, output: Tensor, *, layer: int) -> None:
        outputs[layer] = output

    with ExitStack() as stack:
        for layer in layers:
            handle = model.blocks[layer].mlp.register_forward_hook(partial(keep, layer=layer))
            stack.callback(handle.remove)
        recorded = stack.enter_context(recording(model, names.values()))
        residual = residual_after(model, layers[-1], tokens, mask)
    return MLPValues(
        {layer: recorded[name][rows, places] for layer, name in names.items()},
        {layer: output[rows, places] for layer, output in outputs.items()},
        residual[rows, places],
    )


@torch.no_grad()
def key_moments(
    model: Model, layers: Iterable[int], tokens: Int[Tensor, "row pos"], mask: Bool[Tensor, "row pos"]
) -> dict[int, tuple[Float[Tensor, "d_mlp d_mlp"], Float[Tensor, ""]]]:
    """Layer -> the sums over all real tokens of key key^T and of |key|^4."""
    layers = sorted(layers)
    names = {layer: f"blocks.{layer}.mlp.hook_post" for layer in layers}
    with recording(model, names.values()) as recorded:
        residual_after(model, layers[-1], tokens, mask)
    sums = {}
    for layer, name in names.items():
        keys = recorded[name][mask]
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        sums[layer] = keys.T @ keys, keys.pow(2).sum(1).pow(2).sum()
    return sums


@contextmanager
def adding_to_mlp(
    model: Model, layer: int, places: Int[Tensor, "batch"], value: Float[Tensor, "d_model"]
) -> Iterator[None]:
    """Inside, the MLP of `layer` gives `value` more at token `places[i]` of row i, before a post-norm."""

    def add(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        at = torch.arange(output.shape[1], device=output.device) == places.to(output.device)[:, None]
        return output + at[..., None] * value.to(output)

    with model.blocks[layer].mlp.register_forward_hook(add):
        yield


def before_post_norm(
    model: Model, layer: int, outputs: Float[Tensor, "batch d_model"], moves: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "batch d_model"]:
    """What to add to MLP outputs so that the residual stream moves by `moves`.

    Without a post-norm these are `moves` themselves. With one (Gemma 2), whose scale s is held at its value for
    `outputs`, they are moves * s * w / (w^2 + 0.01 mean(w^2)): the inverse of x -> w * x / s, damped since single
    weights may be near zero.
    """
    moves = moves / scales_of(model).neurons
    module = post_norm(model, layer, "MLP")
    if module is None:
        return moves
    norm = norm_of(module, model)
    scale = norm.frozen(outputs).scale
    damped = norm.weight / (norm.weight.pow(2) + 0.01 * norm.weight.pow(2).mean())
    return (moves.to(scale) * scale * damped).to(moves)
