"""What localizations give in bfloat16, and exact ones with `compute_dtype=torch.float32`, on the shipped model.

    python benchmarks/half_precision.py

The reference has the same rounded weights in float32. 8 prompts to forget, for edges 4 of them and 512 edges: every
fourth or so of all from the smallest quarter on, by the estimate in float32. "Zeros" are scores that are exactly 0 and
are not in float32; errors are shares of the largest score. Times are CPU seconds of one call, on one thread, all in
this process. Prints Markdown.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import mechunlearn as mu
from mechunlearn import localize
from mechunlearn.localize import subject_last

N_PROMPTS, N_EDGE_PROMPTS, N_EDGES = 8, 4, 512

Method = Callable[..., Tensor]
"""(model, **options) -> scores, flat."""


def main() -> None:
    torch.set_num_threads(1)
    half = mu.testbed.load().to(torch.bfloat16)
    whole = mu.testbed.load().to(torch.bfloat16).to(torch.float32)
    task = mu.tasks.sports_facts(whole, forget="basketball")
    prompts = task.forget[:N_PROMPTS]
    edges = small_edges(whole, prompts[:N_EDGE_PROMPTS])
    exact = exact_methods(prompts, prompts[:N_EDGE_PROMPTS], edges)
    print(
        "| exact | Spearman | zeros | largest error | in float32: Spearman | zeros | largest error "
        "| CPU s, bfloat16 | in float32 | float32 model |\n" + "|---" * 10 + "|"
    )
    for name, method in exact.items():
        print(exact_row(name, method, half, whole), flush=True)
    print("\n| other | Spearman | zeros | largest error |\n|---|---|---|---|")
    for name, method in estimates(prompts, prompts[:N_EDGE_PROMPTS], edges).items():
        print(f"| {name} | {' | '.join(compared(method(half), method(whole)))} |", flush=True)


def small_edges(model: Any, prompts: mu.Prompts) -> list[Any]:
    found = localize.edge_attribution_patching(model, prompts)
    by_size = sorted(found, key=lambda edge: abs(found[edge]))
    return by_size[len(by_size) // 4 :: max(1, len(by_size) // (2 * N_EDGES))][:N_EDGES]


def exact_methods(prompts: mu.Prompts, few: mu.Prompts, edges: list[Any]) -> dict[str, Callable[..., Any]]:
    def sets(model: Any, **options: Any) -> Any:
        names = [f"L{layer}{part}" for layer in range(mu.shape(model).n_layers) for part in ("ATTN", "MLP")]
        return localize.set_patching(model, prompts, {name: [name] for name in names}, **options)

    def faithful(model: Any, **options: Any) -> Any:
        ranking = localize.random(model, seed=0)
        return localize.faithfulness(model, prompts, ranking, random_circuits=1, **options)

    def faithful_edges(model: Any, **options: Any) -> Any:
        circuit = mu.EdgeMask.of(edges[::2], mu.shape(model))
        return localize.edge_faithfulness(model, few, circuit, random_circuits=1, **options)

    by_position = partial(localize.activation_patching, prompts=prompts, where=subject_last)
    return {
        "`activation_patching`": partial(localize.activation_patching, prompts=prompts),
        "the same at the subject's last token": by_position,
        "`set_patching`, of layers": sets,
        "`path_patching` to the logits": partial(localize.path_patching, prompts=prompts),
        "`path_patching` to the last MLP": partial(path_to_last_mlp, prompts=prompts),
        f"`edge_patching`, {N_EDGES} small edges": partial(localize.edge_patching, prompts=few, edges=edges),
        "`causal_tracing`": partial(localize.causal_tracing, prompts=few, draws=2),
        "`faithfulness`": faithful,
        "`edge_faithfulness`": faithful_edges,
    }


def path_to_last_mlp(model: Any, prompts: mu.Prompts, **options: Any) -> Any:
    return localize.path_patching(model, prompts, receivers=[f"L{mu.shape(model).n_layers - 1}MLP"], **options)


def estimates(prompts: mu.Prompts, few: mu.Prompts, edges: list[Any]) -> dict[str, Method]:
    def of(method: Callable[..., Any], given: mu.Prompts = prompts, **options: Any) -> Method:
        return lambda model: numbers(method(model, given, **options))

    names = ("attribution_patching", "atp_star", "relp", "integrated_gradients", "integrated_gradients_of_activations")
    names = (*names, "direct_logit_attribution", "gradient_times_weight", "snip", "fisher")
    found: dict[str, Method] = {f"`{name}`": of(getattr(localize, name)) for name in names}
    found["`logit_lens`"] = partial(lens, prompts=prompts)
    for name in ("edge_attribution_patching", "edge_integrated_gradients", "edge_clean_corrupted"):
        found[f"`{name}`, the same edges"] = of(getattr(localize, name), few, edges=edges)
    return found


def lens(model: Any, prompts: mu.Prompts) -> Tensor:
    differences = localize.logit_lens(model, prompts).logit_difference
    assert differences is not None  # there are candidates
    return differences.mean(0)


def exact_row(name: str, method: Callable[..., Any], half: Any, whole: Any) -> str:
    reference, of_whole = timed(lambda: method(whole))
    rough, of_half = timed(lambda: method(half))
    precise, of_both = timed(lambda: method(half, compute_dtype=torch.float32))
    cells = [*compared(numbers(rough), numbers(reference)), *compared(numbers(precise), numbers(reference))]
    times = [f"{of_half:.1f}", f"{of_both:.1f} ({of_both / of_half:.1f} x)", f"{of_whole:.1f}"]
    return f"| {name} | {' | '.join([*cells, *times])} |"


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    return call(), time.process_time() - started


def numbers(result: Any) -> Tensor:
    """What is ranked: scores, effects, or the metric of circuits."""
    if isinstance(result, localize.Faithfulness):
        return torch.cat([result.alone.mean(0), result.without.mean(0)])
    if isinstance(result, localize.CausalTrace):
        return result.by_role.nanmean(0).flatten().nan_to_num()
    return result.values_in_order if isinstance(result, mu.EdgeScores) else result.tensor


def compared(values: Tensor, reference: Tensor) -> list[str]:
    values, reference = values.double(), reference.double()
    correlation = pd.Series(values.numpy()).corr(pd.Series(reference.numpy()), method="spearman")
    zeros = float(((values == 0) & (reference != 0)).double().mean())
    error = float((values - reference).abs().max() / reference.abs().max())
    return [f"{correlation:.3f}", f"{zeros:.1%}", f"{error:.1e}"]


if __name__ == "__main__":
    main()
