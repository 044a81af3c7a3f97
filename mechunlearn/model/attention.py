"""Attention by itself: called again, on the input that it had in a run, with something changed inside it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mechunlearn.model.hooks import Hook, recording
from mechunlearn.model.kinds import Model

_CACHES = ("past_key_values", "past_key_value", "layer_past", "past_kv_cache_entry")


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What a layer's attention was given: its input, mask and positions."""

    layer: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@contextmanager
def attention_calls(model: Model, layers: Iterable[int]) -> Iterator[dict[int, AttentionCall]]:
    """Inside, forward passes put how they call the attention of `layers` into the yielded dict."""
    calls: dict[int, AttentionCall] = {}

    def keep(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], *, layer: int) -> None:
        # With a cache of keys, a second call would attend to the first call's keys as well.
        options = {name: None if name in _CACHES else value for name, value in options.items()}
        calls[layer] = AttentionCall(layer, arguments, options)

    with ExitStack() as stack:
        for layer in layers:
            attention = model.blocks[layer].attn
            handle = attention.register_forward_pre_hook(partial(keep, layer=layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


@torch.no_grad()
def attended_again(model: Model, call: AttentionCall, hooks: Sequence[Hook], names: Sequence[str]) -> dict[str, Tensor]:
    """The values at `names` when one layer's attention alone runs again, with `hooks` inside it."""
    with model.hooks(fwd_hooks=list(hooks)), recording(model, names) as found:
        model.blocks[call.layer].attn(*call.arguments, **call.options)
    return found
