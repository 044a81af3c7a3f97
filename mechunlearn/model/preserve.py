"""Leave a model as it was found."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mechunlearn.model.kinds import Model, is_bridge


@contextmanager
def preserved(model: Model) -> Iterator[None]:
    """Inside: eval mode, nothing requires a gradient, no gradients stored. After: all as before.

    Also after an exception or an interrupt. Values of weights are not touched.
    """
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in _modules(model)]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


@contextmanager
def differentiable(model: Model) -> Iterator[None]:
    """`preserved`, with gradients recorded even where a notebook has turned them off.

    ValueError inside `torch.inference_mode`, whose tensors can never have one.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("expected to be able to compute gradients, got torch.inference_mode: leave it for this call.")
    with preserved(model), torch.enable_grad():
        yield


def _modules(model: Model) -> list[nn.Module]:
    """Also those of the Hugging Face model that a bridge does not register, such as GPT-2's dropout of embeddings."""
    inner = model.original_model.modules() if is_bridge(model) else ()
    return list(dict.fromkeys([*model.modules(), *inner]))
