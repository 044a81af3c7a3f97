"""Every localization once on a real pretrained model; the exact ones agree with plain hooks written here."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from state import left_as_it_was
from torch import Tensor

import mechunlearn as mu
from mechunlearn.metrics import answer_log_probability, logit_difference

pytestmark = pytest.mark.real

PARTS = ["L0MLP", "L7MLP", "L12H3", "L20MLP", "L23H4", "L23H5", "L23MLP", "L25ATTN", "L27MLP", "L29H1", "L29MLP"]
MLPS_AND_HEADS = [label for label in PARTS if "ATTN" not in label]
HEADS = ["L12H3", "L23H4", "L23H5", "L29H1"]
EDGES = ["L0MLP->L23H4.W_V", "L23H4->logits", "L7MLP->L20MLP", "L20MLP->L23H5.W_K", "L23MLP->logits", "embed->L0MLP"]


def of_parts(name: str, **options: Any) -> Callable[..., Any]:
    return lambda model, task: getattr(mu.localize, name)(model, task.forget[:2], components=PARTS, **options)


def of_edges(name: str, **options: Any) -> Callable[..., Any]:
    return lambda model, task: getattr(mu.localize, name)(model, task.forget[:2], edges=EDGES, **options)


def circuit(model: Any) -> mu.ComponentMask:
    return mu.ComponentMask.of(MLPS_AND_HEADS, mu.shape(model))


def probes(model: Any, task: mu.Task, **options: Any) -> Any:
    prompts = mu.tasks.joined(task.forget, task.retain)
    return mu.localize.probes(model, prompts, labels(prompts), seeds=1, folds=2, **options)


def labels(prompts: mu.Prompts) -> Tensor:
    return prompts.answers[:, 0] % 2


def lookup_by_probes(model: Any, task: mu.Task) -> Any:
    prompts = mu.tasks.joined(task.forget, task.retain)
    options: dict[str, Any] = {"seeds": 1, "folds": 2, "layers": [0, 6, 7]}
    return mu.localize.fact_lookup_by_probes(model, prompts, labels(prompts), text=task.text[:8], **options)


def lookup_by_paths(model: Any, task: mu.Task) -> Any:
    return mu.localize.fact_lookup_by_paths(model, task.forget[:2], extraction_heads=["L23H4", "L23H5"])


METHODS: dict[str, Callable[[Any, mu.Task], Any]] = {
    "activation_patching": of_parts("activation_patching"),
    "activation_patching_by_position": of_parts("activation_patching_by_position"),
    "atp_star": of_parts("atp_star"),
    "attribution_patching": of_parts("attribution_patching"),
    "causal_tracing": lambda m, t: mu.localize.causal_tracing(m, t.forget[:1], draws=1, kinds=("MLP",)),
    "direct_logit_attribution": lambda m, t: mu.localize.direct_logit_attribution(
        m, t.forget[:2], components=MLPS_AND_HEADS
    ),
    "edge_attribution_patching": of_edges("edge_attribution_patching"),
    "edge_clean_corrupted": of_edges("edge_clean_corrupted"),
    "edge_faithfulness": lambda m, t: mu.localize.edge_faithfulness(
        m, t.forget[:1], mu.components.EdgeMask.of(EDGES, mu.shape(m)), random_circuits=0
    ),
    "edge_integrated_gradients": of_edges("edge_integrated_gradients", steps=2),
    "edge_integrated_gradients_of_activations": of_edges("edge_integrated_gradients_of_activations", steps=1),
    "edge_patching": of_edges("edge_patching"),
    "fact_lookup_by_paths": lookup_by_paths,
    "fact_lookup_by_probes": lookup_by_probes,
    "faithfulness": lambda m, t: mu.localize.faithfulness(m, t.forget[:1], circuit(m), random_circuits=0),
    "fisher": of_parts("fisher"),
    "gradient_times_weight": of_parts("gradient_times_weight"),
    "incompleteness": lambda m, t: mu.localize.incompleteness(m, t.forget[:1], circuit(m), knockouts=1),
    "integrated_gradients": of_parts("integrated_gradients", steps=2),
    "integrated_gradients_of_activations": lambda m, t: mu.localize.integrated_gradients_of_activations(
        m, t.forget[:1], components=["L7MLP", "L23H4"], steps=1
    ),
    "logit_lens": lambda m, t: mu.localize.logit_lens(m, t.forget[:2], components=["L23ATTN"]),
    "path_effect": lambda m, t: mu.localize.path_effect(m, t.forget[:2], ["L7MLP"], ["L23H4"]),
    "path_patching": lambda m, t: mu.localize.path_patching(
        m, t.forget[:2], senders=MLPS_AND_HEADS, receivers="logits"
    ),
    "probes": probes,
    "relp": of_parts("relp"),
    "screen_then_verify": lambda m, t: mu.localize.screen_then_verify(m, t.forget[:2], components=PARTS, k=3),
    "set_patching": lambda m, t: mu.localize.set_patching(m, t.forget[:2], {"circuit": circuit(m)}),
    "snip": of_parts("snip"),
    "wagle": lambda m, t: mu.localize.wagle(m, t.forget[:2], t.retain[:2], gamma=0.1, components=PARTS),
}
"""Every public localization, cut short: two prompts, some dozen components or edges."""
ELSEWHERE = {"all_mlps", "everything", "load_mib", "paper_fact_lookup", "random", "random_like", "resample", "save_mib"}
ELSEWHERE |= {"zero"}
"""They localize nothing, or whatever the weights are."""


def test_every_public_localization_is_run():
    public = {name: getattr(mu.localize, name) for name in mu.localize.__all__}
    asked = {n for n, f in public.items() if inspect.isfunction(f) and "model" in inspect.signature(f).parameters}
    assert asked - ELSEWHERE <= set(METHODS) <= set(public)


def numbers(result: Any) -> Tensor:
    """All numbers of a result, of whatever class."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, mu.localize.FactLookup):
        return torch.cat(
            [*(s.tensor for s in result.scores.values()), *(c.per_prompt.mean(0) for c in result.curves.values())]
        )
    names = ("tensor", "effects", "log_probability", "alone", "per_prompt", "circuit_without", "correct", "scores")
    [value, *_] = [getattr(result, name) for name in names if hasattr(result, name)]
    return value if isinstance(value, Tensor) else numbers(value)


