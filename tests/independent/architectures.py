"""Tiny random Hugging Face models of three architectures, and where their parts are.

Whoever wrote this folder had not looked at the package's code, nor at its other tests, and whoever changes it should
not either: what a method ought to give is worked out from README, docs, docstrings and papers, with torch and
transformers alone. So the same misunderstanding cannot be in both.
"""

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

BOS = 1


def gpt2(vocabulary: int) -> GPT2LMHeadModel:
    """Fused query, key and value in a Conv1D, learned positions, LayerNorms, biases, tied unembedding."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    size = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": vocabulary}
    return GPT2LMHeadModel(GPT2Config(**size, **no_dropout, attn_implementation="eager"))


def llama(vocabulary: int) -> LlamaForCausalLM:
    """Four query heads on two KV heads, rotary positions, gated MLPs, untied unembedding; wide heads."""
    size = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "head_dim": 8, "vocab_size": vocabulary}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**size, **heads, attn_implementation="eager"))


def gemma2(vocabulary: int, window: int = 4) -> Gemma2ForCausalLM:
    """Norms before and after each layer that multiply by 1 + w, two soft caps, a short window in every other layer."""
    size = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 4, "head_dim": 8, "vocab_size": vocabulary}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "query_pre_attn_scalar": 5,
    }
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0, "sliding_window": window}
    return Gemma2ForCausalLM(Gemma2Config(**size, **heads, **caps, attn_implementation="eager"))


MAKERS = {"gpt2": gpt2, "llama": llama, "gemma2": gemma2}


def random_model(name: str, vocabulary: int = 97, **options: int) -> Any:
    """A model whose weights, biases and norms are all random and so large that every part has an effect."""
    torch.manual_seed(sum(map(ord, name)))
    huggingface = MAKERS[name](vocabulary, **options).eval().double()
    for label, parameter in huggingface.named_parameters():
        noise = torch.randn_like(parameter)
        if label.endswith("bias"):
            parameter.data = 0.3 * noise
        elif parameter.ndim == 1:  # norms; those of Gemma multiply by 1 + w
            parameter.data = 0.3 * noise + (name != "gemma2")
        elif "embed" in label or "wte" in label or "wpe" in label:
            parameter.data = 0.4 * noise
        else:  # [in, out] in GPT-2, [out, in] elsewhere, up to the unembedding of Llama
            parameter.data = 1.2 * noise / parameter.shape[0 if name == "gpt2" else 1] ** 0.5
    return huggingface


@dataclass(frozen=True)
class Raw:
    """A plain Hugging Face model, and the modules that hooks go on."""

    name: str
    model: Any

    @property
    def trunk(self) -> Any:
        return self.model.transformer if self.name == "gpt2" else self.model.model

    @property
    def blocks(self) -> Any:
        return self.trunk.h if self.name == "gpt2" else self.trunk.layers

    @property
    def final_norm(self) -> Any:
        return self.trunk.ln_f if self.name == "gpt2" else self.trunk.norm

    @property
    def heads(self) -> SimpleNamespace:
        """How many query and KV heads there are, and how wide they are."""
        config = self.model.config
        if self.name == "gpt2":
            return SimpleNamespace(query=config.n_head, kv=config.n_head, width=config.n_embd // config.n_head)
        return SimpleNamespace(query=config.num_attention_heads, kv=config.num_key_value_heads, width=config.head_dim)

    def at(self, layer: int) -> SimpleNamespace:
        """The modules of a layer. `attn_adds` and `mlp_adds` are those whose outputs enter the residual stream."""
        block = self.blocks[layer]
        if self.name == "gpt2":
            o, mlp = block.attn.c_proj, block.mlp
            norms = {"attn_norm": block.ln_1, "mlp_norm": block.ln_2, "attn_adds": o, "mlp_adds": mlp.c_proj}
            return SimpleNamespace(block=block, o=o, up=mlp.c_fc, down=mlp.c_proj, **norms)
        o, mlp = block.self_attn.o_proj, block.mlp
        parts = SimpleNamespace(block=block, o=o, up=mlp.up_proj, gate=mlp.gate_proj, down=mlp.down_proj)
        parts.attn_norm, parts.attn_adds, parts.mlp_adds = block.input_layernorm, o, mlp.down_proj
        parts.mlp_norm = block.post_attention_layernorm
        if self.name == "gemma2":
            parts.attn_adds, parts.mlp_adds = block.post_attention_layernorm, block.post_feedforward_layernorm
            parts.mlp_norm = block.pre_feedforward_layernorm
        return parts

    def reads(self, layer: int, matrix: str, head: int) -> tuple[Any, slice]:
        """The projection that holds a head's `W_Q`, `W_K` or `W_V`, and the part of its output that is the head's."""
        heads = self.heads
        j = head if matrix == "W_Q" else head // (heads.query // heads.kv)
        part = slice(j * heads.width, (j + 1) * heads.width)
        if self.name == "gpt2":
            shift = ("W_Q", "W_K", "W_V").index(matrix) * heads.query * heads.width
            return self.blocks[layer].attn.c_attn, slice(part.start + shift, part.stop + shift)
        attention = self.blocks[layer].self_attn
        return {"W_Q": attention.q_proj, "W_K": attention.k_proj, "W_V": attention.v_proj}[matrix], part

    def head(self, h: int) -> slice:
        """The part of what `o` reads that head h has computed."""
        return slice(h * self.heads.width, (h + 1) * self.heads.width)

    def rows(self, module: Any) -> Tensor:
        """A projection's weight as [what it reads, what it gives]."""
        return module.weight if self.name == "gpt2" else module.weight.T

    def copied(self) -> "Raw":
        return Raw(self.name, copy.deepcopy(self.model))
