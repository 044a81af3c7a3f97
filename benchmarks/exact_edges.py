"""All exact edge effects against a full forward for each edge: EAP-IG's way, and a plain one.

    python benchmarks/exact_edges.py

EAP-IG's way needs TransformerLens 3.9 (a HookedTransformer); under TransformerLens 4 it is left out. A process per
contender, alternating, CPU seconds. One call of `edge_patching` covers all 3,628 edges; the others are timed on some
edges and extrapolated linearly, as every edge costs them the same.
"""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from contenders import Prepare, medians, table
from random_gpt2 import bridge, hooked, pairs
from torch import Tensor

import mechunlearn as mu
from mechunlearn.metrics import logit_difference
from mechunlearn.model import logits_at

ROUNDS = 3
SAMPLE = 12
"""Edges that the slow contenders are timed on, evenly spread."""
N_EDGES = 3628


def main() -> None:
    four = version("transformer_lens") >= "4"
    forwards = {"a full forward per edge": partial(plain_forwards, bridge)}
    own = {"edge_patching, TransformerBridge": partial(ours, bridge)}
    if not four:
        forwards["a full forward per edge, HookedTransformer"] = partial(plain_forwards, hooked)
        forwards["EAP-IG's way, HookedTransformer"] = eap_ig_way
        own["edge_patching, HookedTransformer"] = partial(ours, hooked)
    contenders: dict[str, Prepare] = {**own, **forwards}
    found = medians(contenders, rounds=ROUNDS)
    every = found | {name: found[name] * N_EDGES / SAMPLE for name in forwards}
    print(f"TransformerLens {version('transformer_lens')}, 8 pairs of 16 tokens, {N_EDGES} edges")
    for floor in forwards:
        print(table(every, dict.fromkeys(own, floor)))


def ours(model: Callable[[], Any]) -> Callable[[], object]:
    return partial(mu.localize.edge_patching, model(), pairs())


def plain_forwards(model: Callable[[], Any]) -> Callable[[], object]:
    """No patch at all, logits at the answers only: less than any method by one pass per edge can do."""
    built, prompts = model(), pairs()

    @torch.no_grad()
    def run() -> None:
        for _ in range(SAMPLE):
            logits_at(built, prompts.tokens, prompts.attention_mask, prompts.positions)

    return run


def eap_ig_way() -> Callable[[], object]:
    model, prompts = hooked(), pairs()
    model.cfg.use_split_qkv_input = model.cfg.use_attn_result = model.cfg.use_hook_mlp_in = True
    every = [(source, into) for into, (_, _, count) in enumerate(_destinations(model)) for source in range(count)]
    some = every[:: len(every) // SAMPLE][:SAMPLE]
    return lambda: [one_by_one(model, prompts, *edge) for edge in some]


@torch.no_grad()
def one_by_one(model: Any, prompts: mu.Prompts, source: int, into: int) -> Tensor:
    """One edge's effect: a corrupted pass fills the sources' differences, a clean one rebuilds every input of it."""
    cfg, destinations = model.cfg, _destinations(model)
    batch, places = prompts.tokens.shape
    difference = torch.zeros(batch, places, 1 + cfg.n_layers * (cfg.n_heads + 1), cfg.d_model)
    patched = torch.zeros(difference.shape[2], len(destinations))
    patched[source, into] = 1

    def collect(columns: slice, sign: int) -> Callable[..., None]:
        def hook_function(value: Tensor, hook: object) -> None:
            difference[:, :, columns] += sign * value.view(batch, places, -1, cfg.d_model)

        return hook_function

    def rebuild(column: int, units: int, count: int) -> Callable[..., Tensor]:
        def hook_function(value: Tensor, hook: object) -> Tensor:
            weights = patched[:count, column : column + units]
            change = torch.einsum("bpsd, sv -> bpvd", difference[:, :, :count], weights)
            return value + change.view(value.shape)

        return hook_function

    writers = _writers(model)
    model.run_with_hooks(prompts.corrupted().tokens, fwd_hooks=[(name, collect(at, 1)) for name, at in writers])
    rebuilding = [
        (name, rebuild(column, 1 if head is None else cfg.n_heads, count))
        for column, (name, head, count) in enumerate(destinations)
        if head in (None, 0)
    ]
    hooks = [*((name, collect(at, -1)) for name, at in writers), *rebuilding]
    logits = model.run_with_hooks(prompts.tokens, fwd_hooks=hooks)
    return logit_difference(logits[:, -1:], prompts)


def _writers(model: Any) -> list[tuple[str, slice]]:
    """Hook points of the sources, and their columns."""
    heads = model.cfg.n_heads
    found = [("blocks.0.hook_resid_pre", slice(0, 1))]
    for layer in range(model.cfg.n_layers):
        start = 1 + layer * (heads + 1)
        found.append((f"blocks.{layer}.attn.hook_result", slice(start, start + heads)))
        found.append((f"blocks.{layer}.hook_mlp_out", slice(start + heads, start + heads + 1)))
    return found


def _destinations(model: Any) -> list[tuple[str, int | None, int]]:
    """Hook point, head, and the number of sources before it."""
    cfg, found = model.cfg, []
    for layer in range(cfg.n_layers):
        count = 1 + layer * (cfg.n_heads + 1)
        for letter in "qkv":
            found += [(f"blocks.{layer}.hook_{letter}_input", head, count) for head in range(cfg.n_heads)]
        found.append((f"blocks.{layer}.hook_mlp_in", None, count + cfg.n_heads))
    return [*found, (f"blocks.{cfg.n_layers - 1}.hook_resid_post", None, 1 + cfg.n_layers * (cfg.n_heads + 1))]


if __name__ == "__main__":
    main()
