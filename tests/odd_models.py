"""Tiny models whose weights, residual stream or logits are not the plain ones: adapters, quantised, scaled."""

from typing import Any

import pytest
import tiny
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaConfig

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


def booted(inner: Any) -> Any:
    model = TransformerBridge.boot_transformers("tiny", hf_model=inner, tokenizer=tiny.tokenizer(), device="cpu")
    model(torch.tensor([[1, 5]]))  # TransformerLens installs hooks of its own at the first forward
    return model


def adapted(architecture: str = "llama", targets: list[str] | None = None) -> Any:
    """A bridge of a model with LoRA adapters that are not zero."""
    peft = pytest.importorskip("peft")
    inner = tiny.huggingface(architecture)
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets or ALL, "init_lora_weights": False}
    peft.get_peft_model(inner, peft.LoraConfig(**options, fan_in_fan_out=architecture == "gpt2"))
    return booted(inner.eval())


def quantised(bits: int) -> Any:
    """A Llama whose linear layers are those of LLM.int8 or of 4-bit NF4."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=tiny.N_VOCAB, intermediate_size=128, head_dim=16, **sizes, **tiny.SPECIAL)
    inner = tiny._randomised(tiny.LlamaForCausalLM(config), 0)
    for module in list(inner.model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, _quantised(bitsandbytes.nn, child, bits))
    model = booted(inner.eval())
    with torch.no_grad():  # bitsandbytes packs 4-bit weights anew for CPUs at the first forward without gradients
        model(torch.tensor([[1, 5]]))
    return model


def _quantised(layers: Any, linear: torch.nn.Linear, bits: int) -> Any:
    sizes, weight = (linear.in_features, linear.out_features), linear.weight.data
    if bits == 8:
        module = layers.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        module.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        module = layers.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        module.weight = layers.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return module.to("cpu")


def granite() -> Any:
    """Scaled embeddings, writes, attention and logits."""
    scales = {"residual_multiplier": 0.22, "logits_scaling": 8.0, "embedding_multiplier": 12.0}
    return _named(GraniteForCausalLM(GraniteConfig(**_sizes(), attention_multiplier=0.25, **scales)))


def cohere() -> Any:
    """Scaled logits, parallel blocks."""
    return _named(CohereForCausalLM(CohereConfig(**_sizes(), logit_scale=0.25)))


def _sizes() -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    return {"vocab_size": tiny.N_VOCAB, "hidden_size": 32, "intermediate_size": 64, **heads, **tiny.SPECIAL}


def _named(inner: Any) -> Any:
    inner.config.architectures = [type(inner).__name__]
    return booted(tiny._randomised(inner, 0))
