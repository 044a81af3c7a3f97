"""How well each localization agrees with exact patching on SmolLM2, by what is measured, and what each costs.

    python benchmarks/real_agreement.py            half an hour on one core, or what is left of it
    python benchmarks/real_agreement.py --table    the tables alone, from the scores that are there

Sixteen capitals that the model says; all heads and MLPs, resampled, noising. Eight of them and 200 of 70,651 edges:
the 100 that integrated gradients rank first, and 100 drawn from the others. CPU seconds of one call, one thread. What
is measured is kept in docs/pictures/smollm2, from where the tables and the pictures of the method pages are made.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from agreement import agreement, by_weights, per_prompt, shared, spearman
from jaxtyping import Float
from torch import Tensor

import mechunlearn as mu
from mechunlearn import localize
from mechunlearn.components import ComponentScores
from mechunlearn.localize import zero
from mechunlearn.metrics import answer_log_probability, answer_probability

FOLDER = Path(__file__).parent.parent / "docs" / "pictures" / "smollm2"
COSTS = FOLDER / "seconds.json"
SUBJECTS, TOP, DRAWS = 16, 10, 1000
FORWARD = "one forward"


def first_token_logit_difference(
    logits: Float[Tensor, "batch answer d_vocab"], prompts: mu.Prompts
) -> Float[Tensor, "batch"]:
    """Logit of the answer's first token minus the mean of the other candidates' first tokens."""
    assert prompts.candidates is not None
    chosen = logits[:, 0].gather(1, prompts.candidates)
    return chosen[:, 0] - chosen[:, 1:].mean(1)


def log_odds(logits: Float[Tensor, "batch answer d_vocab"], prompts: mu.Prompts) -> Float[Tensor, "batch"]:
    """log p / (1 - p) of the whole answer."""
    log_p = answer_log_probability(logits, prompts)
    return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))


METRICS = {
    "log probability": answer_log_probability,
    "logit difference": first_token_logit_difference,
    "log odds": log_odds,
    "probability": answer_probability,
}
"""What is measured. Whole answers, but for the logit difference, which is of first tokens."""
ESTIMATES = {
    "attribution": localize.attribution_patching,
    "atp_star": localize.atp_star,
    "relp": localize.relp,
    "integrated": localize.integrated_gradients,
}
EXACT = "exact"
EDGES = FOLDER / "edges.json"
N_EDGES, N_EDGE_PROMPTS, TOP_EDGES = 100, 8, 20
EDGE_ESTIMATES: dict[str, Callable[..., mu.EdgeScores]] = {
    "`edge_attribution_patching`, noising": localize.edge_attribution_patching,
    "`edge_attribution_patching`, denoising": partial(localize.edge_attribution_patching, direction="denoising"),
    "`edge_clean_corrupted`": localize.edge_clean_corrupted,
    "`edge_integrated_gradients`, 5 steps": localize.edge_integrated_gradients,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        measure()
        measure_edges()
    print(by_metric(), by_method(), by_edge_method(), sep="\n\n")


def measure() -> None:
    """Run every method whose scores are not there yet."""
    model = mu.testbed.smollm2()
    task = mu.tasks.known_facts(model, relation="capital", forget=SUBJECTS, formats=["chat"])
    FOLDER.mkdir(parents=True, exist_ok=True)
    seconds = json.loads(COSTS.read_text()) if COSTS.exists() else {}
    for _ in range(3):
        task.forget.logits(model)
    for name, method in methods(model, task).items():
        if name in seconds:
            continue
        started = time.process_time()
        scores = method()
        seconds[name] = round(time.process_time() - started, 3)
        if isinstance(scores, ComponentScores):
            scores.save(place(name))
        COSTS.write_text(json.dumps(seconds, indent=1) + "\n")
        print(f"{name}: {seconds[name]:.1f} CPU s", flush=True)


def methods(model: object, task: mu.Task) -> dict[str, Callable[[], object]]:
    """Name -> what is measured; the names of scores are those of their files."""
    prompts, others = task.forget, task.retain[:SUBJECTS]
    found: dict[str, Callable[[], object]] = {FORWARD: lambda: prompts.logits(model)}
    exact = localize.activation_patching
    for metric, function in METRICS.items():
        for name, estimate in {**ESTIMATES, EXACT: exact}.items():
            found[f"{name}, {metric}"] = partial(estimate, model, prompts, metric=function)
    on = partial(partial, metric=METRICS[CHOSEN])
    found["attribution, denoising"] = on(localize.attribution_patching, model, prompts, direction="denoising")
    found["path_patching"] = on(localize.path_patching, model, prompts)
    found["exact, other prompts"] = on(exact, model, others)
    found["exact, denoising"] = on(exact, model, prompts, direction="denoising")
    found["exact, zero"] = on(exact, model, prompts, replacement=zero)
    found["integrated, 20 steps"] = on(localize.integrated_gradients, model, prompts, steps=20)
    for name in ("gradient_times_weight", "fisher", "snip"):
        found[name] = partial(getattr(localize, name), model, prompts)
    found["wagle"] = partial(localize.wagle, model, prompts, others)
    found["random"] = partial(localize.random, model, seed=0)
    found["weights"] = lambda: by_weights(mu.shape(model))
    found["integrated over activations"] = on(localize.integrated_gradients_of_activations, model, prompts)
    return found


CHOSEN = "log probability"
"""The metric of the table of all methods."""
TITLES = {
    f"{EXACT}, {CHOSEN}": "`activation_patching`, noising",
    "exact, other prompts": f"the same, of {SUBJECTS} other prompts",
    "exact, denoising": "`activation_patching`, denoising",
    "exact, zero": "`activation_patching`, `zero`",
    f"attribution, {CHOSEN}": "`attribution_patching`, noising",
    "attribution, denoising": "`attribution_patching`, denoising",
    f"atp_star, {CHOSEN}": "`atp_star`",
    f"relp, {CHOSEN}": "`relp`",
    f"integrated, {CHOSEN}": "`integrated_gradients`, 5 steps",
    "integrated, 20 steps": "`integrated_gradients`, 20 steps",
    "integrated over activations": "`integrated_gradients_of_activations`, 5 steps",
    "path_patching": "`path_patching` to the logits",
    "gradient_times_weight": "`gradient_times_weight`",
    "fisher": "`fisher`",
    "snip": "`snip`",
    "wagle": "`wagle`",
    "random": "`random`, seed 0",
    "weights": "number of weights",
}
"""Scores -> how the table of all methods calls them, in its order."""


def measure_edges() -> None:
    """Exact patching of the edges that integrated gradients rank first and of as many others, and every estimate."""
    if EDGES.exists():
        return
    model = mu.testbed.smollm2()
    prompts = mu.tasks.known_facts(model, relation="capital", forget=SUBJECTS, formats=["chat"]).forget[:N_EDGE_PROMPTS]
    options: dict[str, Any] = {"metric": METRICS[CHOSEN]}
    prompts.logits(model)
    started = time.process_time()
    prompts.logits(model)
    found, seconds = {}, {FORWARD: time.process_time() - started}
    for name, method in EDGE_ESTIMATES.items():
        started = time.process_time()
        found[name] = method(model, prompts, per_prompt=False, **options)
        seconds[name] = time.process_time() - started
    first = [*found["`edge_integrated_gradients`, 5 steps"].top(k=N_EDGES)]
    others = random.Random(0).sample(
        [edge for edge in found[next(iter(found))].edges if edge not in set(first)], N_EDGES
    )
    started = time.process_time()
    found["`edge_patching`"] = localize.edge_patching(model, prompts, edges=[*first, *others], **options)
    seconds["`edge_patching`"] = time.process_time() - started
    values = {name: {str(edge): scores[edge] for edge in (*first, *others)} for name, scores in found.items()}
    EDGES.write_text(json.dumps({"seconds": seconds, "scores": values}) + "\n")


def by_edge_method() -> str:
    """Estimates of edges against exact patching, on the edges that were patched."""
    stored = json.loads(EDGES.read_text())
    exact, *estimates = sorted(stored["scores"], key=lambda name: name != "`edge_patching`")
    true = torch.tensor([*stored["scores"][exact].values()])
    largest = max(stored["scores"][exact].items(), key=lambda item: abs(item[1]))[0]
    title = f"| method | CPU s | x one forward | Spearman | of the exact top {TOP_EDGES} | {largest} / exact |"
    cost = {
        name: f"{spent:.1f} | {spent / stored['seconds'][FORWARD]:.0f}" for name, spent in stored["seconds"].items()
    }
    lines = [
        title,
        "|---" * 6 + "|",
        f"| {exact} | {cost[exact]} | *exact* | | {stored['scores'][exact][largest]:.1f} nats |",
    ]
    for name in estimates:
        values = torch.tensor([*stored["scores"][name].values()])
        found = f"{spearman(true.abs(), values.abs()):.2f} | {shared(true.abs(), values.abs(), TOP_EDGES)}"
        share = stored["scores"][name][largest] / stored["scores"][exact][largest]
        lines.append(f"| {name} | {cost[name]} | {found} | {share:.2f} |")
    return "\n".join(lines)


def place(name: str) -> Path:
    return FOLDER / f"{name.replace(', ', '-').replace(' ', '_')}.safetensors"


def stored(name: str) -> ComponentScores | None:
    return ComponentScores.load(place(name)) if place(name).exists() else None


def by_metric() -> str:
    """For each metric: how exact patching agrees with that by the other metrics, and the estimates with it.

    Spearman's correlation of sizes, how many of the exact top 10 are in their top, and for estimates the two
    largest components' scores as multiples of their exact ones.
    """
    titles = [f"exact by {name}" for name in METRICS] + list(ESTIMATES)
    lines = [f"| metric | {' | '.join(titles)} | largest, exact |", "|---" * (len(titles) + 2) + "|"]
    for metric in METRICS:
        if (exact := stored(f"{EXACT}, {metric}")) is None:
            continue
        cells = [_brief(exact, stored(f"{EXACT}, {other}")) for other in METRICS]
        cells += [_brief(exact, stored(f"{name}, {metric}"), share=True) for name in ESTIMATES]
        lines.append(f"| {metric} | {' | '.join(cells)} | {_largest(exact)} |")
    return "\n".join(lines)


def by_method() -> str:
    """Every method against exact patching, by the chosen metric."""
    seconds = json.loads(COSTS.read_text())
    exact = stored(f"{EXACT}, {CHOSEN}")
    assert exact is not None
    largest = max(exact, key=lambda one: abs(exact[one]))
    lines = [
        f"| method | CPU s | x one forward | Spearman | of the exact top {TOP} | {largest} / exact |",
        "|---" * 6 + "|",
    ]
    for name, title in TITLES.items():
        if (scores := exact if name == f"{EXACT}, {CHOSEN}" else stored(name)) is None:
            continue
        cost = f"{seconds[name]:.1f} | {seconds[name] / seconds[FORWARD]:.0f}"
        share = f"{scores[largest] / exact[largest]:.2f}" if scores.metric == exact.metric else ""
        share = f"{exact[largest]:.1f} nats" if scores is exact else share
        found = "*exact* | " if scores is exact else agreement(exact, scores, TOP, DRAWS)
        lines.append(f"| {title} | {cost} | {found} | {share} |")
    return "\n".join(lines)


def _brief(exact: ComponentScores, scores: ComponentScores | None, *, share: bool = False) -> str:
    if scores is None:
        return ""
    left, right = (per_prompt(one).mean(0).abs() for one in (exact, scores))
    largest = sorted(exact, key=lambda one: -abs(exact[one]))[:2]
    shares = ", " + " and ".join(f"{scores[one] / exact[one]:.2f}" for one in largest)
    return f"{spearman(left, right):.2f}, {shared(left, right, TOP)}{shares if share else ''}"


def _largest(scores: ComponentScores) -> str:
    ranked = sorted(scores.items(), key=lambda item: -abs(item[1]))[:4]
    return ", ".join(f"{component} {value:+.2f}" for component, value in ranked)


if __name__ == "__main__":
    main()
