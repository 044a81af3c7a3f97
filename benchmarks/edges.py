"""EAP and EAP-IG over inputs against auto-circuit and TransformerLens, all edges of a 6-layer GPT-2.

    python benchmarks/edges.py

auto-circuit needs TransformerLens 3.9 (see `benchmarks` in pyproject.toml); TransformerLens 4 is needed for its own
`attribution_patch`: run it once in each environment. A process per contender, alternating, CPU seconds.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from types import ModuleType
from typing import Any

from contenders import Prepare, medians, table
from random_gpt2 import bridge, hooked, pairs

import mechunlearn as mu

ROUNDS = 7
STEPS = 5
EAP, EAP_IG = "EAP, TransformerBridge", "EAP-IG, 5 steps, TransformerBridge"


def main() -> None:
    four = version("transformer_lens") >= "4"
    contenders: dict[str, Prepare] = {EAP: partial(ours, bridge), EAP_IG: partial(ours, bridge, steps=STEPS)}
    if four:
        contenders["one pair: EAP"] = partial(ours, bridge, n=1)
        contenders["one pair: TransformerLens attribution_patch"] = transformer_lens
        floors = {"one pair: EAP": "one pair: TransformerLens attribution_patch"}
    else:
        contenders["EAP, HookedTransformer"] = partial(ours, hooked)
        contenders["EAP-IG, 5 steps, HookedTransformer"] = partial(ours, hooked, steps=STEPS)
        contenders["auto-circuit, mask gradient"] = auto_circuit
        contenders["auto-circuit, integrated gradients"] = partial(auto_circuit, steps=STEPS)
        floors = {name: "auto-circuit, mask gradient" for name in contenders if name.startswith("EAP,")}
        floors |= {name: "auto-circuit, integrated gradients" for name in contenders if name.startswith("EAP-IG")}
    print(f"TransformerLens {version('transformer_lens')}, 8 pairs of 16 tokens, 3,628 edges")
    print(table(medians(contenders, rounds=ROUNDS), floors))


def ours(model: Callable[[], Any], *, steps: int = 0, n: int = 8) -> Callable[[], object]:
    method = partial(mu.localize.edge_integrated_gradients, steps=steps)
    return partial(method if steps else mu.localize.edge_attribution_patching, model(), pairs(n), batch_size=8)


def auto_circuit(steps: int = 0) -> Callable[[], object]:
    """The mask's gradient at 0, or summed over `steps` + 1 values of the mask; every edge, all positions together."""
    at: dict[str, Any] = {"integrated_grad_samples": steps} if steps else {"mask_val": 0.0}
    return prune_scores(hooked(), pairs(), **at)


def prune_scores(model: Any, prompts: mu.Prompts, **at: Any) -> Callable[[], dict[str, Any]]:
    """auto-circuit's scores of all edges by the mask's gradient, in one batch; `model` is a `HookedTransformer`."""
    _with_its_cache_class()
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
    from auto_circuit.utils.graph_utils import patchable_model

    assert prompts.candidates is not None
    assert prompts.corrupt is not None
    for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        model.cfg.__dict__[flag] = True
    right, wrong = prompts.candidates[:, :1], prompts.candidates[:, 1:]
    data = PromptDataset(prompts.tokens, prompts.corrupt, list(right), list(wrong))
    loader = PromptDataLoader(data, seq_len=None, diverge_idx=0, batch_size=len(prompts))
    patchable = patchable_model(model, factorized=True, separate_qkv=True, slice_output="last_seq")
    return partial(mask_gradient_prune_scores, patchable, loader, None, "logit", "avg_diff", **at)


def _with_its_cache_class() -> None:
    """auto-circuit imports a class by the name that it had in TransformerLens 2."""
    import transformer_lens

    cache = transformer_lens.TransformerLensKeyValueCache
    old = ModuleType("transformer_lens.past_key_value_caching")
    old.__dict__["HookedTransformerKeyValueCache"] = cache
    sys.modules[old.__name__] = old
    transformer_lens.__dict__["HookedTransformerKeyValueCache"] = cache


def transformer_lens() -> Callable[[], object]:
    """One pair: it runs pairs one after the other, and its metric does not see which pair it is given."""
    from transformer_lens.tools.analysis import EdgeAttributionConfig, attribution_patch

    model, prompts = bridge(), pairs(1)
    assert prompts.candidates is not None
    right, wrong = prompts.candidates[0].tolist()
    config = EdgeAttributionConfig(granularity="edge")

    def difference(logits: Any) -> Any:
        return logits[0, -1, right] - logits[0, -1, wrong]

    return partial(attribution_patch, model, prompts.tokens, prompts.corrupt, difference, config)


if __name__ == "__main__":
    main()
