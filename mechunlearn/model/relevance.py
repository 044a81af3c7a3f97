"""Gradients by the rules of layer-wise relevance propagation (LRP), for forward passes with unchanged values."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechunlearn.model.classes import Model, is_bridge, unchecked_shape
from mechunlearn.model.hooks import Hook
from mechunlearn.model.norms import Norm, norm_of


@contextmanager
def relevance_rules(model: Model) -> Iterator[list[Hook]]:
    """Inside, forward passes with the yielded hooks have the model's values, and backward passes follow LRP's rules.

    | rule | what counts as a constant in the backward pass |
    |---|---|
    | LN | the scale that a norm (also a post-norm, a QK norm, the final norm) divides by |
    | AH | the attention pattern |
    | identity | activation(x) / x |
    | half | in a gated MLP, one factor and then the other: each gets half of the gradient |

    Add these hooks after `recording`: they have to be the last ones at their hook points. At `hook_post`, where the
    identity and half rules give the activations another gradient, a hook of this context acts before any recording:
    what is recorded there is what W_out reads. A soft cap of the logits keeps its own gradient.
    """
    layers = range(len(model.blocks))
    hooks: list[Hook] = [(f"blocks.{layer}.attn.hook_pattern", _detached) for layer in layers]
    activations: list[Hook] = []
    for layer in layers:
        kept, followed = _activation_hooks(f"blocks.{layer}.mlp.", gated=unchecked_shape(model).gated)
        hooks += kept
        activations.append(followed)
    with ExitStack() as stack:
        stack.enter_context(model.hooks(fwd_hooks=activations))
        # Norms of queries and keys need no rule: the fixed pattern cuts their gradient.
        scales = [name for name in model.hook_dict if name.endswith(".hook_scale") and ".attn." not in name]
        for name in scales:
            norm: Any = model.get_submodule(name.removesuffix(".hook_scale"))
            if is_bridge(model) and (norm.use_native_layernorm_autograd or norm.config.layer_norm_folding):
                # A Hugging Face module computes the norm without the hook points: its output is given another gradient.
                inner = norm.original_component
                stack.callback(inner.register_forward_hook(partial(_fixed_scale, norm_of(inner, model))).remove)
            else:
                hooks.append((name, _detached))
        yield hooks


def _detached(value: Tensor, hook: object) -> Tensor:
    return value.detach()


def _activation_hooks(prefix: str, *, gated: bool) -> tuple[list[Hook], Hook]:
    """Hooks for the identity rule, or in a gated MLP the half rule: the factors', and the one of their product."""
    factors: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: object, *, name: str) -> None:
        factors[name] = value

    def follow(value: Tensor, hook: object) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        # The output as each factor times a constant: the mean is the half rule, for one factor the identity rule.
        parts = [_proportional(value, factor) for factor in factors.values()]
        factors.clear()
        return _with_gradient_of(value, sum(parts[1:], parts[0]) / len(parts))

    names = ["hook_pre", "hook_pre_linear"] if gated else ["hook_pre"]
    return [(prefix + name, partial(keep, name=name)) for name in names], (prefix + "hook_post", follow)


def _proportional(
    product: Float[Tensor, "batch pos d_mlp"], factor: Float[Tensor, "batch pos d_mlp"]
) -> Float[Tensor, "batch pos d_mlp"]:
    """The product, as the factor times a constant; where the factor is 0, by its limit, the ordinary derivative."""
    zero = factor.detach() == 0
    quotient = (product.detach() / factor.detach().masked_fill(zero, 1)).masked_fill(zero, 0)
    return factor * quotient + product * zero


def _with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """The exact value, differentiated as `other`."""
    return value.detach() + (other - other.detach())


def _fixed_scale(norm: Norm, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """The norm's output, differentiated as if the scale that it divides by were a constant."""
    if not torch.is_grad_enabled():
        return None
    value = inputs[0].to(norm.weight.dtype)
    linear = norm.frozen(value.detach())(value)
    return _with_gradient_of(output, linear.to(output.dtype))
