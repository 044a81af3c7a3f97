"""Which models are accepted; a model that would fail in silence is refused with the remedy."""

from weakref import WeakSet

import torch

from mechunlearn.model.kinds import Model, architecture, is_bridge, is_hooked_transformer, unchecked_shape
from mechunlearn.model.slots import slots

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


def check_model(model: Model) -> None:
    """ValueError unless the model can be localized: class, dense MLPs, known architecture."""
    if not (is_bridge(model) or is_hooked_transformer(model)):
        raise ValueError(
            f"expected a TransformerBridge or a HookedTransformer, got {type(model).__name__}: wrap a Hugging Face "
            f'model with TransformerBridge.boot_transformers("name", hf_model=model, tokenizer=tokenizer).'
        )
    if getattr(model.cfg, "num_experts", None):
        raise ValueError(
            f"expected a dense model, got a mixture of {model.cfg.num_experts} experts: an expert's weights have "
            f"no component label; use a dense model."
        )
    if architecture(model) not in TESTED and model not in _admitted:
        _self_test(model)
        _admitted.add(model)


def check_editable(model: Model) -> None:
    """ValueError unless the model's weights are the checkpoint's own: not processed, not quantised."""
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
        if not slot.parameter.is_floating_point():
            raise ValueError(
                f"expected floating-point weights, got {slot.parameter.dtype} in L{slot.layer} {slot.matrix}: a "
                f"quantised model cannot be edited; load it in bfloat16 or float32 and quantise afterwards."
            )


def _self_test(model: Model) -> None:
    """Zeroing head 0's slice of the last W_O must do exactly what zeroing its z does, and get a gradient."""
    from mechunlearn.model.preserve import preserved
    from mechunlearn.model.run import logits_at

    try:
        shape = unchecked_shape(model)
        slot = slots(model)[shape.n_layers - 1, "W_O"]
    except (AttributeError, KeyError, TypeError) as error:
        raise _unsupported(model, f"its weights are not laid out as q, k, v, o and in, out ({error})") from error
    tokens = torch.arange(1, 7, device=slot.parameter.device)[None]
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def without_head(z: torch.Tensor, hook: object) -> torch.Tensor:
        return z * (torch.arange(z.shape[2], device=z.device) != 0)[None, None, :, None]

    with preserved(model):
        slot.parameter.requires_grad_(True)
        whole = logits_at(model, tokens, mask)
        gradient = torch.autograd.grad(whole.sum(), slot.parameter, allow_unused=True)[0]
        with torch.no_grad():
            hooked = logits_at(model, tokens, mask, hooks=[(f"blocks.{slot.layer}.attn.hook_z", without_head)])
            head = slot.view(slot.parameter)[0]
            saved = head.clone()
            try:
                head.zero_()
                zeroed = logits_at(model, tokens, mask)
            finally:
                head.copy_(saved)
    if gradient is None or not torch.allclose(zeroed, hooked, atol=1e-4) or torch.equal(zeroed, whole):
        raise _unsupported(model, "zeroing a head's W_O slice is not zeroing its output")


def _unsupported(model: Model, reason: str) -> ValueError:
    return ValueError(
        f"expected one of the tested architectures ({', '.join(TESTED)}) or one that passes the self-test, got "
        f"{architecture(model) or type(model).__name__}: {reason}. Use one of the tested ones."
    )
