"""Every localization that gives scores or a mask, and those whose place is edited."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mechunlearn as mu

Found = mu.ComponentScores | mu.ComponentMask


def causal_tracing(model: Any, task: mu.Task) -> mu.ComponentScores:
    """MLPs, and each head with the score of its attention layer; windows of 3 of the 10 layers."""
    prompts = task.forget[:8]
    trace = mu.localize.causal_tracing(model, prompts, draws=3, window=3, kinds=("MLP", "ATTN"))
    by_kind = {kind: trace.scores(kind) for kind in ("MLP", "ATTN")}
    members = mu.components.heads_and_mlps(mu.shape(model))
    values = {c: by_kind["MLP" if c.part == "MLP" else "ATTN"][_layer(c)] for c in members}
    return mu.ComponentScores.of(values, mu.shape(model), method="causal_tracing", metric=trace.metric)


def fact_lookup_by_probes(model: Any, task: mu.Task) -> mu.ComponentMask:
    """Of the three sports."""
    prompts = mu.tasks.joined(task.forget, task.retain)
    return mu.localize.fact_lookup_by_probes(model, prompts, text=task.text[:16], seeds=1).mask


def fact_lookup_by_paths(model: Any, task: mu.Task) -> mu.ComponentMask:
    return mu.localize.fact_lookup_by_paths(model, task.forget[:16]).mask


def beside_the_twin(model: Any, task: mu.Task, *, twin: Any) -> mu.ComponentScores:
    """Exact patching, less what it finds in a model that never knew: what few have."""
    return mu.localize.contrast(
        mu.localize.activation_patching(model, task.forget), mu.localize.activation_patching(twin, task.forget)
    )


def _of_forget(method: Callable[..., Any], model: Any, task: mu.Task) -> Found:
    return method(model, task.forget)


def methods(seed: int, twin: Any) -> dict[str, Callable[[Any, mu.Task], Found]]:
    """Name -> (model, task) -> scores or mask."""
    by_prompts = {
        "attribution patching": mu.localize.attribution_patching,
        "attribution patching, denoising": partial(mu.localize.attribution_patching, direction="denoising"),
        "AtP*": mu.localize.atp_star,
        "RelP": mu.localize.relp,
        "integrated gradients": mu.localize.integrated_gradients,
        "activation patching": mu.localize.activation_patching,
        "direct logit attribution": mu.localize.direct_logit_attribution,
        "gradient times weight": mu.localize.gradient_times_weight,
        "Fisher": mu.localize.fisher,
        "SNIP": mu.localize.snip,
    }
    return {
        **{name: partial(_of_forget, method) for name, method in by_prompts.items()},
        "WAGLE": lambda model, task: mu.localize.wagle(model, task.forget, task.retain),
        "causal tracing": causal_tracing,
        "fact lookup by probes": fact_lookup_by_probes,
        "fact lookup by paths": fact_lookup_by_paths,
        "activation patching, less the twin's": partial(beside_the_twin, twin=twin),
        "random": lambda model, task: mu.localize.random(model, seed=seed),
    }


EDITED = ("attribution patching", "causal tracing", "direct logit attribution")
"""Localizations whose place is edited, besides the truth and a random place of equal size."""


def _layer(component: mu.Component) -> mu.Component:
    return component if component.part == "MLP" else mu.Component(component.layer, "ATTN")
