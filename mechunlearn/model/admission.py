"""Which models are accepted: a model with which a method would fail in silence is refused, with the remedy."""

from collections.abc import Sequence
from weakref import WeakSet

import torch

from mechunlearn.model.classes import Model, architecture, device_of, is_bridge, is_hooked_transformer, unchecked_shape
from mechunlearn.model.guard import differentiable
from mechunlearn.model.hooks import Hook
from mechunlearn.model.matrices import Slot, check_plain, check_split, slots
from mechunlearn.model.running import logits_at

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
    """ValueError unless slots have the labels' shapes and get gradients, and zeroing a head's W_O zeroes its output."""
    try:
        shape, weights = unchecked_shape(model), slots(model)
        for slot in weights.values():
            expected = (shape.units(slot.matrix), shape.unit_parameters(slot.matrix) // shape.d_model, shape.d_model)
            if slot.view(slot.parameter).shape != expected:
                raise _unsupported(model, f"L{slot.layer} {slot.matrix} is not of shape {expected}")
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise _unsupported(model, f"its weights are not laid out as q, k, v, o and in, out ({error})") from error
    with differentiable(model):
        parameters = [slot.parameter.requires_grad_(True) for slot in weights.values()]
        whole = _test_logits(model)
        gradients = torch.autograd.grad(whole.sum(), parameters, allow_unused=True)
        hooked, zeroed = _without_a_head(model, weights[shape.n_layers - 1, "W_O"])
    if any(gradient is None for gradient in gradients):
        raise _unsupported(model, "a weight that its label names is not used in the forward pass")
    if not torch.allclose(zeroed, hooked, atol=1e-4) or torch.equal(zeroed, whole):
        raise _unsupported(model, "zeroing a head's W_O slice is not zeroing its output")


def _test_logits(model: Model, hooks: Sequence[Hook] = ()) -> torch.Tensor:
    tokens = torch.arange(1, 7, device=device_of(model))[None]
    return logits_at(model, tokens, torch.ones_like(tokens, dtype=torch.bool), hooks=hooks)


@torch.no_grad()
def _without_a_head(model: Model, slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with z of head 0 zeroed, and with its slice of W_O zeroed."""

    def without_head(z: torch.Tensor, hook: object) -> torch.Tensor:
        return z * (torch.arange(z.shape[2], device=z.device) != 0)[None, None, :, None]

    hooked = _test_logits(model, [(f"blocks.{slot.layer}.attn.hook_z", without_head)])
    head = slot.weight[0]
    saved = head.clone()
    try:
        head.zero_()
        return hooked, _test_logits(model)
    finally:
        head.copy_(saved)


def _unsupported(model: Model, reason: str) -> ValueError:
    return ValueError(
        f"expected one of the tested architectures ({', '.join(TESTED)}) or one that passes the self-test, got "
        f"{architecture(model) or type(model).__name__}: {reason}. Use one of the tested ones."
    )
