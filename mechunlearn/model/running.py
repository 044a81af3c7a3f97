"""Forward passes: logits at chosen positions, parts of a pass, and passes with changed activations."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mechunlearn.model.classes import Model, device_of
from mechunlearn.model.hooks import Hook, recording

_in_tuples: WeakSet[nn.Module] = WeakSet()
"""Blocks whose output is the first of a tuple, as the loop around them expects (GPT-J, Falcon, MPT)."""


def logits_at(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    positions: Int[Tensor, "batch place"] | None = None,
    *,
    hooks: Sequence[Hook] = (),
) -> Float[Tensor, "batch place d_vocab"]:
    """Logits at `positions` of each row (default: everywhere); those of other positions are never computed.

    `hooks` are TransformerLens forward hooks for this pass. Padding may be left or right. ValueError for rows that are
    longer than the model's context: rotary models would give numbers for them without a word.
    """
    check_length(model, tokens.shape[1], "rows (with padding)")
    cut = nullcontext() if positions is None else only_at(model.unembed, positions)
    with cut, model.hooks(fwd_hooks=list(hooks)) if hooks else nullcontext():
        return model(tokens, attention_mask=mask.long(), return_type="logits")


def check_length(model: Model, length: int, what: str) -> None:
    """ValueError if `what` has more tokens than the model's context."""
    if length > model.cfg.n_ctx:
        raise ValueError(
            f"expected {what} of at most {model.cfg.n_ctx} tokens, the model's context (cfg.n_ctx), got {length}: "
            f"shorten them; if the model was trained on longer ones, load it with that context."
        )


