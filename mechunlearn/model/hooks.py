"""Activations: where a component's output is, and how to record it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

from torch import Tensor

from mechunlearn.components import Component, ModelShape
from mechunlearn.model.kinds import Model

Hook: TypeAlias = tuple[str, Callable[..., Tensor | None]]
"""A TransformerLens forward hook: the hook point's name and `(value, hook) -> new value or None`."""


def site(component: Component, shape: ModelShape) -> str:
    """The hook point whose value is the component's output.

    A head and its `W_O` share `hook_z`: patching z patches exactly what the head adds to its attention
    layer's output. An MLP and its `W_out` share `hook_mlp_out` (after the post-norm in Gemma 2).
    ValueError for a component outside the model.
    """
    shape.units_of(component)
    prefix = f"blocks.{component.layer}."
    if component.part == "H":
        return prefix + {"W_Q": "attn.hook_q", "W_K": "attn.hook_k", "W_V": "attn.hook_v"}.get(
            component.matrix or "", "attn.hook_z"
        )
    if component.part == "N":
        return prefix + "mlp.hook_post"
    if component.part == "ATTN":
        return prefix + "hook_attn_out"
    if component.matrix == "W_in":
        return prefix + ("mlp.hook_pre_linear" if shape.gated else "mlp.hook_pre")
    return prefix + ("mlp.hook_pre" if component.matrix == "W_gate" else "hook_mlp_out")


@contextmanager
def recording(model: Model, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, forward passes put the value at each named hook point into the yielded dict.

    The recorded tensor is the one that the rest of the network reads, so gradients with respect to it
    are right on both classes (on a bridge, `hook_z` hands out a view that autograd would not see).
    Raises RuntimeError on leaving if a hook did not fire.
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
