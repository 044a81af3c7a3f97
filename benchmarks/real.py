"""What SmolLM2, a real pretrained model, takes: time and memory of loading, localizing, editing and asking.

    python benchmarks/real.py            float32
    python benchmarks/real.py bfloat16

One thread; CPU seconds and seconds of the clock of one run after a warm-up, and the most memory that the process has
held so far. The capitals are those that the model says, twelve of them to forget.
"""

import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import mechunlearn as mu

MLPS = ["L6MLP", "L7MLP", "L9MLP", "L12MLP", "L18MLP", "L20MLP", "L22MLP"]
"""18.6 million weights; the lowest layer decides what a step costs."""
HIGH = [f"L{layer}MLP" for layer in range(23, 30)]
"""As many weights, higher up."""


def main() -> None:
    torch.set_num_threads(1)
    dtype = getattr(torch, sys.argv[1] if len(sys.argv) > 1 else "float32")
    print(f"| operation, {str(dtype).removeprefix('torch.')} | CPU s | clock s | peak MiB |\n| --- | --- | --- | --- |")
    mu.testbed.smollm2(dtype=dtype)  # converts the file if it has to, and imports what loading needs
    model = measured("load from the cache", partial(mu.testbed.smollm2, dtype=dtype))
    build = partial(mu.tasks.known_facts, model, relation="capital", forget=12, formats=["chat", "reverse"])
    task = measured("`known_facts`, capitals, 3 formats", build)
    metric, twelve = mu.metrics.answer_log_probability, task.forget
    measured("forward, 12 prompts", lambda: mu.evaluate.measure(model, twelve, [metric]))
    options: dict[str, Any] = {"metric": metric}
    measured("attribution patching, 12 prompts", lambda: mu.localize.attribution_patching(model, twelve, **options))
    measured("integrated gradients, 12 prompts", lambda: mu.localize.integrated_gradients(model, twelve, **options))
    trace = partial(mu.localize.causal_tracing, model, draws=3, kinds=("MLP",))
    measured("causal tracing, MLPs, 3 draws, 4 prompts", lambda: trace(twelve[:4]))
    for name, parts in {"MLPs of layers 6-22": MLPS, "MLPs of layers 23-29": HIGH}.items():
        where = mu.ComponentMask.of(parts, mu.shape(model))
        edit = partial(mu.edit.finetune, model, task, where, batch_size=12, text_batch_size=4, progress=False)
        found = measured(f"`finetune`, 5 steps, 7 {name}", partial(edit, steps=5, learning_rate=1e-4))
    measured("text loss, all 102 rows of 64 tokens", lambda: mu.evaluate.text_loss(model, task))
    measured("text loss, 8 rows", lambda: mu.evaluate.text_loss(model, task, rows=8))
    tests = mu.evaluate.every_format(task, metric=mu.metrics.answer_probability, text_rows=8)
    measured("`compare`, one edit, 3 formats", lambda: mu.evaluate.compare(model, task, {"edit": found}, metrics=tests))


def measured(name: str, run: Callable[[], Any]) -> Any:
    clock, cpu = time.perf_counter(), time.process_time()
    result = run()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {name} | {cpu:.1f} | {clock:.1f} | {peak:,.0f} |", flush=True)
    return result


if __name__ == "__main__":
    main()
