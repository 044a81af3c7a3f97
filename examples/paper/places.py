"""The localizations, all of as many weights as fact lookup's but for "all mlps" and "nonlocalized"."""

from pathlib import Path
from typing import Any

import mechunlearn as mu
from mechunlearn.components import layers, mlps
from mechunlearn.metrics import Metric
from paper.facts import divided, is_sports, parts
from paper.setup import FOUND, Setup, load

Masks = dict[str, mu.ComponentMask]

PAPER_SLICES = {
    "counterfact-16": ("counterfact 0:16",),
    "counterfact-64": ("counterfact 0:64",),
    "counterfact-sequential": tuple(f"counterfact {start}:{start + 16}" for start in range(0, 64, 16)),
}


def masks_of(setup: Setup, out: Path, name: str, seed: int) -> list[Masks]:
    """For each part of the task (one, but for a sequence): localization -> mask. Scores are kept in files."""
    model, found = load(setup.model), []
    for place, part in enumerate(parts(setup, name)):
        folder = out / "masks" / name / f"part-{place + 1}"
        found.append(_with_controls(model, _kept(setup, folder, name, place, part), seed))
    return found


def localize(setup: Setup, out: Path, name: str) -> None:
    """Make the masks of a task that need computing, from its train prompts."""
    masks_of(setup, out, name, 0)


def _kept(setup: Setup, folder: Path, name: str, place: int, task: mu.Task) -> Masks:
    """From the folder; what is not there yet is computed."""
    names = [each for each in FOUND if not (folder / f"{each}.json").exists()]
    if names:
        folder.mkdir(parents=True, exist_ok=True)
        for each, mask in _computed(setup, folder, name, place, task).items():
            mask.save(folder / f"{each}.json")
    return {each: mu.ComponentMask.load(folder / f"{each}.json") for each in FOUND}


def _computed(setup: Setup, folder: Path, name: str, place: int, task: mu.Task) -> Masks:
    """Unit of attribution and tracing is, as in the paper, a whole attention layer or MLP."""
    model, prompts = load(setup.model), task.forget[: setup.traced]
    lookup = _fact_lookup(setup, folder, name, place, task)
    patching = mu.localize.attribution_patching(model, task.forget, metric=_metric(name), components=layers)
    trace = mu.localize.causal_tracing(model, prompts, window=1, draws=5, kinds=("MLP", "ATTN"))
    tracing = _of_both(trace)
    patching.save(folder / "attribution patching.safetensors")
    trace.save(folder / "causal tracing.safetensors")
    only = set(mlps(lookup.shape))
    return {
        "fact lookup": lookup,
        "attribution patching": matched(patching, lookup),
        "causal tracing": matched(tracing, lookup),
        "attribution patching mlps": matched(patching, lookup, only),
        "causal tracing mlps": matched(tracing, lookup, only),
    }


def matched(scores: mu.ComponentScores, like: mu.ComponentMask, only: set | None = None) -> mu.ComponentMask:
    """In order of |score|, every component that still fits into the number of weights of another mask."""
    kept = {component: score for component, score in scores.items() if only is None or component in only}
    about = {"method": scores.method, "metric": scores.metric, "settings": scores.settings}
    return mu.testbed.within(mu.ComponentScores.of(kept, like.shape, **about), like.n_parameters)


def _fact_lookup(setup: Setup, folder: Path, name: str, place: int, task: mu.Task) -> mu.ComponentMask:
    """The paper's layers for its models, yours if you gave some, else by probes (sports) or paths (CounterFact).

    As in the paper, the probes read all athletes' sports once, whoever of them is to be forgotten.
    """
    model = load(setup.model)
    if setup.layers:
        return mu.ComponentMask.of([f"L{layer}MLP" for layer in setup.layers], mu.shape(model))
    if setup.paper is not None:
        return mu.localize.paper_fact_lookup(model, setup.paper, task=PAPER_SLICES.get(name, ("sports",))[place])
    if is_sports(name):
        every = divided(setup, "sport").final
        several = mu.tasks.joined(every.forget, every.retain)
        found = mu.localize.fact_lookup_by_probes(model, several, text=every.text[:16])
    else:
        found = mu.localize.fact_lookup_by_paths(model, task.forget[: setup.traced], metric=_metric(name))
    found.save(folder / "fact lookup.safetensors")
    if not found.mask:
        raise ValueError(
            f"expected MLPs that look facts up, got none for {name}: read the curves in {folder}, --layers."
        )
    return found.mask


def _metric(name: str) -> Metric:
    """CounterFact answers may have several tokens."""
    return mu.metrics.logit_difference if is_sports(name) else mu.metrics.answer_log_probability


def _of_both(trace: mu.localize.CausalTrace) -> mu.ComponentScores:
    """MLPs and attention layers in one ranking: single layers, at the subject's last token."""
    both = {**trace.scores("MLP"), **trace.scores("ATTN")}
    return mu.ComponentScores.of(
        both, trace.shape, method="causal_tracing", metric=trace.metric, settings=trace.settings
    )


def _with_controls(model: Any, masks: Masks, seed: int) -> Masks:
    lookup = masks["fact lookup"]
    return masks | {
        "random": mu.localize.random_like(lookup, model, seed, pool=layers),
        "random mlps": mu.localize.random_like(lookup, model, seed),
        "all mlps": mu.localize.all_mlps(model),
        "nonlocalized": mu.localize.everything(model),
    }
