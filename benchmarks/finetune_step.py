"""One finetune step with a mask of MLPs in the first quarter of the layers, against training everything.

    python benchmarks/finetune_step.py

Time: medians of alternating runs in one process, one thread. Peak extra memory: the largest sum of
live allocations during the step above what lived before it (gradients, optimizer state, activations;
float32 weights that are trained whole are their own masters), from the profiler's allocation events.
"""

import statistics
import time
from typing import Any

import torch
from attribution import VOCABULARY, models
from torch.profiler import ProfilerActivity, profile

import mechunlearn as mu
from mechunlearn.losses import cross_entropy
from mechunlearn.model import preserved
from mechunlearn.tasks import as_prompts
from mechunlearn.training import Term, fit
from mechunlearn.weights import read, select, write

ROUNDS = 5
MICRO_BATCHES = (4, 64)
"""Of the 64 prompts of a term; the paper's micro-batches have 4."""


def main() -> None:
    torch.set_num_threads(1)
    model, _ = models()
    shape = mu.shape(model)
    quarter = [f"L{layer}MLP" for layer in range(shape.n_layers // 4)]
    masks = {
        "MLPs of layers 0-2 of 12": mu.ComponentMask.of(quarter, shape),
        "MLPs of layers 1-2 of 12": mu.ComponentMask.of(quarter[1:], shape),
        "everything": mu.localize.everything(model),
    }
    for micro in MICRO_BATCHES:
        times = {name: [] for name in masks}
        for round_ in range(ROUNDS + 1):
            for name, mask in masks.items():
                seconds = Step(model, mask, micro).seconds()
                if round_:  # the first round warms up
                    times[name].append(seconds)
        memory = {name: Step(model, mask, micro).peak() for name, mask in masks.items()}
        base = statistics.median(times["everything"]), memory["everything"]
        print(f"micro-batches of {micro}:")
        for name in masks:
            seconds = statistics.median(times[name])
            print(
                f"  {name:26} {seconds:6.3f} CPU s/step  {seconds / base[0]:5.2f} x   "
                f"{memory[name] / 2**20:7.1f} MiB extra  {memory[name] / base[1]:5.2f} x"
            )


class Step:
    """One optimizer step on a mask; the weights are put back."""

    def __init__(self, model: Any, mask: mu.ComponentMask, micro_batch_size: int) -> None:
        self.model, self.entries, self.micro = model, select(model, mask), micro_batch_size
        self.before, self.terms = read(self.entries), terms()

    def run(self) -> None:
        with preserved(self.model):
            options = {"steps": 1, "learning_rate": 1e-5, "micro_batch_size": self.micro, "progress": False}
            fit(self.model, self.entries, self.terms, **options)

    def seconds(self) -> float:
        started = time.process_time()
        self.run()
        seconds = time.process_time() - started
        write(self.entries, self.before)
        return seconds

    def peak(self) -> int:
        """Largest sum of live allocations during the step, in bytes."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self.run()
        write(self.entries, self.before)
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            highest = max(highest, live)
        return highest


def terms() -> list[Term]:
    """64 forget and 64 retain prompts of 24 tokens and 8 text rows of 64: the proportions of the paper's step."""
    generator = torch.Generator().manual_seed(0)

    def prompts() -> mu.Prompts:
        tokens = torch.randint(VOCABULARY, (64, 24), generator=generator)
        return mu.Prompts.of(tokens, torch.randint(VOCABULARY, (64,), generator=generator))

    text = as_prompts(torch.randint(VOCABULARY, (8, 64), generator=generator))
    made = {"forget": (prompts(), 64), "retain": (prompts(), 64), "text": (text, 8)}
    return [Term(name, chosen, cross_entropy, 1.0, size) for name, (chosen, size) in made.items()]


if __name__ == "__main__":
    main()
