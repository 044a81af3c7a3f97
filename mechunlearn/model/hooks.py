"""Activations: the hook point of a component's output, how to record it, and a layer's attention run again alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mechunlearn.components import Component, ModelShape
from mechunlearn.model.classes import Model

Hook: TypeAlias = tuple[str, Callable[..., Tensor | None]]
"""A TransformerLens forward hook: the hook point's name and `(value, hook) -> new value or None`."""


SITES = {"H": "attn.hook_z", "ATTN": "hook_attn_out", "MLP": "hook_mlp_out", "N": "mlp.hook_post"}
"""Part -> the hook point in a layer of what it writes."""


def site(component: Component, shape: ModelShape) -> str:
    """The hook point whose value is the component's output.

    A head and its `W_O` share `hook_z`: patching z patches exactly what the head adds to its attention layer's output.
    An MLP and its `W_out` share `hook_mlp_out` (after the post-norm in Gemma 2).
    """
    shape.units_of(component)
    inside = {"W_Q": "attn.hook_q", "W_K": "attn.hook_k", "W_V": "attn.hook_v", "W_gate": "mlp.hook_pre"}
    inside["W_in"] = "mlp.hook_pre_linear" if shape.gated else "mlp.hook_pre"
    return f"blocks.{component.layer}.{inside.get(component.matrix or '', SITES[component.part])}"


def layer_of(name: str) -> int:
    """The layer that a hook point such as `blocks.3.attn.hook_z` belongs to."""
    return int(name.split(".")[1])


@contextmanager
def recording(model: Model, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, forward passes put the value at each named hook point into the yielded dict.

    The recorded tensor is the one that the rest of the network reads, so gradients with respect to it
    are right on both classes (on a bridge, `hook_z` hands out a view that autograd would not see).
    RuntimeError on leaving if a hook did not fire.
    """
    wanted = list(dict.fromkeys(names))
    recorded: dict[str, Tensor] = {}

    def record(value: Tensor, hook: object, *, name: str) -> Tensor:
        recorded[name] = value.clone() if value.requires_grad else value
        return recorded[name]

    with model.hooks(fwd_hooks=[(name, partial(record, name=name)) for name in wanted]):
        yield recorded
    missing = [name for name in wanted if name not in recorded]
    if missing:
        raise RuntimeError(
            f"expected every hook to fire, but {', '.join(missing[:5])} did not: this model class or "
            f"architecture has no such activation; use other components."
        )


_OWN = ("transformer_lens.", "transformers.")
"""Whose hooks change nothing: transformers leaves some behind that record hidden states when asked to."""


def is_hooked(model: Model) -> bool:
    """Whether a forward hook is set, at a hook point or a module, that TransformerLens or transformers did not set."""
    from transformer_lens.hook_points import HookPoint

    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            # What a user sets at a hook point is wrapped in a function of TransformerLens.
            if isinstance(module, HookPoint) or not getattr(hook, "__module__", "").startswith(_OWN):
                return True
    return False


_CACHES = ("past_key_values", "past_key_value", "layer_past", "past_kv_cache_entry")


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments with which a layer's attention was called: its input, mask and positions."""

    layer: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@contextmanager
def attention_calls(model: Model, layers: Iterable[int]) -> Iterator[dict[int, AttentionCall]]:
    """Inside, forward passes put the arguments of the attention of `layers` into the yielded dict."""
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
    with model.hooks(fwd_hooks=list(hooks)), recording(model, names) as values:
        model.blocks[call.layer].attn(*call.arguments, **call.options)
    return values
