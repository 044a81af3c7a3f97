"""Which models are accepted: a model with which a method would fail in silence is refused, with the remedy."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from weakref import WeakSet

import torch
from torch import nn

from mechunlearn.components import Component
from mechunlearn.components.component import ATTENTION_MATRICES
from mechunlearn.model.classes import Model, architecture, device_of, is_bridge, is_hooked_transformer, unchecked_shape
from mechunlearn.model.decomposition import scales_of
from mechunlearn.model.guard import differentiable, preserved
from mechunlearn.model.hooks import recording, site
from mechunlearn.model.matrices import Slot, check_plain, check_split, slots
from mechunlearn.model.running import in_half, logits_at, remembering_tuples, running_from
from mechunlearn.model.suffix import base_run, continued

TESTED = (
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
)
"""Architectures that the tests cover, on both model classes; others must pass a self-test first."""

_admitted: WeakSet[torch.nn.Module] = WeakSet()
"""Models of other architectures that have passed the self-test."""


def check_model(model: Model) -> None:
    """ValueError unless the model can be localized: class, dense MLPs, known architecture."""
    if not (is_bridge(model) or is_hooked_transformer(model)):
        for name in ("_orig_mod", "module"):  # of torch.compile and DataParallel
            if isinstance(getattr(model, name, None), torch.nn.Module):
                raise ValueError(
                    f"expected the model itself, got a {type(model).__name__} around it, which would not see hooks and "
                    f"edits: pass model.{name}."
                )
        raise ValueError(
            f"expected a TransformerBridge or a HookedTransformer, got {type(model).__name__}: wrap a Hugging Face "
            f'model with TransformerBridge.boot_transformers("name", hf_model=model, tokenizer=tokenizer).'
        )
    if torch.get_default_device().type != "cpu" or torch.get_default_dtype().itemsize != 4:
        raise ValueError(
            f"expected torch's default device and dtype, got {torch.get_default_device()} and "
            f"{torch.get_default_dtype()}: call torch.set_default_device(None) and "
            f"torch.set_default_dtype(torch.float32) once the model is loaded; it stays where and what it is."
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta or parameter.is_inference():
            raise ValueError(
                f"expected weights in memory that can be trained, got {name} "
                f"{'offloaded (on the meta device)' if parameter.is_meta else 'made under torch.inference_mode'}: load "
                f"the model without offloading (no device_map or a device that holds it) and outside inference_mode."
            )
    if getattr(model.cfg, "num_experts", None):
        raise ValueError(
            f"expected a dense model, got a mixture of {model.cfg.num_experts} experts: an expert's weights have "
            f"no component label; use a dense model."
        )
    if getattr(model.cfg, "ungroup_grouped_query_attention", False):
        raise ValueError(
            "expected keys and values per KV head, got a model that ungroups them: call "
            "model.set_ungroup_grouped_query_attention(False); no method here needs it."
        )
    if not all(hasattr(block, "attn") and hasattr(block, "mlp") for block in getattr(model, "blocks", [None])):
        raise _unsupported(model, "not every layer is an attention and an MLP")
    check_split(model)
    if architecture(model) not in TESTED and model not in _admitted:
        _self_test(model)
        _admitted.add(model)


def check_unforked(model: Model) -> None:
    """ValueError if the model copies its attention's input for each head, an option of TransformerLens."""
    forked = [flag for flag in ("use_split_qkv_input", "use_attn_in") if getattr(model.cfg, flag, False)]
    if forked:
        raise ValueError(
            f"expected one input for all heads of a layer, got a model with {', '.join(forked)}: call "
            f"model.set_{forked[0]}(False); no method here needs it."
        )


def check_editable(model: Model) -> None:
    """ValueError if the model's weights are processed or quantised, as far as the model tells.

    A folded LayerNorm and a processed bridge are recognised; a `HookedTransformer` that was only centered is not.
    """
    check_model(model)
    folded = str(model.cfg.normalization_type).endswith("Pre")
    if folded or (is_bridge(model) and model._weights_processed):
        raise ValueError(
            "expected unprocessed weights, got folded or centered ones: an edit of them cannot be exported, and in "
            "TransformerLens 3.9 gated MLPs of a processed bridge get no gradient. Load with "
            "TransformerBridge.boot_transformers(...) and leave out enable_compatibility_mode() (or pass it "
            "no_processing=True), or use HookedTransformer.from_pretrained_no_processing(...)."
        )
    for slot in slots(model).values():
        if slot.parameter.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"expected float16, bfloat16, float32 or float64 weights, got {slot.parameter.dtype} in "
                f"L{slot.layer} {slot.matrix}: a quantised model cannot be edited; load it in bfloat16 "
                f"or float32 and quantise afterwards."
            )
    check_plain(model)


