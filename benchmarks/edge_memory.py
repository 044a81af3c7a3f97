"""Peak extra memory of edge attribution patching at the shape of GPT-2 small, 32 pairs of 20 tokens.

    python benchmarks/edge_memory.py

A fresh process: EAP of one pair warms up; then the process's resident memory, read every millisecond by a thread
during the call, less what it was before. Freed memory is handed back to the system first (glibc's malloc_trim).
"""

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from random_gpt2 import bridge, pairs

import mechunlearn as mu

BATCH_SIZES = (None, 2, 4, 32)
PAGE = 4096


def main() -> None:
    torch.set_num_threads(1)
    model, prompts = bridge(12, 768, 12), pairs(32, 20)
    mu.localize.edge_attribution_patching(model, prompts[:1])
    print(f"TransformerLens {version('transformer_lens')}, 32 pairs of 20 tokens")
    for size in BATCH_SIZES:
        extra = peak(lambda size=size: mu.localize.edge_attribution_patching(model, prompts, batch_size=size))
        print(f"  batch_size={size}: {extra / 1e6:.1f} MB extra")


def peak(run: Callable[[], object]) -> int:
    """Bytes of resident memory above what was there, at most, while it runs."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, highest, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, _resident())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return highest - before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


if __name__ == "__main__":
    main()