SLOW = "edge_integrated_gradients_of_activations"
EVERY_METHOD = [pytest.param(n, marks=pytest.mark.nightly if n == SLOW else ()) for n in METHODS]


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_a_localization_runs_and_leaves_the_model_as_it_was(smol: Any, capitals: mu.Task, name: str):
    with left_as_it_was(smol):
        found = numbers(METHODS[name](smol, capitals))
    assert bool(torch.isfinite(found[~found.isnan()] if name == "edge_patching" else found).all())
    assert float(found.nan_to_num().abs().max()) > 0


PATCHED = {"H": "attn.hook_z", "MLP": "hook_mlp_out", "ATTN": "hook_attn_out"}


def by_hooks(model: Any, prompts: mu.Prompts, label: str) -> Tensor:
    """The effect on the logit difference of one component's output taken from the corrupted run, by plain hooks."""
    part = mu.Component.parse(label)
    name = f"blocks.{part.layer}.{PATCHED[part.part]}"
    corrupt = prompts.corrupted()
    with torch.no_grad():
        clean, other = values(model, prompts, name)[0], values(model, corrupt, name)[1]

        def patch(value: Tensor, hook: object) -> Tensor:
            value = value.clone()
            if part.part == "H":
                value[:, :, part.index] = other[:, :, part.index]
            else:
                value[:] = other
            return value

        with model.hooks(fwd_hooks=[(name, patch)]):
            return values(model, prompts, name)[0] - clean


def values(model: Any, prompts: mu.Prompts, name: str) -> tuple[Tensor, Tensor]:
    """The logit difference of each prompt, and what is at a hook point."""
    kept: list[Tensor] = []
    with model.hooks(fwd_hooks=[(name, lambda value, hook: kept.append(value.detach().clone()))]):
        logits = model(prompts.tokens, attention_mask=prompts.attention_mask.long())
    rows = torch.arange(len(prompts))
    return logit_difference(logits[rows, prompts.positions[:, 0]][:, None], prompts), kept[0]


def test_exact_patching_is_what_plain_hooks_do(smol: Any, capitals: mu.Task):
    prompts = capitals.forget[:2]
    scores = mu.localize.activation_patching(smol, prompts, components=PARTS)
    expected = torch.stack([by_hooks(smol, prompts, label) for label in PARTS], 1)
    torch.testing.assert_close(scores.per_prompt.float(), expected.float(), atol=2e-4, rtol=1e-3)
    assert float(expected.abs().max()) > 0.5


def test_sets_of_one_and_verified_scores_are_exact_ones(smol: Any, capitals: mu.Task):
    prompts = capitals.forget[:2]
    exact = mu.localize.activation_patching(smol, prompts, components=["L0MLP", "L23H4", "L29MLP"])
    sets = mu.localize.set_patching(smol, prompts, {str(c): [c] for c in exact.components})
    torch.testing.assert_close(sets.per_prompt.float(), exact.per_prompt.float(), atol=2e-4, rtol=1e-3)


def test_an_edge_to_the_logits_is_direct_in_plain_hooks(smol: Any, capitals: mu.Task):
    """From the last layer there is no other way: the edge's effect is that of the MLP itself."""
    prompts = capitals.forget[:2]
    edge = mu.localize.edge_patching(smol, prompts, edges=["L29MLP->logits"])
    expected = by_hooks(smol, prompts, "L29MLP")
    torch.testing.assert_close(edge.per_prompt[:, edge.scored][:, 0].float(), expected.float(), atol=2e-4, rtol=1e-3)


def test_the_heads_that_extract_capitals_are_found(smol: Any, capitals: mu.Task):
    """The claim of docs/models.md on more prompts: heads of layer 23, and the first MLP."""
    parts = mu.components.heads(mu.shape(smol))
    metric = answer_log_probability
    scores = mu.localize.integrated_gradients(smol, capitals.forget, components=parts, metric=metric, steps=3)
    assert {part.layer for part in scores.top(k=3)} & {23}


@pytest.mark.parametrize("metric", [logit_difference, answer_log_probability])
def test_bfloat16_gives_the_effects_of_float32(smol: Any, in_bfloat16: Any, capitals: mu.Task, metric: Any):
    found = [
        mu.localize.activation_patching(model, capitals.forget[:2], components=PARTS, metric=metric)
        for model in (smol, in_bfloat16)
    ]
    exact, rounded = (scores.tensor.float() for scores in found)
    assert float((exact - rounded).abs().max()) < 0.1 * float(exact.abs().max())
