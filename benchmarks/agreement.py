"""How well each localization agrees with exact activation patching on the shipped model, and what each costs.

    python benchmarks/agreement.py

Components: 32 prompts to forget, all heads and MLPs, against `activation_patching` (noising, logit difference). MLPs at
the subject's last token: the same prompts, `causal_tracing` against `activation_patching` there. Edges: 8 of these
prompts, all edges, against `edge_patching`.

CPU seconds, one thread; the median of three calls after a warm-up, or one call if that took more than 5 s. Agreement is
of sizes, whatever the sign, since `.top` ranks by size: Spearman's correlation, how many of the exact top are in the
method's top, and the score of what is largest in truth as a multiple of its exact score (in the metric's unit only).
In brackets 95 % intervals, percentile bootstrap over prompts (both sides resampled together). Prints Markdown.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

import mechunlearn as mu
from mechunlearn import localize
from mechunlearn.components import ComponentScores, EdgeScores
from mechunlearn.localize import mean_over, subject_last, zero
from mechunlearn.losses import log_one_minus_probability

N_PROMPTS, N_EDGE_PROMPTS = 32, 8
Scores: TypeAlias = ComponentScores | EdgeScores
Method: TypeAlias = Callable[[], Scores]


def main() -> None:
    torch.set_num_threads(1)
    model = mu.testbed.load()
    task = mu.tasks.sports_facts(model, forget="basketball")
    prompts, others = task.forget[:N_PROMPTS], task.forget[N_PROMPTS : 2 * N_PROMPTS]
    few = prompts[:N_EDGE_PROMPTS]
    _, forward = timed(lambda: prompts.logits(model))
    print(f"One forward of {N_PROMPTS} prompts: {forward:.3f} CPU s.\n")
    table(components(model, task, prompts, others), forward, top=10, draws=1000)
    print("\nMLPs at the subject's last token:\n")
    table(mlps_at_subject(model, prompts), forward, top=3, draws=1000)
    _, forward = timed(lambda: few.logits(model))
    print(f"\nOne forward of {N_EDGE_PROMPTS} prompts: {forward:.3f} CPU s.\n")
    table(edges(model, few), forward, top=100, draws=200)


def components(model: object, task: mu.Task, prompts: mu.Prompts, others: mu.Prompts) -> dict[str, Method]:
    """The first is what the others are compared to."""

    def on(method: Callable[..., ComponentScores], **options: object) -> Method:
        return partial(method, model, prompts, **options)

    exact = localize.activation_patching
    attribution = localize.attribution_patching
    return {
        "`activation_patching`, noising": on(exact),
        "the same, of 32 other prompts": partial(exact, model, others),
        "`activation_patching`, denoising": on(exact, direction="denoising"),
        "`activation_patching`, `zero`": on(exact, replacement=zero),
        "`activation_patching`, `mean_over`": on(exact, replacement=mean_over(task.retain[:N_PROMPTS])),
        "`attribution_patching`, noising": on(attribution),
        "`attribution_patching`, denoising": on(attribution, direction="denoising"),
        "`mean_absolute` of attribution": lambda: localize.mean_absolute(attribution(model, prompts)),
        "`atp_star`": on(localize.atp_star),
        "`relp`": on(localize.relp),
        "`integrated_gradients`, 5 steps": on(localize.integrated_gradients),
        "`integrated_gradients_of_activations`, 5 steps": on(localize.integrated_gradients_of_activations),
        "`path_patching` to the logits": on(localize.path_patching),
        "`direct_logit_attribution`": on(localize.direct_logit_attribution),
        "`gradient_times_weight`": on(localize.gradient_times_weight),
        "`gradient_times_weight`, loss -log(1 - p)": on(localize.gradient_times_weight, loss=log_one_minus_probability),
        "`fisher`": on(localize.fisher),
        "`snip`": on(localize.snip),
        "`snip`, loss -log(1 - p)": on(localize.snip, loss=log_one_minus_probability),
        "`wagle`": partial(localize.wagle, model, prompts, task.retain[:N_PROMPTS]),
        "`random`, seed 0": partial(localize.random, model, seed=0),
        "number of weights": lambda: by_weights(mu.shape(model)),
    }


def mlps_at_subject(model: object, prompts: mu.Prompts) -> dict[str, Method]:
    """The first is what the others are compared to."""

    def exact(**options: object) -> Method:
        chosen = {"components": mu.components.mlps, "where": subject_last, **options}
        return partial(localize.activation_patching, model, prompts, **chosen)

    def tracing(window: int) -> Method:
        return lambda: localize.causal_tracing(model, prompts, window=window, kinds=("MLP",)).scores("MLP")

    methods = {
        "`activation_patching`, noising": exact(),
        "`activation_patching`, denoising": exact(direction="denoising"),
    }
    return methods | {f"`causal_tracing`, window {window}": tracing(window) for window in (1, 3, 10)}


def edges(model: object, prompts: mu.Prompts) -> dict[str, Method]:
    """The first is what the others are compared to."""

    def on(method: Callable[..., EdgeScores], **options: object) -> Method:
        return partial(method, model, prompts, batch_size=N_EDGE_PROMPTS, **options)

    return {
        "`edge_patching`": partial(localize.edge_patching, model, prompts),
        "`edge_attribution_patching`, noising": on(localize.edge_attribution_patching),
        "`edge_attribution_patching`, denoising": on(localize.edge_attribution_patching, direction="denoising"),
        "`edge_clean_corrupted`": on(localize.edge_clean_corrupted),
        "`edge_integrated_gradients`, 5 steps": on(localize.edge_integrated_gradients),
        "`edge_integrated_gradients_of_activations`, 5 steps": on(localize.edge_integrated_gradients_of_activations),
    }


def by_weights(shape: mu.ModelShape) -> ComponentScores:
    """A ranking that knows nothing but that MLPs are larger than heads; the first layers first."""
    sizes = {str(c): shape.n_parameters([c]) - 1e-3 * c.layer for c in mu.components.heads_and_mlps(shape)}
    return ComponentScores.of(sizes, shape)


def table(methods: Mapping[str, Method], forward: float, *, top: int, draws: int) -> None:
    exact: Scores | None = None
    for name, method in methods.items():
        scores, seconds = timed(method)
        cost = f"{seconds:.2f} | {seconds / forward:.0f}"
        if exact is None:
            exact = scores
            largest = max(exact, key=lambda one: abs(exact[one]))
            print(f"| method | CPU s | x one forward | Spearman | of the exact top {top} | {largest} / exact |")
            print(f"|---|---|---|---|---|---|\n| {name} | {cost} | *exact* | | {exact[largest]:.1f} nats |", flush=True)
        else:
            share = f"{scores[largest] / exact[largest]:.2f}" if scores.metric == exact.metric else ""
            print(f"| {name} | {cost} | {agreement(exact, scores, top, draws)} | {share} |", flush=True)


def timed(method: Callable[[], object]) -> tuple[object, float]:
    found, seconds = None, []
    for _ in range(4):
        started = time.process_time()
        found = method()
        seconds.append(time.process_time() - started)
        if seconds[0] > 5:
            return found, seconds[0]
    return found, statistics.median(seconds[1:])


def agreement(exact: Scores, scores: Scores, top: int, draws: int) -> str:
    left, right = per_prompt(exact), per_prompt(scores)
    rows = torch.randint(len(left), (draws, len(left)), generator=torch.Generator().manual_seed(0))
    resampled = [(left[row].mean(0).abs(), right[row if len(right) > 1 else [0]].mean(0).abs()) for row in rows]
    whole = left.mean(0).abs(), right.mean(0).abs()
    shown = []
    for measure, form in ((spearman, "{:.2f}"), (partial(shared, k=top), "{:.0f}")):
        drawn = torch.tensor([measure(*pair) for pair in resampled], dtype=torch.float64)
        low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        value, low, high = (form.format(x) for x in (measure(*whole), low, high))
        shown.append(f"{value} [{low}, {high}]")
    return " | ".join(shown)


def per_prompt(scores: Scores) -> Tensor:
    """One row per prompt; a single row where the method has no values per prompt."""
    if isinstance(scores, EdgeScores):
        return scores.per_prompt[:, scores.scored]
    return scores.tensor[None] if scores.per_prompt is None else scores.per_prompt


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return float(torch.corrcoef(ranks)[0, 1])


def shared(a: Tensor, b: Tensor, k: int) -> int:
    first, second = (set(torch.sort(x, descending=True, stable=True).indices[:k].tolist()) for x in (a, b))
    return len(first & second)


def _ranks(values: Tensor) -> Tensor:
    """Equal values share the mean of their ranks."""
    _, group, counts = values.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - counts + (counts - 1) / 2)[group]


if __name__ == "__main__":
    main()
