"""Causal tracing of every token, layer and kind against a full forward for each site, at equal batch.

    python benchmarks/tracing.py        (6 and 12 layers)
    python benchmarks/tracing.py 24

A forward per site: tokens times layers times three kinds, for every noisy copy of the prompts (4 prompts, 2 draws), 40
rows a pass as in ours, with logits at the answers only, timed on some passes and extrapolated linearly. Tokens before
the subject have no effect, and ours leaves them out: compared with a forward for the sites of all tokens (as
the authors' code runs) and for those from the subject on. CPU seconds, medians of alternating runs in one process.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from random_gpt2 import bridge, pairs

import mechunlearn as mu
from mechunlearn.model import logits_at

SAMPLE = 10
"""Passes that the floor is timed on."""
PROMPTS, POSITIONS, DRAWS, ROWS = 4, 16, 2, 40
MODELS = {6: (5, 5), 12: (10, 3), 24: (10, 1)}
"""Layers: window and rounds."""
SUBJECTS = {"first": slice(1, 4), "middle": slice(7, 10)}
"""Right after the first token, or in the middle."""


def main() -> None:
    torch.set_num_threads(1)
    print(f"TransformerLens {version('transformer_lens')}, {PROMPTS} prompts of {POSITIONS} tokens, {DRAWS} draws")
    for n_layers in [int(given) for given in sys.argv[1:]] or (6, 12):
        window, rounds = MODELS[n_layers]
        model = bridge(n_layers)
        runs = {place: partial(ours, model, window, subject) for place, subject in SUBJECTS.items()}
        found = alternating({"forward": partial(forwards, model), **runs}, rounds)
        for place, subject in SUBJECTS.items():
            for tokens, first in (("all tokens", 0), ("tokens from the subject on", subject.start)):
                passes = 3 * n_layers * (POSITIONS - first) * PROMPTS * DRAWS / ROWS
                floor = found["forward"] * passes / SAMPLE
                ratio = f"{found[place]:8.2f} CPU s, {found[place] / floor:.3f} of a forward per site of {tokens}"
                print(f"  {n_layers} layers, window {window}, subject {place}: {ratio}", flush=True)


def alternating(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Medians; the first of `runs` is run once before, to warm up."""
    next(iter(runs.values()))()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def ours(model: Any, window: int, subject: slice) -> object:
    prompts = pairs(PROMPTS, POSITIONS, subject=subject)
    return mu.localize.causal_tracing(model, prompts, draws=DRAWS, window=window, batch_size=ROWS)


@torch.no_grad()
def forwards(model: Any) -> None:
    """Nothing is restored: less than any method by one pass per site can do."""
    copies = pairs(ROWS, POSITIONS)
    for _ in range(SAMPLE):
        logits_at(model, copies.tokens, copies.attention_mask, copies.positions)


if __name__ == "__main__":
    main()