def _self_test(model: Model) -> None:
    """ValueError unless small runs of what methods do give the numbers that they should.

    Tried are padding on either side, gradients at activations and weights, suffix runs of two rows, what heads and
    neurons give by their weights, a patch against changed weights, the residual stream as the sum of its writes, and
    the logits from the final norm. Cost, once for each model: about twenty forwards and a backward of two short rows.
    """
    try:
        weights = _laid_out(model)
        with differentiable(model), remembering_tuples(model):
            trials = [*_gradients(model, weights)]
        with preserved(model), torch.no_grad():
            trials += [*_padded(model), *_continued(model)]
            trials += [*_products(model, weights), *_without_weights(model, weights)]
        scales_of(model)
    except ValueError as error:
        raise _unsupported(model, str(error).partition(". Use ")[0]) from error  # another remedy than that method's
    except Exception as error:  # whatever a module that nobody has seen raises
        raise _unsupported(model, f"a trial of it raises {type(error).__name__} ({str(error)[:300]})") from error
    tolerance = 0.1 if in_half([model]) else 1e-3
    for failure, actual, expected in trials:
        scale = max(float(expected.abs().max()), 1e-6)
        if not bool((actual - expected).abs().max() <= tolerance * scale):
            raise _unsupported(model, failure)


_Trial = tuple[str, torch.Tensor, torch.Tensor]
"""What is wrong with the model if the two tensors differ."""


