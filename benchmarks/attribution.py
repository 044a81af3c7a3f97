"""attribution_patching against 2 forwards + 1 backward of the plain Hugging Face model on the same batch.

    python benchmarks/attribution.py

Medians of alternating runs in one process, one thread. The floor computes logits at the last position
only, as we do, and comes in two kinds: with weight gradients, as `loss.backward()` computes them, and
with activation gradients alone, which is all the arithmetic that attribution needs.
"""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mechunlearn as mu
from mechunlearn.metrics import answer_log_probability

ROUNDS = 9
BATCH, POSITIONS, VOCABULARY = 16, 32, 8000


def main() -> None:
    torch.set_num_threads(1)
    model, plain = models()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, BATCH, POSITIONS), generator=generator)
    answers = torch.randint(VOCABULARY, (BATCH,), generator=generator)
    prompts = mu.Prompts.of(tokens[0], answers, corrupt=tokens[1])
    runs: dict[str, Callable[[], object]] = {
        "attribution_patching, heads and MLPs": lambda: mu.localize.attribution_patching(
            model, prompts, metric=answer_log_probability
        ),
        "attribution_patching, matrices and neurons": lambda: mu.localize.attribution_patching(
            model,
            prompts,
            metric=answer_log_probability,
            components=lambda s: [*mu.components.matrices(s), *mu.components.neurons(s)],
        ),
        "2F + 1B, weight gradients": lambda: floor(plain, tokens, answers, weights=True),
        "2F + 1B, activation gradients": lambda: floor(plain, tokens, answers, weights=False),
    }
    times = {name: [] for name in runs}
    for round_ in range(ROUNDS + 1):
        for name, run in runs.items():
            started = time.process_time()
            run()
            if round_:  # the first round warms up
                times[name].append(time.process_time() - started)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    floors = [medians[name] for name in runs if name.startswith("2F")]
    print(f"{'':44}{'CPU s':>8}{'x with weight gradients':>26}{'x without':>12}")
    for name, seconds in medians.items():
        print(f"{name:44}{seconds:8.3f}{seconds / floors[0]:26.2f}{seconds / floors[1]:12.2f}")


def models() -> tuple[object, LlamaForCausalLM]:
    """The same 12-layer Llama as a bridge and as it is."""
    from transformer_lens.model_bridge import TransformerBridge

    def fresh() -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
        config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **sizes)
        return LlamaForCausalLM(config).eval()

    from transformer_lens.model_bridge.sources import build_bridge_from_module

    wrapped = fresh()
    bridge = build_bridge_from_module(wrapped, "LlamaForCausalLM", hf_config=wrapped.config)
    assert isinstance(bridge, TransformerBridge)
    return bridge, fresh()


def floor(model: LlamaForCausalLM, tokens: torch.Tensor, answers: torch.Tensor, *, weights: bool) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(weights)
    with torch.no_grad():
        model(tokens[1], logits_to_keep=1)
    embedded = model.get_input_embeddings()(tokens[0]).detach().requires_grad_(True)
    logits = model(inputs_embeds=embedded, logits_to_keep=1).logits[:, -1]
    logits.log_softmax(-1)[torch.arange(len(answers)), answers].sum().backward()
    model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
