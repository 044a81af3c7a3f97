"""Where a component's weights are: the real `nn.Parameter`, and its units (heads or neurons) along one axis.

Also whether they are what the module computes: with an adapter, or quantised, they are not.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechunlearn.components import ModelShape
from mechunlearn.components.component import ATTENTION_MATRICES
from mechunlearn.model.classes import HALF, Model, at_least_float32, is_bridge, unchecked_shape

_BRIDGE = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o", "W_in": "in", "W_gate": "gate", "W_out": "out"}
_WRITES = ("W_O", "W_out")


@dataclass(frozen=True, eq=False)
class Slot:
    """One matrix of one layer: the parameter that holds it, and how to see it as heads or neurons."""

    layer: int
    matrix: str
    parameter: nn.Parameter
    units: int
    layout: Literal["rows", "columns", "heads", "heads_transposed"]
    """Where the units are: rows or columns of a matrix, or the first axis of a 3-D tensor."""

    @property
    def weight(self) -> Float[Tensor, "unit width d_model"]:
        """The values as they are now, without a graph: a view of the parameter."""
        return self.view(self.parameter.detach())

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like the parameter, such as its gradient, as [unit, width, d_model]: always a view."""
        if self.layout == "heads":
            return tensor
        if self.layout == "heads_transposed":
            return tensor.transpose(1, 2)
        rows = tensor if self.layout == "rows" else tensor.T
        return rows.unflatten(0, (self.units, rows.shape[0] // self.units))


def slots(model: Model) -> dict[tuple[int, str], Slot]:
    """(layer, matrix) -> slot, for every attention and MLP weight of the model.

    Fused QKV (GPT-2, NeoX) appears as the split `q`, `k`, `v` parameters that the forward pass uses;
    grouped KV heads as the `n_kv_heads` slices that exist.
    """
    shape = unchecked_shape(model)
    make = _bridge_slot if is_bridge(model) else _hooked_slot
    return {(layer, m): make(model, shape, layer, m) for layer in range(shape.n_layers) for m in shape.matrices}


def _bridge_slot(model: Model, shape: ModelShape, layer: int, matrix: str) -> Slot:
    module = projection(model, layer, matrix)
    stored_in_first = type(module).__name__ == "Conv1D"
    layout = "rows" if stored_in_first == (matrix in _WRITES) else "columns"
    return Slot(layer, matrix, module.weight, shape.units(matrix), layout)


def check_plain(model: Model, matrices: Collection[str] | None = None) -> None:
    """ValueError unless these matrices (default: all) are what their modules multiply by, in every layer.

    Every method that multiplies by weights itself goes through this. Modules that are not plain `Linear` or `Conv1D`
    are tried on two rows, at every call: adapters come and go.
    """
    for layer in range(len(model.blocks)):
        for matrix in unchecked_shape(model).matrices if matrices is None else matrices:
            if not is_plain(model, layer, matrix):
                module = projection(model, layer, matrix)
                kind = f"{type(module).__module__}.{type(module).__name__}"
                raise ValueError(
                    f"expected weights that are all that a module computes with, got L{layer} {matrix} of a {kind} (an "
                    f"adapter, or quantised weights): this method multiplies by weights. Merge adapters "
                    f"(`merge_and_unload()`, before the model is wrapped), load in bfloat16 or float32, or use "
                    f"activation_patching, set_patching, path_patching or attribution_patching, which read activations."
                )


def is_plain(model: Model, layer: int, matrix: str) -> bool:
    """Whether the matrix, as `slots` shows it, is all that its module multiplies by."""
    if not is_bridge(model):
        return _hooked_slot(model, unchecked_shape(model), layer, matrix).parameter.is_floating_point()
    module = projection(model, layer, matrix)
    if _is_ordinary(module) and type(module).__name__ in ("Linear", "Conv1D"):
        return True
    try:
        weight = _bridge_slot(model, unchecked_shape(model), layer, matrix).weight.flatten(0, 1)
        weight = weight if matrix in _WRITES else weight.T
        rows = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
        with torch.no_grad():
            given, expected = (module(rows) - module(torch.zeros_like(rows))).float(), (rows @ weight).float()
    except (AttributeError, RuntimeError, TypeError, ValueError):  # what modules of packed weights raise
        return False
    return torch.allclose(given, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def check_split(model: Model) -> None:
    """ValueError if a fused matrix, which a bridge splits once, has an adapter or is quantised: the split loses it."""
    if not is_bridge(model):
        return
    for layer, block in enumerate(model.blocks):
        parts = (block.attn, "qkv"), (getattr(block, "mlp", None), "gate_up")
        for fused in (innermost(getattr(part, name, None)) for part, name in parts):
            if isinstance(fused, nn.Module) and not _is_ordinary(fused):
                raise ValueError(
                    f"expected ordinary weights in the fused matrices of layer {layer}, got a "
                    f"{type(fused).__module__}.{type(fused).__name__}: TransformerLens splits them when it wraps the "
                    f"model, and loses an adapter or reads quantised codes as weights. Merge adapters "
                    f"(`merge_and_unload()`) or load in bfloat16 or float32, and wrap the model again."
                )


def _is_ordinary(module: nn.Module) -> bool:
    """Whether it is a layer of torch or of a transformers model, not one that wraps or packs another's weights."""
    home, weight = type(module).__module__, getattr(module, "weight", None)
    own = home.startswith(("torch.nn.modules", "transformers.models.", "transformers.pytorch_utils"))
    return own and type(weight) is nn.Parameter and weight.is_floating_point()


def projection(model: Model, layer: int, matrix: str) -> Any:
    """The innermost module of a bridge that computes with this matrix."""
    block = model.blocks[layer]
    return innermost(getattr(block.attn if matrix in ATTENTION_MATRICES else block.mlp, _BRIDGE[matrix]))


def attention_change(
    model: Model,
    layer: int,
    before: Float[Tensor, "row pos head_index d_head"],
    change: Float[Tensor, "row pos head_index d_head"],
) -> Float[Tensor, "row pos d_model"]:
    """What the attention gives more when its heads' outputs z = `before` change, before a post-norm.

    In float32 at least: rounding would not be small beside a small change.
    """
    before, change = at_least_float32(before), at_least_float32(change)
    if is_plain(model, layer, "W_O"):
        return torch.einsum("rphw,hwm->rpm", change, at_least_float32(slots(model)[layer, "W_O"].weight))
    output = projection(model, layer, "W_O")
    with cast_weights(output):
        return output((before + change).flatten(2)) - output(before.flatten(2))


@contextmanager
def cast_weights(module: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside, the module reads copies of its half-precision weights in another dtype; its own are not touched."""
    stores: list[Any] = [store for part in module.modules() for store in (part._parameters, part._buffers)]
    # A HookedTransformer's modules cast to the dtype that their configuration names.
    stores += [vars(part)["cfg"].__dict__ for part in module.modules() if "cfg" in vars(part)]
    own = [(store, name, x) for store in stores for name, x in store.items() if getattr(x, "dtype", x) in HALF]
    with ExitStack() as stack:
        for store, name, value in own:
            stack.callback(store.__setitem__, name, value)
            store[name] = value.to(dtype) if isinstance(value, Tensor) else dtype
        yield


def innermost(module: Any) -> Any:
    """The Hugging Face module inside those of a bridge."""
    while getattr(module, "original_component", None) is not None:
        module = module.original_component
    return module


def _hooked_slot(model: Model, shape: ModelShape, layer: int, matrix: str) -> Slot:
    block = model.blocks[layer]
    module = block.attn if matrix in ATTENTION_MATRICES else block.mlp
    parameters = dict(module.named_parameters(recurse=False))
    # Grouped attention keeps its real weights as _W_K and _W_V; W_K is then an expanded copy.
    parameter = parameters["_" + matrix] if "_" + matrix in parameters else parameters[matrix]
    if matrix in ATTENTION_MATRICES:
        layout = "heads" if matrix == "W_O" else "heads_transposed"
    else:
        layout = "rows" if matrix == "W_out" else "columns"
    return Slot(layer, matrix, parameter, shape.units(matrix), layout)
