"""What a localized step costs at a large vocabulary, and what the text loss needs at 256,000 words.

    python benchmarks/edit_costs.py

1. One step of `finetune`'s loop on MLPs of 7-25 % of the depth (the paper's fact lookup) against all components. Times
   are medians of alternating runs in one process, one thread; peak extra memory is the largest sum of live allocations
   during the step, the copy of the original weights included. Next to them, the share of multiplications that
   must be done (`counted`).
2. Peak extra memory of the gradient of the text loss on 4 rows of 256 tokens, against all logits at once.
"""

import statistics
import sys
import time
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from weight_mask_memory import peak

import mechunlearn as mu
from mechunlearn.losses import cross_entropy
from mechunlearn.model import preserved
from mechunlearn.tasks import as_prompts
from mechunlearn.training import Term, fit
from mechunlearn.weights import read, select, write

LAYERS, WIDTH, INNER, VOCABULARY = 16, 512, 1408, 65_536
MICRO_BATCH, PROMPTS, POSITIONS, TEXT, LENGTH = 4, 16, 24, 4, 64
ROUNDS = 3


def main() -> None:
    torch.set_num_threads(1)
    steps()
    text_loss()


def steps() -> None:
    model = random_llama(LAYERS, WIDTH, INNER, VOCABULARY)
    shape = mu.shape(model)
    lookup = [f"L{layer}MLP" for layer in range(LAYERS) if 0.07 * LAYERS <= layer < 0.25 * LAYERS + 0.5]
    masks = {"everything": mu.localize.everything(model), "fact lookup": mu.ComponentMask.of(lookup, shape)}
    print(f"{LAYERS} layers, d_model {WIDTH}, vocabulary {VOCABULARY:,}; fact lookup: {', '.join(lookup)}")
    runs = {name: training(model, mask) for name, mask in masks.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name] += run()
    memory = {name: peak(run) for name, run in runs.items()}
    base = statistics.median(times["everything"]), memory["everything"], counted(masks["everything"], 0)
    for name, mask in masks.items():
        seconds, least = statistics.median(times[name]), counted(mask, 0 if name == "everything" else int(lookup[0][1]))
        size = mask.n_parameters * 4
        print(
            f"  {name:12} {seconds:6.2f} CPU s {seconds / base[0]:5.2f} x (counted {least / base[2]:.2f} x)   "
            f"{memory[name] / 2**20:7.1f} MiB {memory[name] / base[1]:5.2f} x   weights {size / 2**20:.1f} MiB"
        )


def training(model: mu.model.Model, mask: mu.ComponentMask) -> Callable[[], list[float]]:
    """Three steps, which give the CPU seconds of the last two; the weights are put back."""
    entries = select(model, mask)
    before = read(entries)

    def run() -> list[float]:
        ends: list[float] = []
        options = {"steps": 3, "learning_rate": 1e-5, "micro_batch_size": MICRO_BATCH, "progress": False}
        with preserved(model):
            fit(model, entries, random_terms(), on_step=lambda row: ends.append(time.process_time()), **options)
        write(entries, before)
        return [after - since for since, after in pairwise(ends)]

    return run


def counted(mask: mu.ComponentMask, lowest: int) -> float:
    """Multiplications per step: forward, activation gradients, weight gradients; attention's products left out."""
    text, prompts = TEXT * (LENGTH - 1), 2 * PROMPTS * POSITIONS
    layer = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER
    forward = layer * (LAYERS * text + (LAYERS - lowest) * prompts)  # prompts start at the lowest trained layer
    backward = layer * (LAYERS - lowest) * (text + prompts) + mask.n_parameters * (text + prompts)
    return forward + backward + 2 * WIDTH * VOCABULARY * (text + 2 * PROMPTS)


def random_terms() -> list[Term]:
    generator = torch.Generator().manual_seed(0)

    def prompts() -> mu.Prompts:
        tokens = torch.randint(VOCABULARY, (PROMPTS, POSITIONS), generator=generator)
        return mu.Prompts.of(tokens, torch.randint(VOCABULARY, (PROMPTS,), generator=generator))

    text = (torch.randint(VOCABULARY, (LENGTH,), generator=generator) for _ in count())
    made = {"forget": (prompts(), PROMPTS), "retain": (prompts(), PROMPTS), "text": (text, TEXT)}
    return [Term(name, chosen, cross_entropy, 1.0, size) for name, (chosen, size) in made.items()]


def text_loss() -> None:
    vocabulary, rows, length = 256_000, 4, 257
    model = random_llama(2, 64, 176, vocabulary)
    tokens = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    entries = select(model, mu.ComponentMask.of(["L0MLP"], mu.shape(model)))
    before = read(entries)

    def ours() -> None:
        with preserved(model):
            term = Term("text", as_prompts(tokens), cross_entropy, 1.0, rows)
            fit(model, entries, [term], original=before, steps=1, learning_rate=0.0, progress=False)

    def plain() -> None:
        with preserved(model):
            for e in entries:
                e.slot.parameter.requires_grad_(True)
            logits = model(tokens[:, :-1], attention_mask=torch.ones_like(tokens[:, :-1]))
            functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    extra = {"ours": peak(ours), "plain": peak(plain)}
    print(f"text loss, vocabulary {vocabulary:,}, {rows} x {length - 1} tokens:")
    for name, found in extra.items():
        print(f"  {name:6} {found / 2**20:8.1f} MiB {found / extra['plain']:5.2f} x")


def random_llama(layers: int, width: int, inner: int, vocabulary: int) -> mu.model.Model:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=512, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config).eval()
    bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)
    bridge(torch.tensor([[1, 2]]))  # TransformerLens installs hooks of its own at the first forward
    return bridge


if __name__ == "__main__":
    main()