def _laid_out(model: Model) -> dict[tuple[int, str], Slot]:
    shape, weights = unchecked_shape(model), slots(model)
    for slot in weights.values():
        expected = (shape.units(slot.matrix), shape.unit_parameters(slot.matrix) // shape.d_model, shape.d_model)
        if slot.view(slot.parameter).shape != expected:
            raise ValueError(f"L{slot.layer} {slot.matrix} is not of shape {expected}")
    return weights


def _gradients(model: Model, weights: Mapping[tuple[int, str], Slot]) -> Iterator[_Trial]:
    """At a head's z (a neuron's activation) and at its W_O (W_out), each times the gradient's base: the same sum."""
    at_weights: dict[tuple[int, str], torch.Tensor] = {}
    at_values: dict[tuple[int, str], torch.Tensor] = {}

    def measure(parameter: nn.Parameter, place: tuple[int, str]) -> None:
        slot, gradient = weights[place], parameter.grad
        if gradient is not None:
            at_weights[place] = (slot.view(parameter.detach()) * slot.view(gradient)).float().sum((1, 2))
            parameter.grad = None  # or those of all layers would be in memory together

    sites = {place: _site_of(model, *place) for place in weights if place[1] in _WRITES}
    with ExitStack() as stack, recording(model, sites.values()) as values:
        for place, slot in weights.items():
            slot.parameter.requires_grad_(True)
            hook = partial(measure, place=place)
            stack.callback(slot.parameter.register_post_accumulate_grad_hook(hook).remove)
        tokens, mask, _ = _two_rows(model)
        logits = logits_at(model, tokens, mask)
        for place, name in sites.items():

            def note(gradient: torch.Tensor, *, place: tuple[int, str], value: torch.Tensor) -> None:
                products = (value.detach() * gradient).float()
                at_values[place] = products.reshape(*products.shape[:2], weights[place].units, -1).sum((0, 1, 3))

            values[name].register_hook(partial(note, place=place, value=values[name]))
        logits[mask].float().sum().backward()
    missing = [f"L{layer} {matrix}" for layer, matrix in weights.keys() - at_weights.keys()]
    missing += [sites[place] for place in sites.keys() - at_values.keys()]
    if missing:
        raise ValueError(f"no gradient reaches {', '.join(sorted(missing)[:3])}")
    for place, products in at_values.items():
        yield f"the gradient at {sites[place]} is not that of {place[1]}", products, at_weights[place]


def _two_rows(model: Model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and the two last places of each row; the second row is shorter."""
    tokens = torch.stack([torch.arange(1, 7), torch.arange(2, 8)]).to(device_of(model))
    mask = torch.arange(6, device=tokens.device) < torch.tensor([[6], [4]], device=tokens.device)
    return tokens, mask, torch.tensor([[4, 5], [2, 3]], device=tokens.device)


def _padded(model: Model) -> Iterator[_Trial]:
    tokens, mask, positions = _two_rows(model)
    logits = logits_at(model, tokens, mask, positions)[1:]
    alone = logits_at(model, tokens[1:, :4], mask[1:, :4], positions[1:])
    left = logits_at(model, tokens[1:].roll(2, 1), mask[1:].roll(2, 1), positions[1:] + 2)
    yield "padding on the right changes its logits", logits, alone
    yield "padding on the left changes its logits", left, alone


def _continued(model: Model) -> Iterator[_Trial]:
    """Suffix runs of rows in another order, with a hook, and with the attention that the run had."""
    tokens, mask, positions = _two_rows(model)
    rows, last = torch.tensor([1, 0], device=tokens.device), len(model.blocks) - 1
    run = base_run(model, tokens, mask, positions)
    for layer in sorted({0, last // 2, last}):
        hooks = [(f"blocks.{layer}.{site}", _grown) for site in ("attn.hook_z", "hook_mlp_out")]
        for hook in hooks:
            whole = logits_at(model, tokens[rows], mask[rows], positions[rows], hooks=[hook])
            found = continued(model, run, rows, layer, hooks=[hook])
            yield f"a run from layer {layer} on is not the whole run with the same change", found, whole
        found = continued(model, run, rows, layer, attention=run.attention[layer][rows])
        yield f"its attention of layer {layer} cannot be given", found, run.logits[rows]
    changed = continued(model, run, rows, last + 1, residual=run.residuals[-1][rows])
    yield "its logits are not those of the final norm", changed, run.logits[rows]


def _grown(value: torch.Tensor, hook: object) -> torch.Tensor:
    return value * 1.5


def _products(model: Model, weights: Mapping[tuple[int, str], Slot]) -> Iterator[_Trial]:
    """What heads and neurons give by their weights, from token to token, so that a bias drops out."""
    tokens, mask, positions = _two_rows(model)
    sites = {place: _site_of(model, *place) for place in weights if place[1] in _WRITES}
    mlps: list[torch.Tensor] = []
    with ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.mlp.register_forward_hook(lambda module, inputs, output: mlps.append(output)).remove)
        run = base_run(model, tokens, mask, positions, names=sites.values())
    for (layer, matrix), name in sites.items():
        outputs = run.attention if matrix == "W_O" else mlps
        if len(outputs) < len(model.blocks):
            raise ValueError("its MLPs are no modules of their own")
        product = run.values[name].flatten(2) @ weights[layer, matrix].weight.flatten(0, 1)
        failure = f"{name} times {matrix} is not what the module gives"
        yield failure, product[0].diff(dim=0).float(), outputs[layer][0].diff(dim=0).float()


def _without_weights(model: Model, weights: Mapping[tuple[int, str], Slot]) -> Iterator[_Trial]:
    """In the last layer: half of each matrix's units zeroed, and a patch of what these units then give."""
    tokens, mask, positions = _two_rows(model)
    layer, run = len(model.blocks) - 1, base_run(model, tokens, mask, positions)
    for matrix in unchecked_shape(model).matrices:
        slot, name = weights[layer, matrix], _site_of(model, layer, matrix)
        half = (slot.units + 1) // 2
        with running_from(model, layer, run.residuals[layer]):
            with _zeroed(slot.weight[:half]), recording(model, [name]) as values:
                zeroed = logits_at(model, tokens, mask, positions)
            patch = partial(_first_units, given=values[name] * (matrix not in _WRITES), count=half)
            patched = logits_at(model, tokens, mask, positions, hooks=[(name, patch)])
        yield f"zeroing units of L{layer} {matrix} is not a patch of what they give", patched, zeroed
        if torch.equal(zeroed, run.logits):
            raise ValueError(f"zeroing units of L{layer} {matrix} changes nothing")


_WRITES = {"W_O": "attn.hook_z", "W_out": "mlp.hook_post"}
"""Matrices that units write by, and where what they multiply is seen."""


def _site_of(model: Model, layer: int, matrix: str) -> str:
    if matrix in _WRITES:
        return f"blocks.{layer}.{_WRITES[matrix]}"
    part, index = ("H", 0) if matrix in ATTENTION_MATRICES else ("MLP", None)
    return site(Component(layer, part, index, matrix), unchecked_shape(model))


def _first_units(own: torch.Tensor, hook: object, *, given: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([given[:, :, :count], own[:, :, count:]], 2)


@contextmanager
def _zeroed(weight: torch.Tensor) -> Iterator[None]:
    saved = weight.clone()
    try:
        weight.zero_()
        yield
    finally:
        weight.copy_(saved)


def _unsupported(model: Model, reason: str) -> ValueError:
    return ValueError(
        f"expected one of the tested architectures ({', '.join(TESTED)}) or one that passes the self-test, got "
        f"{architecture(model) or type(model).__name__}: {reason}. Use one of the tested ones; docs/models.md says "
        f"which others pass."
    )
