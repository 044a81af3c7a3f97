"""Whether the residual stream is the sum of what components write, up to one scale, and logits a linear map of it."""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechunlearn.model.classes import HALF, Model, architecture, device_of
from mechunlearn.model.guard import preserved
from mechunlearn.model.matrices import cast_weights
from mechunlearn.model.norms import post_norm
from mechunlearn.model.running import computed_in, is_castable, linear_in_chunks
from mechunlearn.model.suffix import base_run

_scales: WeakKeyDictionary[nn.Module, "Scales"] = WeakKeyDictionary()
"""Of models whose residual stream has been found to be the scaled sum of what is written."""


@dataclass(frozen=True)
class Scales:
    """By what a model multiplies on the way from what components write to its logits; 1 in most."""

    written: float
    """Of the values at `hook_attn_out` and `hook_mlp_out`, when they are added to the residual stream."""
    heads: float
    """Of z @ W_O, after a post-norm. TransformerLens may have scaled it already at `hook_attn_out`."""
    neurons: float
    """Of hook_post @ W_out, after a post-norm."""
    logits: float
    """Of what the unembedding gives, before a soft cap."""


def scales_of(model: Model) -> Scales:
    """The model's scales (Granite multiplies what is written, Granite and Cohere the logits), from one short run.

    ValueError, the first time, unless embedding plus all scaled writes is the final residual stream, and the scaled
    unembedding of the final norm gives the logits up to a soft cap: nothing can then be said of parts of the stream.
    """
    if model not in _scales:
        _scales[model] = _measured(model)
    return _scales[model]


@torch.no_grad()
def _measured(model: Model) -> Scales:
    tokens = torch.arange(1, 7, device=device_of(model))[None]
    layers = range(len(model.blocks))
    names = [f"blocks.{layer}.{part}" for layer in layers for part in ("hook_attn_out", "hook_mlp_out")]
    mlps: list[Tensor] = []
    try:
        precise = computed_in(model, torch.float32 if is_castable(model) else None)
        with preserved(model), precise, ExitStack() as stack:
            for block in model.blocks:
                stack.enter_context(block.mlp.register_forward_hook(lambda m, i, output: mlps.append(output)))
            run = base_run(model, tokens, torch.ones_like(tokens, dtype=torch.bool), _everywhere(tokens), names=names)
            with cast_weights(model.ln_final):
                normed = model.ln_final(run.residuals[-1])
            linear = linear_in_chunks(normed, model.unembed.W_U.T, getattr(model.unembed, "b_U", None))
            given = _after_post_norms(model, run.attention, "ATTN"), _after_post_norms(model, mlps, "MLP")
    except (AttributeError, RuntimeError) as error:
        raise _not_a_sum(model, f"its parts cannot be read ({str(error)[:200]})") from error
    linear = linear.double().cpu()
    tolerance = 5e-2 if run.residuals[0].dtype in HALF else 1e-3
    stream = torch.stack([residual.double().cpu() for residual in run.residuals])
    hooked = [run.values[name].double().cpu() for name in names]
    attention, mlp = torch.stack(hooked[::2]), torch.stack(hooked[1::2])
    writes, changes = attention + mlp, stream.diff(dim=0)
    written = _factor(writes, changes)
    if bool(((changes - written * writes).abs().amax((1, 2, 3)) > tolerance * stream.abs().amax()).any()):
        raise _not_a_sum(model, "embedding and writes do not add up to it, whatever one scale they have")
    inside = []
    for values, added in zip(given, (attention, mlp), strict=True):
        inside.append(_factor(values, added))
        if not torch.allclose(inside[-1] * values, added, atol=tolerance * float(added.abs().max())):
            raise _not_a_sum(model, "what its attention or MLP gives is changed before it is written")
    logits = _logit_scale(model, linear, run.logits.double().cpu(), tolerance)
    return Scales(written, written * inside[0], written * inside[1], logits)


def _after_post_norms(model: Model, outputs: Sequence[Tensor], part: str) -> Float[Tensor, "layer batch pos d_model"]:
    norms = [post_norm(model, layer, part) for layer in range(len(outputs))]
    added = []
    for output, norm in zip(outputs, norms, strict=True):
        with nullcontext() if norm is None else cast_weights(norm):
            added.append((output if norm is None else norm(output)).double().cpu())
    return torch.stack(added)


def _logit_scale(model: Model, linear: Tensor, logits: Tensor, tolerance: float) -> float:
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or -1.0
    before = cap * (logits / cap).clamp(-0.999999, 0.999999).atanh() if cap > 0 else logits
    scale = _factor(linear, before)
    expected = cap * (scale * linear / cap).tanh() if cap > 0 else scale * linear
    if not torch.allclose(expected, logits, atol=tolerance * float(logits.abs().max())):
        raise _not_a_sum(model, "its logits are not the unembedding of the final norm, whatever their scale")
    return scale


def _factor(values: Tensor, multiples: Tensor) -> float:
    """The least-squares factor between two tensors; 1 where it is that to rounding."""
    factor = float((values * multiples).sum() / (values * values).sum())
    return 1.0 if abs(factor - 1) < 1e-2 else factor


def _everywhere(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def _not_a_sum(model: Model, reason: str) -> ValueError:
    return ValueError(
        f"expected a model whose residual stream is the sum of what its parts write, got "
        f"{architecture(model) or type(model).__name__}: {reason}. Use a method that replaces activations by hooks: "
        f"set_patching or attribution_patching."
    )
