"""The pictures of docs/methods: what each method finds in SmolLM2, from scores in docs/pictures/smollm2.

    python examples/method_pictures.py             # draws them again, in a browser
    python examples/method_pictures.py --measure   # measures first what is not there yet, in twenty minutes on one core

The scores of heads and MLPs are those of `benchmarks/real_agreement.py`, of the same sixteen capitals. `report.json` is
that of `make real`.
"""

import argparse
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pictures import write_pngs
from plotly.graph_objects import Figure

import mechunlearn as mu
from mechunlearn import localize
from mechunlearn.components import dressed, looks
from mechunlearn.metrics import answer_log_probability

FOLDER = Path(__file__).parent.parent / "docs" / "pictures" / "smollm2"
METRIC: dict[str, Any] = {"metric": answer_log_probability}
SCORES = {
    "activation_patching": "exact-log_probability",
    "attribution_patching": "attribution-log_probability",
    "atp_star": "atp_star-log_probability",
    "relp": "relp-log_probability",
    "integrated_gradients": "integrated-log_probability",
    "path_patching": "path_patching",
    "saliency": "snip",
}
"""Page -> the file of the scores of heads and MLPs that it shows."""
EDGES = 150
"""How many of the strongest edges are kept and drawn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure what is not there yet")
    if parser.parse_args().measure:
        torch.set_num_threads(1)
        measure()
    figures = {page: mu.ComponentScores.load(FOLDER / f"{name}.safetensors").plot() for page, name in SCORES.items()}
    figures |= {page: kind.load(FOLDER / f"{page}.safetensors").plot() for page, (kind, _) in MEASURED.items()}
    figures["agreement"] = agreement()
    figures["report"] = mu.evaluate.Report.load(FOLDER / "report.json").plot()
    problem = write_pngs({FOLDER / f"{page}.png": figure for page, figure in figures.items()})
    print(problem or f"Saved {len(figures)} pictures in {FOLDER}.")


def measure() -> None:
    for page, (_, method) in MEASURED.items():
        path, started = FOLDER / f"{page}.safetensors", time.process_time()
        if not path.exists():
            method().save(path)
            print(f"{page}: {time.process_time() - started:.0f} CPU s", flush=True)


@cache
def known(relation: str) -> tuple[Any, mu.Task]:
    """SmolLM2, and the facts that it knows."""
    model = mu.testbed.smollm2()
    return model, mu.tasks.known_facts(model, relation=relation, forget=16, formats=["two-shot question"])


def trace() -> localize.CausalTrace:
    model, task = known("capital")
    return localize.causal_tracing(model, task.forget[:6], draws=3, kinds=("MLP", "residual"))


def lens() -> localize.LogitLens:
    model, task = known("capital")
    return localize.logit_lens(model, task.forget)


def direct() -> mu.ComponentScores:
    """Of the answers of one token, the only ones that it splits up."""
    model, task = known("capital")
    short = (task.forget.answer_mask.sum(1) == 1).nonzero().flatten()
    return localize.direct_logit_attribution(model, task.forget[short])


def readable() -> localize.ProbeResult:
    """Continents, by the residual stream at the last token of the country: classes must recur."""
    model, task = known("continent")
    return localize.probes(model, mu.tasks.joined(task.forget, task.retain), seeds=2)


def lookup() -> localize.FactLookup:
    model, task = known("capital")
    ranked = sorted(integrated().items(), key=lambda item: -abs(item[1]))
    heads = [part for part, _ in ranked if part.kind == ("H", None) and part.layer > 0][:5]
    return localize.fact_lookup_by_paths(model, task.forget[:8], extraction_heads=heads, **METRIC)


def edges(method: Callable[..., mu.EdgeScores], **options: Any) -> Callable[[], mu.EdgeScores]:
    """The strongest of all edges."""

    def strongest() -> mu.EdgeScores:
        model, task = known("capital")
        found = method(model, task.forget[:8], per_prompt=False, **METRIC, **options)
        kept = {edge: found[edge] for edge in found.top(k=EDGES)}
        about = {"method": found.method, "metric": found.metric, "settings": found.settings}
        return mu.EdgeScores.of(kept, found.shape, **about)

    return strongest


def exact_edges() -> mu.EdgeScores:
    """Of the forty strongest by integrated gradients."""
    model, task = known("capital")
    found = mu.EdgeScores.load(FOLDER / "edge_integrated_gradients.safetensors")
    return localize.edge_patching(model, task.forget[:8], edges=found.top(k=40), **METRIC)


def contrasted() -> mu.ComponentScores:
    """Capitals less languages."""
    model, task = known("language")
    return localize.contrast(integrated(), localize.integrated_gradients(model, task.forget, **METRIC))


def circuits() -> localize.Faithfulness:
    model, task = known("capital")
    rankings = {"exact": exact(), "attribution": attributed(), "integrated gradients": integrated()}
    return localize.faithfulness(model, task.forget, rankings, random_circuits=3, **METRIC)


def scores_of(page: str) -> Callable[[], mu.ComponentScores]:
    return lambda: mu.ComponentScores.load(FOLDER / f"{SCORES[page]}.safetensors")


exact, attributed, integrated = map(scores_of, ("activation_patching", "attribution_patching", "integrated_gradients"))

MEASURED: dict[str, tuple[Any, Callable[[], Any]]] = {
    "logit_lens": (localize.LogitLens, lens),
    "direct_logit_attribution": (mu.ComponentScores, direct),
    "causal_tracing": (localize.CausalTrace, trace),
    "fact_lookup": (localize.FactLookup, lookup),
    "edge_attribution_patching": (mu.EdgeScores, edges(localize.edge_attribution_patching)),
    "edge_integrated_gradients": (mu.EdgeScores, edges(localize.edge_integrated_gradients)),
    "edge_patching": (mu.EdgeScores, exact_edges),
    "contrast": (mu.ComponentScores, contrasted),
    "probes": (localize.ProbeResult, readable),
    "faithfulness": (localize.Faithfulness, circuits),
}
"""Page -> the class of what it shows, and how that is measured."""


def agreement() -> Figure:
    """Estimates over exact effects, a point for each head and MLP."""
    true, figure = exact(), Figure()
    ends = [min(true.values()), max(true.values())]
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"dash": "dot", "color": "black"}, name="equal")
    rankings = {"attribution patching": attributed(), "RelP": scores_of("relp")(), "integrated gradients": integrated()}
    for (name, estimate), look in zip(rankings.items(), looks(rankings).values(), strict=True):
        marker = {"color": look.color, "symbol": look.symbol, "size": 8, "opacity": 0.7}
        large = 0.15 * max(map(abs, ends)) if name == "integrated gradients" else float("inf")
        labels = [str(part) if abs(value) > large else "" for part, value in true.items()]
        values = [estimate[part] for part in true]
        points = {"mode": "markers+text", "text": labels, "textposition": "top center"}
        figure.add_scatter(x=list(true.values()), y=values, name=name, marker=marker, **points)
    figure.update_xaxes(title="exact effect, nats").update_yaxes(title="estimate, nats")
    return dressed(figure, title="estimates and exact effects, heads and MLPs of SmolLM2", width=800)


if __name__ == "__main__":
    main()
