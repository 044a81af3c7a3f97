"""One finetune step with a mask of MLPs in the first quarter of the layers, against training everything.

    python benchmarks/finetune_step.py

Time: medians of alternating runs in one process, one thread. Peak extra memory: the largest sum of
live allocations during the call above what lived before it (masters, gradients, optimizer state,
activations), from the profiler's allocation events, not from sampling.
"""

import statistics
import time

import torch
from attribution import VOCABULARY, models
from torch.profiler import ProfilerActivity, profile

import mechunlearn as mu
from mechunlearn.losses import cross_entropy
from mechunlearn.model import preserved
from mechunlearn.tasks.text import as_prompts
from mechunlearn.training import Term, fit
from mechunlearn.weights import read, select, write

STEPS, ROUNDS = 1, 2


def main() -> None:
    torch.set_num_threads(1)
    model, _ = models()
    quarter = [f"L{layer}MLP" for layer in range(mu.shape(model).n_layers // 4)]
    masks = {
        "MLPs of layers 0-2 of 12": mu.ComponentMask.of(quarter, mu.shape(model)),
        "MLPs of layers 1-2 of 12": mu.ComponentMask.of(quarter[1:], mu.shape(model)),
        "everything": mu.localize.everything(model),
    }
    times = {name: [] for name in masks}
    for round_ in range(ROUNDS + 1):
        for name, mask in masks.items():
            seconds = train(model, mask, STEPS)
            if round_:
                times[name].append(seconds / STEPS)
    memory = {name: peak(model, mask) for name, mask in masks.items()}
    base = statistics.median(times["everything"]), memory["everything"]
    for name in masks:
        seconds = statistics.median(times[name])
        print(
            f"{name:26} {seconds:6.3f} CPU s/step  {seconds / base[0]:5.2f} x   "
            f"{memory[name] / 2**20:7.1f} MiB extra  {memory[name] / base[1]:5.2f} x"
        )


def terms() -> list[Term]:
    """64 forget and 64 retain prompts of 24 tokens and 8 text rows of 64: the proportions of the paper's step."""
    generator = torch.Generator().manual_seed(0)

    def prompts() -> mu.Prompts:
        tokens = torch.randint(VOCABULARY, (64, 24), generator=generator)
        return mu.Prompts.of(tokens, torch.randint(VOCABULARY, (64,), generator=generator))

    text = as_prompts(torch.randint(VOCABULARY, (8, 64), generator=generator))
    made = {"forget": (prompts(), 64), "retain": (prompts(), 64), "text": (text, 8)}
    return [Term(name, chosen, cross_entropy, 1.0, size) for name, (chosen, size) in made.items()]


def train(model: object, mask: mu.ComponentMask, steps: int) -> float:
    """CPU seconds of `steps` steps; the weights are put back."""
    entries = select(model, mask)
    before = read(entries)
    with preserved(model):
        started = time.process_time()
        fit(model, entries, terms(), steps=steps, learning_rate=1e-5, progress=False)
        seconds = time.process_time() - started
    write(entries, before)
    return seconds


def peak(model: object, mask: mu.ComponentMask) -> int:
    """Bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train(model, mask, 2)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


if __name__ == "__main__":
    main()
