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
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from mechunlearn.model.classes import HALF, Model, at_least_float32, device_of, is_bridge
from mechunlearn.model.hooks import Hook, recording
from mechunlearn.model.matrices import cast_weights, innermost

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

    At `positions`, a half-precision model's final norm and unembedding are computed in float32: bfloat16 has steps of
    0.125 between logits of 16 and 32.

    `hooks` are TransformerLens forward hooks for this pass. Padding may be left or right. ValueError for rows that are
    longer than the model's context: rotary models would give numbers for them without a word.
    """
    check_length(model, tokens.shape[1], "rows (with padding)")
    cut = nullcontext() if positions is None else _precisely_at(model, positions)
    with cut, model.hooks(fwd_hooks=list(hooks)) if hooks else nullcontext():
        return model(tokens, attention_mask=mask.long(), return_type="logits")


def last_logits(
    model: Model, tokens: Int[Tensor, "batch new"], mask: Bool[Tensor, "batch pos"], cache: Any = None
) -> tuple[Float[Tensor, "batch d_vocab"], Any]:
    """Logits after the last of the tokens, computed as in `logits_at`, and the keys and values of all tokens so far.

    `cache` is what the call for the tokens before gave, which is used up; `mask` covers these too. Padding is on the
    left: behind it, a window of attention counts no gap. Hooks are given the new tokens alone. ValueError for a model
    that gives no cache.
    """
    check_length(model, mask.shape[1], "rows (with padding)")
    last = torch.full((len(tokens), 1), tokens.shape[1] - 1, device=tokens.device)
    with _precisely_at(model, last):
        if is_bridge(model):
            options: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "return_type": "logits_and_cache"}
            logits, cache = model(tokens, attention_mask=mask.long(), **options)
        else:
            cache = _empty_cache(model, len(tokens)) if cache is None else cache
            own = mask[:, -tokens.shape[1] :].long()  # the cache remembers the mask of the tokens before
            logits = model(tokens, attention_mask=own, past_kv_cache=cache, return_type="logits")
    if not hasattr(cache, "batch_select_indices" if is_bridge(model) else "entries"):
        raise ValueError(f"expected a model that gives the keys and values of its tokens, got {type(cache).__name__}.")
    return logits[:, 0], cache


def kept_in_cache(cache: Any, rows: Int[Tensor, "row"]) -> None:
    """Leaves these rows alone in what `last_logits` gave."""
    if hasattr(cache, "batch_select_indices"):
        cache.batch_select_indices(rows)
        return
    cache.previous_attention_mask = cache.previous_attention_mask[rows]
    for entry in cache.entries:
        own = rows.to(entry.past_keys.device)
        entry.past_keys, entry.past_values = entry.past_keys[own], entry.past_values[own]


def _empty_cache(model: Model, n_rows: int) -> Any:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    return TransformerLensKeyValueCache.init_cache(model.cfg, device_of(model), n_rows)


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


def unembedded(
    model: Model, residual: Float[Tensor, "token d_model"], *, precise: bool = True
) -> Float[Tensor, "token d_vocab"]:
    """The logits of residuals that enter the final norm, whatever positions they come from.

    They are in float32 as in `logits_at`; `precise=False` leaves them in the model's dtype, where speed matters.
    """
    tokens = torch.zeros(len(residual), 1, dtype=torch.long, device=residual.device)
    with running_from(model, len(model.blocks), residual[:, None]):
        return logits_at(model, tokens, torch.ones_like(tokens, dtype=torch.bool), tokens if precise else None)[:, 0]


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


@contextmanager
def _precisely_at(model: Model, positions: Int[Tensor, "batch place"]) -> Iterator[None]:
    """Inside, logits are computed at these positions alone, from the final norm on in float32 at least."""
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    if in_half((model.ln_final, model.unembed)):
        forwards[model.ln_final] = _cast_forward(model.ln_final, torch.float32)
        if "forward" not in vars(model.unembed):  # or it is idle
            forwards |= _float32_unembedding(innermost(model.unembed))
    with only_at(model.unembed, positions), replaced_forwards(forwards):
        yield


def _float32_unembedding(module: Any) -> dict[nn.Module, Callable[..., Any]]:
    """The module that unembeds, with a forward that makes some rows of a large matrix float32 at a time."""
    own = module.forward

    def forward(value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if type(module) is nn.Linear:
            return linear_in_chunks(value, module.weight, module.bias)
        if "W_U" in module._parameters:
            return linear_in_chunks(value, module.W_U.T, module.b_U)
        # An adapter or packed weights: what they compute in their own dtype.
        dtype = next(parameter.dtype for parameter in module.parameters() if parameter.dtype in HALF)
        return at_least_float32(own(value.to(dtype), *arguments, **options))

    return {module: forward}


_CHUNK = 1 << 24
"""Entries of an unembedding that are in float32 at once, 64 MB."""


def linear_in_chunks(
    value: Float[Tensor, "*any d_model"], weight: Float[Tensor, "d_vocab d_model"], bias: Tensor | None
) -> Float[Tensor, "*any d_vocab"]:
    """value @ weight.T + bias in float32 at least; half-precision weights are cast some rows at a time."""
    rows = max(1, _CHUNK // weight.shape[1])
    if weight.dtype not in HALF or len(weight) <= rows:
        return _cast_linear(value, weight, bias)
    # The backward pass casts the rows again, or it would keep all of them in float32.
    keeping = partial(checkpoint, _cast_linear, use_reentrant=False, preserve_rng_state=False)
    piece = keeping if torch.is_grad_enabled() else _cast_linear
    weights = weight.split(rows)
    biases = [None] * len(weights) if bias is None else bias.split(rows)
    return torch.cat([piece(value, *part) for part in zip(weights, biases, strict=True)], -1)


def _cast_linear(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else at_least_float32(bias)
    return linear(at_least_float32(value).to(weight.device), at_least_float32(weight), bias)


@contextmanager
def computed_in(model: Model, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, a half-precision model computes in float32, a block's weights at a time; None: in its own dtype.

    Its parameters stay where and what they are: a block reads cast copies while it runs. So runs are those of the same
    weights in float32. ValueError for another dtype, and for packed weights. A float32 model computes as ever.
    """
    if dtype not in (None, torch.float32) or (dtype and not is_castable(model)):
        raise ValueError(
            f"expected compute_dtype None (the model's own) or torch.float32, and floating-point weights of at most "
            f"32 bits, got {dtype} and weights in {', '.join(sorted({str(p.dtype) for p in model.parameters()}))}: "
            f"leave it out, or load the model in bfloat16."
        )
    outer = [part for part in model.children() if part not in (model.blocks, model.ln_final, model.unembed)]
    modules = [part for part in (*outer, *model.blocks) if dtype and in_half([part])]
    with replaced_forwards({module: _cast_forward(module, torch.float32) for module in modules}):
        yield


def is_castable(model: Model) -> bool:
    """Whether every weight is a number of at most 32 bits, not a code."""
    return all(p.is_floating_point() and p.element_size() in (2, 4) for p in model.parameters())


def in_half(modules: Iterable[nn.Module]) -> bool:
    """Whether a parameter of the modules is in half precision."""
    return any(parameter.dtype in HALF for module in modules for parameter in module.parameters())


def _cast_forward(module: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    own = module.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        with cast_weights(module, dtype):
            values = [x.to(dtype) if isinstance(x, Tensor) and x.dtype in HALF else x for x in arguments]
            return own(*values, **options)

    return forward


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
