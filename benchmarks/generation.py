"""Greedy generation of SmolLM2: keys and values kept, whole rows in each forward, and Hugging Face's `generate`.

    python benchmarks/generation.py          (2, 4, 8 and 32 new tokens)
    python benchmarks/generation.py 16

16 prompts of 22 and 23 tokens in one batch, float32, one thread, a process for each contender: CPU seconds, medians of
three alternating runs after a warm-up; one run for more than 8 tokens. Inside a hook, which here changes nothing, whole
rows are read. The last line says for how many prompts all three give the same text.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version

import torch
from contenders import Prepare, medians, table

import mechunlearn as mu

KEPT, WHOLE, THEIRS = "keys and values kept", "whole rows", "Hugging Face generate"
COUNTRIES = """
France Japan Kenya Brazil Canada Egypt Norway Peru Spain Turkey India Cuba Chile Ghana Poland Mexico
"""
SUBJECTS = ("the history of its capital", "its rivers and mountains", "the food that people eat")
TEXTS = [
    f"I have read a book about {country}. It tells a lot about {SUBJECTS[i % 3]}, and it says that"
    for i, country in enumerate(COUNTRIES.split())
]


def main() -> None:
    torch.set_num_threads(1)
    print(f"TransformerLens {version('transformer_lens')}, transformers {version('transformers')}", flush=True)
    for n_tokens in [int(given) for given in sys.argv[1:]] or (2, 4, 8, 32):
        contenders: dict[str, Prepare] = {
            KEPT: partial(ours, n_tokens, hooked=False),
            WHOLE: partial(ours, n_tokens, hooked=True),
            THEIRS: partial(theirs, n_tokens),
        }
        found = medians(contenders, rounds=3 if n_tokens <= 8 else 1)
        print(f"\n{n_tokens} new tokens\n{table(found, {KEPT: WHOLE, THEIRS: WHOLE})}", flush=True)
    said = [
        prepare()() for prepare in (partial(ours, 8, hooked=False), partial(ours, 8, hooked=True), partial(theirs, 8))
    ]
    same = sum(kept == whole == their for kept, whole, their in zip(*said, strict=True))
    print(f"\n{same} of {len(TEXTS)} texts of 8 tokens are the same in all three")


def ours(n_tokens: int, *, hooked: bool) -> Callable[[], tuple[str, ...]]:
    model = mu.testbed.smollm2()
    prompts = mu.tasks.build(model, TEXTS, [" a"] * len(TEXTS))

    def run() -> tuple[str, ...]:
        with ExitStack() as stack:
            if hooked:
                stack.enter_context(model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: None)]))
            return mu.evaluate.continuations(model, prompts, n_tokens)

    return run


def theirs(n_tokens: int) -> Callable[[], tuple[str, ...]]:
    model, tokenizer = mu.testbed.smollm2_huggingface()
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")

    def run() -> tuple[str, ...]:
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return tuple(tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return run


if __name__ == "__main__":
    main()
