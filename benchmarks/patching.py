"""Exact patching of all heads and MLPs against one full forward for each site, on a 6-layer GPT-2.

    python benchmarks/patching.py

TransformerLens' `get_act_patch_attn_head_out_all_pos` patches heads only, so it is compared with ours on heads, both
with the two runs that they patch between. A process per contender, alternating, CPU seconds.
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
from mechunlearn.components import Components, heads, heads_and_mlps
from mechunlearn.metrics import logit_difference
from mechunlearn.model import logits_at, site

ROUNDS = 9


def main() -> None:
    contenders: dict[str, Prepare] = {}
    floors: dict[str, str] = {}
    classes = {"TransformerBridge": bridge}
    if version("transformer_lens") < "4":
        classes["HookedTransformer"] = hooked
    for name, model in classes.items():
        full, peer = f"{name}: a full forward per site", f"{name}: TransformerLens patching, heads"
        contenders[full] = partial(full_forwards, model)
        contenders[peer] = partial(transformer_lens, model)
        contenders[f"{name}: heads and MLPs"] = partial(ours, model, heads_and_mlps)
        contenders[f"{name}: heads"] = partial(ours, model, heads)
        floors |= {f"{name}: heads and MLPs": full, f"{name}: heads": peer}
    print(f"TransformerLens {version('transformer_lens')}, 8 pairs of 16 tokens, 48 heads and 6 MLPs")
    print(table(medians(contenders, rounds=ROUNDS), floors))


def ours(model: Callable[[], Any], components: Components) -> Callable[[], object]:
    return partial(mu.localize.activation_patching, model(), pairs(), components=components)


def full_forwards(model: Callable[[], Any]) -> Callable[[], object]:
    """One hooked forward for each head and MLP, the same 8 rows, logits at the answers only."""
    built, prompts = model(), pairs()
    sizes = mu.shape(built)

    @torch.no_grad()
    def run() -> list[Tensor]:
        names = list(dict.fromkeys(site(component, sizes) for component in heads_and_mlps(sizes)))
        with mu.model.recording(built, names) as corrupt:
            prompts.corrupted().logits(built)
        return [_patched(built, prompts, name, unit, corrupt[name]) for name, unit in _sites(sizes)]

    return run


def _sites(sizes: mu.components.ModelShape) -> list[tuple[str, int | None]]:
    return [(site(component, sizes), component.index) for component in heads_and_mlps(sizes)]


def _patched(model: Any, prompts: mu.Prompts, name: str, unit: int | None, source: Tensor) -> Tensor:
    def put(value: Tensor, hook: object) -> Tensor:
        if unit is None:
            return source
        patched = value.clone()
        patched[:, :, unit] = source[:, :, unit]
        return patched

    hooks = [(name, put)]
    logits = logits_at(model, prompts.tokens, prompts.attention_mask, prompts.positions, hooks=hooks)
    return logit_difference(logits, prompts)


def transformer_lens(model: Callable[[], Any]) -> Callable[[], object]:
    """Clean activations into the corrupt run, a forward of all positions' logits for each head."""
    from transformer_lens import patching

    built, prompts = model(), pairs()
    assert prompts.candidates is not None
    corrupt = prompts.corrupted().tokens

    def difference(logits: Tensor) -> Tensor:
        return logit_difference(logits[:, -1:], prompts).mean()

    @torch.no_grad()
    def run() -> object:
        _, cache = built.run_with_cache(prompts.tokens)
        return patching.get_act_patch_attn_head_out_all_pos(built, corrupt, cache, difference)

    return run


if __name__ == "__main__":
    main()
