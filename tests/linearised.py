"""A model whose logits depend linearly on what its last attention layer adds to the residual stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mechunlearn.metrics import logit_difference
from mechunlearn.model.classes import architecture

SCALE = 20.0


@contextmanager
def linear_after_last_attention(model: Any) -> Iterator[Any]:
    """Inside, the last MLP adds nothing and the norms behind the last attention divide by a constant.

    Yields a metric that is linear too.
    """
    norms = ["blocks.2.ln1_post.hook_scale", "ln_final.hook_scale"]
    hooks = [(name, lambda value, hook: torch.full_like(value, SCALE)) for name in norms if name in model.hook_dict]
    with model.hooks(fwd_hooks=[*hooks, ("blocks.2.hook_mlp_out", lambda value, hook: torch.zeros_like(value))]):
        yield linear_metric(model)


def linear_metric(model: Any) -> Any:
    """The logit difference, before Gemma 2's soft cap of the logits."""
    return _uncapped if architecture(model) == "Gemma2ForCausalLM" else logit_difference


def _uncapped(logits: Any, prompts: Any) -> Any:
    return logit_difference(30.0 * (logits / 30.0).atanh(), prompts)
