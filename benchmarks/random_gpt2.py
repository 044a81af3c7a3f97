"""A random GPT-2 in both model classes, and pairs of random prompts: what the localization benchmarks run on."""

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import mechunlearn as mu

VOCABULARY = 1000


def plain(n_layers: int = 6, d_model: int = 256, n_heads: int = 8) -> GPT2LMHeadModel:
    """With weights large enough that heads attend somewhere."""
    torch.manual_seed(0)
    sizes = {"n_layer": n_layers, "n_embd": d_model, "n_head": n_heads, "n_positions": 128}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(vocab_size=VOCABULARY, initializer_range=0.05, **sizes, **dropout)
    return GPT2LMHeadModel(config).eval()


def bridge(n_layers: int = 6, d_model: int = 256, n_heads: int = 8) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = plain(n_layers, d_model, n_heads)
    return build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config)


def hooked(n_layers: int = 6, d_model: int = 256, n_heads: int = 8) -> Any:
    """The same weights in a HookedTransformer; TransformerLens 3.9 only."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    sizes = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "d_head": d_model // n_heads}
    sizes |= {"n_ctx": 128, "d_vocab": VOCABULARY}
    config = HookedTransformerConfig(**sizes, act_fn="gelu_new", normalization_type="LN", device="cpu")
    model = HookedTransformer(config)
    model.load_state_dict(convert_gpt2_weights(plain(n_layers, d_model, n_heads), config), strict=False)
    return model.eval()


def pairs(n: int = 8, positions: int = 16, *, subject: slice = slice(1, 4)) -> mu.Prompts:
    """Pairs of random prompts with two candidates; the corrupt one has another subject."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (n, positions), generator=generator)
    corrupt, where = tokens.clone(), torch.zeros(n, positions, dtype=torch.bool)
    where[:, subject] = True
    corrupt[where] = torch.randint(VOCABULARY, (int(where.sum()),), generator=generator)
    candidates = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:2] for _ in range(n)])
    return mu.Prompts.of(tokens, candidates[:, 0], candidates=candidates, corrupt=corrupt, subject=where)
