"""Where a component's weights are: the real `nn.Parameter`, and its units (heads or neurons) along one axis."""

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from mechunlearn.components import ModelShape
from mechunlearn.components.component import ATTENTION_MATRICES
from mechunlearn.model.classes import Model, is_bridge, unchecked_shape

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
    block = model.blocks[layer]
    module = innermost(getattr(block.attn if matrix in ATTENTION_MATRICES else block.mlp, _BRIDGE[matrix]))
    stored_in_first = type(module).__name__ == "Conv1D"
    layout = "rows" if stored_in_first == (matrix in _WRITES) else "columns"
    return Slot(layer, matrix, module.weight, shape.units(matrix), layout)


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
