"""One localized step at the true shapes of Gemma-2-9B and Llama-3-8B, with random weights in bfloat16, on a GPU.

    python benchmarks/true_shapes.py            # one GPU of 80 GB
    python benchmarks/true_shapes.py --shrink 32  # the same on narrow models, anywhere: to see that it runs

The MLPs of the paper's fact lookup, batches as the paper's (64 forget, 64 retain and 64 text rows of 128 tokens in
micro-batches of 4), AdamW and 8-bit AdamW. Seconds of the second step; peak memory above the weights.
"""

import argparse
import gc
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import mechunlearn as mu
from mechunlearn.edit import adamw, adamw_8bit
from mechunlearn.losses import cross_entropy
from mechunlearn.model import preserved
from mechunlearn.training import Term, fit
from mechunlearn.weights import select

PROMPTS, POSITIONS, LENGTH, MICRO_BATCH = 64, 24, 128, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", type=int, default=1, help="divide widths and the vocabulary by this")
    shrink = parser.parse_args().shrink
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and shrink == 1:
        parser.error("expected a GPU for the true shapes, found none: pass --shrink 32 to see that the script runs.")
    for name, (kind, config, layers) in shapes(shrink).items():
        model = random_model(kind, config, device)
        labels = [f"L{layer}MLP" for layer in layers]
        masks = {
            "fact lookup": mu.ComponentMask.of(labels, mu.shape(model)),
            "one MLP": mu.ComponentMask.of(labels[:1], mu.shape(model)),
        }
        for place, mask in masks.items():
            for called, optimizer in {"AdamW": adamw, "adamw_8bit": adamw_8bit}.items():
                seconds, peak = measured(model, mask, optimizer, device)
                memory = "not measured on CPU" if peak is None else f"{peak / 2**30:6.2f} GiB extra"
                print(
                    f"{name:12} {place:12} {mask.n_parameters / 1e6:8.1f} M weights   "
                    f"{called:12} {seconds:7.2f} s/step   {memory}"
                )
        del model
        gc.collect()


def shapes(shrink: int) -> dict[str, tuple[Any, Any, range]]:
    """Name -> model class, configuration, layers of the paper's fact lookup (`mu.localize.PAPER_LAYERS`)."""
    gemma = Gemma2Config(
        vocab_size=256_000 // shrink,
        hidden_size=3584 // shrink,
        intermediate_size=14_336 // shrink,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=max(8, 256 // shrink),
        query_pre_attn_scalar=256,
        sliding_window=4096,
    )
    llama = LlamaConfig(
        vocab_size=128_256 // shrink,
        hidden_size=4096 // shrink,
        intermediate_size=14_336 // shrink,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=max(8, 128 // shrink),
        rope_theta=500_000.0,
        max_position_embeddings=8192,
    )
    return {"Gemma-2-9B": (Gemma2ForCausalLM, gemma, range(2, 7)), "Llama-3-8B": (LlamaForCausalLM, llama, range(1, 5))}


def random_model(kind: Any, config: Any, device: str) -> mu.model.Model:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = kind(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    bridge = build_bridge_from_module(model, kind.__name__, hf_config=config, device=device, dtype=torch.bfloat16)
    bridge(torch.tensor([[1, 2]], device=device))  # TransformerLens installs hooks of its own at the first forward
    return bridge


def measured(model: mu.model.Model, mask: mu.ComponentMask, optimizer: Any, device: str) -> tuple[float, int | None]:
    """Seconds of the second of two steps, and peak extra bytes. The learning rate is 0: the weights stay."""
    ends: list[float] = []

    def on_step(row: object) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    options = {"steps": 2, "learning_rate": 0.0, "micro_batch_size": MICRO_BATCH, "progress": False}
    with preserved(model):
        entries = select(model, mask)
        fit(model, entries, terms(model.cfg.d_vocab), optimizer=optimizer, on_step=on_step, **options)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    return ends[1] - ends[0], peak


def terms(vocabulary: int) -> list[Term]:
    generator = torch.Generator().manual_seed(0)

    def prompts() -> mu.Prompts:
        tokens = torch.randint(vocabulary, (PROMPTS, POSITIONS), generator=generator)
        return mu.Prompts.of(tokens, torch.randint(vocabulary, (PROMPTS,), generator=generator))

    def text() -> Iterator[torch.Tensor]:
        while True:
            yield torch.randint(vocabulary, (LENGTH,), generator=generator)

    made = {"forget": prompts(), "retain": prompts(), "text": text()}
    return [Term(name, chosen, cross_entropy, 1.0, PROMPTS) for name, chosen in made.items()]


if __name__ == "__main__":
    main()
