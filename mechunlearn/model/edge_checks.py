"""Which edges a model has, and whether it is the sum of its parts that edges take it for."""

from collections.abc import Iterable
from weakref import WeakSet

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from mechunlearn.components.component import ModelShape
from mechunlearn.components.edge import Edge, edge_mask, mask_of
from mechunlearn.components.edge_mask import EdgeMask
from mechunlearn.model.checks import check_unforked
from mechunlearn.model.kinds import Model, architecture, device_of, shape
from mechunlearn.model.norms import norm_of
from mechunlearn.model.preserve import preserved
from mechunlearn.model.readers import READ, Reading, reading
from mechunlearn.model.residual_sources import Written, contributions, writing
from mechunlearn.model.run import logits_at
from mechunlearn.model.slots import slots

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
    model: Model, first: tuple[Written, Reading], second: tuple[Written, Reading]
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


def _short_run(model: Model, start: int) -> tuple[Written, Reading]:
    tokens = torch.arange(start, start + 6, device=device_of(model))[None]
    with writing(model) as written, reading(model) as read:
        logits_at(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    return written(), read[0]
