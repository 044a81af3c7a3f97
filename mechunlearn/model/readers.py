"""What every destination reads from the residual stream."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from mechunlearn.components.component import Component, ModelShape
from mechunlearn.components.edge import Destination
from mechunlearn.model.hooks import recording
from mechunlearn.model.kinds import Model, unchecked_shape

READ = (("W_Q", "q"), ("W_K", "k"), ("W_V", "v"))


@dataclass(frozen=True, eq=False)
class Reading:
    """What the destinations of a run read: tensors that autograd can differentiate a metric by."""

    residuals: tuple[Float[Tensor, "batch pos d_model"], ...]
    """Per layer: what enters the norm before attention."""
    projections: tuple[tuple[Tensor, ...], ...]
    """Per layer: queries, keys and values [batch, pos, head, d_head], before rotary embedding and qk-norm."""
    mlps: tuple[Float[Tensor, "batch pos d_model"], ...]
    """Per layer: the MLP's own copy of the residual stream, before its norm."""
    logits: Float[Tensor, "batch pos d_model"]
    """The final norm's input."""

    def tensors(self) -> list[Tensor]:
        """What to differentiate by."""
        return [*(tensor for layer in self.projections for tensor in layer), *self.mlps, self.logits]


@contextmanager
def reading(model: Model) -> Iterator[list[Reading]]:
    """Inside, a forward pass records what every destination reads; on leaving, the yielded list holds it.

    An MLP and the final norm get a copy of the residual stream of their own, so that the gradient with respect to it
    is that of this one reader.
    """
    layers = range(unchecked_shape(model).n_layers)
    names = {(layer, m): f"blocks.{layer}.attn.hook_{letter}" for layer in layers for m, letter in READ}
    copies: dict[nn.Module, Tensor] = {}
    found: list[Reading] = []

    def hand_in_a_copy(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        copies[module] = arguments[0].clone()
        return (copies[module], *arguments[1:])

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        copies[module] = arguments[0].detach()

    attention_norms = [block.ln1 for block in model.blocks]
    norms = [mlp_norm(model, layer) for layer in layers]
    with ExitStack() as stack:
        for module in (*norms, model.ln_final):
            stack.callback(module.register_forward_pre_hook(hand_in_a_copy).remove)
        for module in attention_norms:
            stack.callback(module.register_forward_pre_hook(keep).remove)
        recorded = stack.enter_context(recording(model, names.values()))
        yield found
    projections = tuple(tuple(recorded[names[layer, m]] for m, _ in READ) for layer in layers)
    residuals, mlps = tuple(copies[norm] for norm in attention_norms), tuple(copies[norm] for norm in norms)
    found.append(Reading(residuals, projections, mlps, copies[model.ln_final]))


def mlp_norm(model: Model, layer: int) -> nn.Module:
    """The norm in front of a layer's MLP; ValueError if the MLP shares the attention's."""
    module = dict(model.blocks[layer].named_children()).get("ln2")
    if module is None:
        raise ValueError(
            f"expected a norm in front of every MLP, got a block {layer} without ln2: what its MLP reads cannot be "
            f"told from what its attention reads; use a method for components."
        )
    return module


def head_readers(layer: int, shape: ModelShape) -> list[Destination]:
    """The destinations in a layer's attention, in the order of `InputGradients.at_heads`."""
    found: list[Destination] = []
    for matrix, _ in READ:
        group = shape.n_heads // shape.units(matrix)
        found += [Component(layer, "H", head, matrix) for head in range(0, shape.n_heads, group)]
    return found