def residual_before(
    model: Model, layer: int, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream that enters `layer`, as hooks that are set leave it; later layers are not run."""
    name = f"blocks.{layer}.hook_resid_pre"
    later = list(model.blocks)[layer + 1 :]
    last = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
    with recording(model, [name]) as recorded, replaced_forwards(idle(later)), torch.no_grad():
        logits_at(model, tokens, mask, last)
    return recorded[name].detach()


def embeddings(
    model: Model, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    """The token embeddings, without positions; no layer is run."""
    last = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
    with recording(model, ["hook_embed"]) as recorded, replaced_forwards(idle(model.blocks)), torch.no_grad():
        logits_at(model, tokens, mask, last)
    return recorded["hook_embed"]


def residual_after(
    model: Model, layer: int, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream that leaves `layer`, with its graph; later layers and the unembedding are not run."""
    final: list[Tensor] = []
    later = [*list(model.blocks)[layer + 1 :], model.ln_final, model.unembed]
    last = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
    keeping = model.ln_final.register_forward_pre_hook(lambda module, inputs: final.append(inputs[0]))
    with keeping, replaced_forwards(idle(later)):
        logits_at(model, tokens, mask, last)
    return final[0]


def unembedded(model: Model, residual: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_vocab"]:
    """The logits of residuals that enter the final norm, whatever positions they come from."""
    tokens = torch.zeros(len(residual), 1, dtype=torch.long, device=residual.device)
    with running_from(model, len(model.blocks), residual[:, None]):
        return logits_at(model, tokens, torch.ones_like(tokens, dtype=torch.bool))[:, 0]


@contextmanager
def running_from(model: Model, layer: int, residual: Float[Tensor, "batch pos d_model"]) -> Iterator[None]:
    """Inside, a forward pass starts at `layer` (`n_layers`: the final norm) with `residual` as its input.

    Earlier layers do not run. Tokens of the same shape still have to be passed: they give positions and mask.
    """
    blocks = list(model.blocks)

    def enter(*arguments: Any, **options: Any) -> Tensor:
        return residual

    if layer == len(blocks):
        entering = partial(_in_a_tuple, enter) if blocks[-1] in _in_tuples else enter
        with replaced_forwards(idle(blocks) | {blocks[-1]: entering}):
            yield
    else:
        # By a hook, which overrides hooks that were set there before: `residual` has their changes already.
        with replaced_forwards(idle(blocks[:layer])):
            with model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", enter)]):
                yield


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, modules have another forward. (A bridge's `start_at_layer` would still run the layers below.)"""
    own = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def idle(modules: Iterable[nn.Module]) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards with which the modules give their input, in the form of their outputs."""
    in_a_tuple = partial(_in_a_tuple, _identity)
    return {module: in_a_tuple if module in _in_tuples else _identity for module in modules}


def _identity(value: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return value


def _in_a_tuple(forward: Callable[..., Tensor], *arguments: Any, **options: Any) -> tuple[Tensor, None]:
    return forward(*arguments, **options), None


@contextmanager
def remembering_tuples(model: Model) -> Iterator[None]:
    """Inside, a forward pass of the model tells `idle` which of its blocks give tuples."""

    def remember(block: nn.Module, inputs: object, output: Any) -> None:
        if isinstance(output, tuple):
            _in_tuples.add(block)

    with ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.register_forward_hook(remember).remove)
        yield


def only_at(unembedding: nn.Module, positions: Int[Tensor, "batch place"]) -> RemovableHandle:
    """Inside this context, the module is given the residual stream at `positions` of each row alone."""
    rows = torch.arange(len(positions), device=positions.device)[:, None]

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        device = arguments[0].device
        return (arguments[0][rows.to(device), positions.to(device)], *arguments[1:])

    return unembedding.register_forward_pre_hook(keep)


@torch.no_grad()
def mean_activations(
    model: Model, text: Int[Tensor, "row pos"], names: Sequence[str], *, batch_size: int = 64
) -> dict[str, Float[Tensor, "*unit"]]:
    """Hook point -> mean over all tokens of `text` (rows without padding). Cost: 1F of the text."""
    sums: dict[str, Tensor] = {}
    for rows in text.to(device_of(model)).split(operator.index(batch_size)):
        last = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        with recording(model, names) as values:
            logits_at(model, rows, torch.ones_like(rows, dtype=torch.bool), last)
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.float().sum((0, 1))
    return {name: total / text.numel() for name, total in sums.items()}


def constant(values: Iterable[tuple[str, Float[Tensor, "*unit"]]]) -> list[Hook]:
    """Hooks that put one value at every token of every prompt, for pairs of hook point and value."""

    def put(own: Tensor, hook: object, *, value: Tensor) -> Tensor:
        return value.to(own).expand_as(own)

    return [(name, partial(put, value=value)) for name, value in values]


@contextmanager
def without_directions(model: Model, directions: Float[Tensor, "place d_model"]) -> Iterator[None]:
    """Inside, a unit vector is projected out of the residual stream at each place: x - (x . d) d, at every token.

    Place l is the input of layer l, and the last place is the output of the last layer. A row of zeros changes nothing.
    """
    last = len(directions) - 1
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(last)] + [f"blocks.{last - 1}.hook_resid_post"]
    rows = zip(names, directions, strict=True)
    with _changed_values(model, {name: partial(project_out, row) for name, row in rows if bool(row.any())}):
        yield


@contextmanager
def with_input_vectors(model: Model, vectors: Float[Tensor, "vector d_model"], start: int) -> Iterator[None]:
    """Inside, the embeddings at the places from `start` on are these vectors, in every row; gradients reach them.

    They stand for token embeddings, before learned positions and after Gemma's scale.
    """

    def put_in(value: Tensor) -> Tensor:
        value = value.clone()  # changes in place are lost on a bridge
        value[:, start : start + len(vectors)] = vectors.to(value)
        return value

    with _changed_values(model, {"hook_embed": put_in}):
        yield


def project_out(direction: Float[Tensor, "d_model"], value: Float[Tensor, "*any d_model"]) -> Tensor:
    """The value without its part along a unit vector; the value itself for the zero vector."""
    along = direction.to(value)
    return value - (value @ along)[..., None] * along


@contextmanager
def _changed_values(model: Model, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, the value at each hook point is what its function makes of it; RuntimeError if one did not fire."""
    fired = set()

    def apply(value: Tensor, hook: object, *, name: str) -> Tensor:
        fired.add(name)
        return changes[name](value)

    with model.hooks(fwd_hooks=[(name, partial(apply, name=name)) for name in changes]):
        yield
    missing = sorted(changes.keys() - fired)
    if missing:
        raise RuntimeError(f"expected every hook to fire, but {', '.join(missing[:5])} did not: was the model run?")
