"""What every localization promises, on every architecture and in both model classes.

It runs; its numbers are finite and have the labels that were asked for; the model is left as it was, bit for bit; and
neither batches, nor the side of the padding, nor the order of the prompts or their company changes a number.
"""

import inspect
import json
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from conftest import HAS_HOOKED, shared
from state import left_as_it_was
from torch import Tensor

import mechunlearn as mu
from mechunlearn.components import ComponentMask, ComponentScores, EdgeMask, EdgeScores, PositionScores
from mechunlearn.components.plot import INK
from mechunlearn.localize import (
    CausalTrace,
    FactLookup,
    Faithfulness,
    Incompleteness,
    LogitLens,
    ProbeResult,
    SetEffects,
    Verified,
)

COMPONENTS = ("L0H1", "L0H3.W_K", "L1H2.W_Q", "L2H0.W_V", "L1ATTN", "L0MLP", "L2MLP.W_out", "L1N7")
WITHOUT_QUERIES = tuple(label for label in COMPONENTS if label[-3:] not in ("W_Q", "W_K"))
WRITERS = ("L0H1", "L1H2", "L0MLP", "L1MLP")
EDGES = ("embed->L0H1.W_Q", "L0MLP->L1H2.W_V", "L1H2->logits", "L1MLP->L2MLP", "L2MLP->logits")
GROUPS = (
    "before the subject",
    "first of the subject",
    "inside the subject",
    "last of the subject",
    "after",
    "last",
)
POINTS = ("0", "1", "2", "3")
ORDER = [3, 1, 5, 0, 2, 4]


class Contract(NamedTuple):
    call: Callable[..., Any]
    """(model, prompts, **options) -> result"""
    kind: type
    labels: tuple[str, ...]
    """What a number of the result is of."""
    label: Callable[[Any], Any]
    """The result's labels."""
    rows: Callable[[Any], Tensor]
    """The result's numbers, a row for each prompt."""
    shuffled: bool = True
    """Whether the rows follow the prompts: False where one number is of all prompts together."""
    alone: bool = True
    """Whether a prompt has the same numbers without the others: not where something is fitted to all of them."""


def scoring(name: str, labels: tuple[str, ...] = COMPONENTS, *, of: str = "components", **options: Any) -> Contract:
    call = partial(getattr(mu.localize, name), **{of: labels}, **options)
    return Contract(call, ComponentScores, labels, lambda scores: scores.components, lambda scores: scores.per_prompt)


def together(name: str, call: Callable[..., Any]) -> Contract:
    """Of all prompts: one number a component."""
    label = operator.attrgetter("components")
    return Contract(call, ComponentScores, COMPONENTS, label, lambda scores: scores.tensor[None], False, False)


def of_edges(name: str, **options: Any) -> Contract:
    call = partial(getattr(mu.localize, name), edges=EDGES, **options)
    return Contract(call, EdgeScores, EDGES, lambda scores: scores.edges, lambda s: s.per_prompt[:, s.scored])


def circuit(model: Any) -> ComponentMask:
    return ComponentMask.of(["L0H1", "L1H3", "L1MLP"], mu.shape(model))


def some_edges(model: Any) -> EdgeMask:
    return EdgeMask.of(EDGES, mu.shape(model))


def wagle(model: Any, prompts: Any, **options: Any) -> ComponentScores:
    return mu.localize.wagle(model, prompts, prompts.exchanged(), gamma=0.1, components=COMPONENTS, **options)


def sets(model: Any, prompts: Any, **options: Any) -> SetEffects:
    return mu.localize.set_patching(model, prompts, {"circuit": circuit(model), "one": ["L2N3"]}, **options)


def faithful(model: Any, prompts: Any, **options: Any) -> Faithfulness:
    return mu.localize.faithfulness(model, prompts, circuit(model), random_circuits=1, **options)


def faithful_edges(model: Any, prompts: Any, **options: Any) -> Faithfulness:
    return mu.localize.edge_faithfulness(model, prompts, some_edges(model), random_circuits=0, **options)


def incomplete(model: Any, prompts: Any, **options: Any) -> Incompleteness:
    return mu.localize.incompleteness(model, prompts, circuit(model), knockouts=2, **options)


def traced(model: Any, prompts: Any, **options: Any) -> CausalTrace:
    metric = mu.metrics.answer_log_probability
    return mu.localize.causal_tracing(model, prompts, metric=metric, draws=1, window=2, **options)


def labels_of(prompts: Any) -> Tensor:
    """Two classes, which a prompt keeps in whatever order and padding it comes."""
    return prompts.answers[:, 0] % 2


def probed(model: Any, prompts: Any, **options: Any) -> ProbeResult:
    return mu.localize.probes(model, prompts, labels_of(prompts), seeds=1, folds=2, **options)


def looked_up_by_probes(model: Any, prompts: Any, **options: Any) -> FactLookup:
    text = torch.randint(4, tiny.N_VOCAB, (5, 9), generator=torch.Generator().manual_seed(0))
    options |= {"seeds": 1, "folds": 2, "layers": [0]}
    return mu.localize.fact_lookup_by_probes(model, prompts, labels_of(prompts), text=text, **options)


def looked_up_by_paths(model: Any, prompts: Any, **options: Any) -> FactLookup:
    """A random model answers one side better than the other, and not always the clean one."""
    with torch.no_grad():
        sides = [mu.metrics.logit_difference(p.logits(model), p).mean() for p in (prompts, prompts.corrupted())]
    known = prompts if sides[0] > sides[1] else prompts.exchanged()
    heads = ["L2H1", "L2H3"]
    return mu.localize.fact_lookup_by_paths(model, known, extraction_heads=heads, layers=[0], **options)


def path_effect(model: Any, prompts: Any, **options: Any) -> Tensor:
    return mu.localize.path_effect(model, prompts, WRITERS, ["L2H1", "L2MLP"], **options)[:, None]


def curves(found: Faithfulness) -> Tensor:
    return torch.cat([found.alone, found.without, found.whole[:, None], found.nothing[:, None]], 1)


METHODS = {
    "activation_patching": scoring("activation_patching"),
    "activation_patching_by_position": Contract(
        partial(mu.localize.activation_patching_by_position, components=WRITERS),
        PositionScores,
        GROUPS,
        lambda scores: scores.positions,
        lambda scores: scores.per_prompt.flatten(1),
    ),
    "atp_star": scoring("atp_star"),
    "attribution_patching": scoring("attribution_patching"),
    "causal_tracing": Contract(
        traced,
        CausalTrace,
        ("residual", "MLP", "ATTN"),
        lambda trace: trace.kinds,
        lambda trace: torch.cat([trace.by_role.flatten(1).nan_to_num(), trace.clean[:, None]], 1),
        alone=False,
    ),
    "direct_logit_attribution": scoring("direct_logit_attribution", WRITERS),
    "edge_attribution_patching": of_edges("edge_attribution_patching"),
    "edge_clean_corrupted": of_edges("edge_clean_corrupted"),
    "edge_faithfulness": Contract(
        faithful_edges, Faithfulness, ("circuit", "circuit", "circuit"), lambda found: found.names, curves
    ),
    "edge_integrated_gradients": of_edges("edge_integrated_gradients", steps=2),
    "edge_integrated_gradients_of_activations": of_edges("edge_integrated_gradients_of_activations", steps=1),
    "edge_patching": of_edges("edge_patching"),
    "fact_lookup_by_paths": Contract(
        looked_up_by_paths,
        FactLookup,
        ("L0MLP",),
        lambda found: found.mask,
        lambda found: torch.cat([scores.per_prompt for scores in found.scores.values()], 1),
        alone=False,
    ),
    "fact_lookup_by_probes": Contract(
        looked_up_by_probes,
        FactLookup,
        ("L0MLP",),
        lambda found: found.mask,
        lambda found: found.curves["accuracy"].per_prompt,
        alone=False,
    ),
    "faithfulness": Contract(faithful, Faithfulness, (), lambda found: (), curves),
    "fisher": scoring("fisher"),
    "gradient_times_weight": scoring("gradient_times_weight"),
    "incompleteness": Contract(
        incomplete,
        Incompleteness,
        ("L0H1", "L1H3", "L1MLP"),
        lambda found: found.circuit,
        lambda found: torch.cat([found.circuit_without, found.model_without], 1),
    ),
    "integrated_gradients": scoring("integrated_gradients", steps=2),
    "integrated_gradients_of_activations": scoring("integrated_gradients_of_activations", steps=2),
    "logit_lens": Contract(
        partial(mu.localize.logit_lens, components=["L1MLP"]),
        LogitLens,
        (*POINTS, "L1MLP"),
        lambda lens: lens.points,
        lambda lens: torch.cat([lens.log_probability, lens.logit_difference], 1),
    ),
    "path_effect": Contract(path_effect, Tensor, (), lambda effect: (), lambda effect: effect),
    "path_patching": scoring("path_patching", WRITERS, of="senders", receivers=["L2H1", "L2MLP"], through_mlps=True),
    "probes": Contract(
        probed,
        ProbeResult,
        POINTS,
        lambda found: found.points,
        lambda found: torch.cat([found.correct, found.control], 1),
        alone=False,
    ),
    "relp": scoring("relp", WITHOUT_QUERIES),
    "screen_then_verify": Contract(
        partial(mu.localize.screen_then_verify, components=COMPONENTS, k=len(COMPONENTS)),
        Verified,
        COMPONENTS,
        lambda found: sorted(found.scores.components, key=lambda c: COMPONENTS.index(str(c))),
        lambda found: found.scores.per_prompt,
        alone=False,
    ),
    "set_patching": Contract(
        sets, SetEffects, ("circuit", "one"), lambda effects: effects.sets, lambda effects: effects.per_prompt
    ),
    "snip": together("snip", partial(mu.localize.snip, components=COMPONENTS)),
    "wagle": together("wagle", wagle),
}
"""A new localization is one line."""

NO_LOCALIZATION = {
    "all_mlps": "a mask, whatever the weights: tests/components",
    "everything": "a mask, whatever the weights: tests/components",
    "load_mib": "reads a file: test_circuit_files.py",
    "paper_fact_lookup": "a table of three models: test_fact_lookup.py",
    "random": "draws, whatever the weights: test_random_like.py",
    "random_like": "draws, whatever the weights: test_random_like.py",
    "resample": "what patching puts in, as `zero` is: test_activation_patching.py",
    "save_mib": "writes a file: test_circuit_files.py",
    "zero": "what patching puts in: test_activation_patching.py",
}
"""Public functions that take a model and localize nothing in it, and where they are tested."""

every_method = pytest.mark.parametrize("name", METHODS)


def test_every_public_localization_is_in_the_contract():
    public = {name: getattr(mu.localize, name) for name in mu.localize.__all__}
    asked = {n for n, f in public.items() if inspect.isfunction(f) and "model" in inspect.signature(f).parameters}
    assert asked - set(METHODS) - set(NO_LOCALIZATION) == set(), "add a line to METHODS"
    assert set(METHODS) <= set(public)


def in_batches(contract: Contract, size: int) -> dict[str, int]:
    """The option, where the method takes batches: what is of single prompts takes them one by one."""
    function = contract.call.func if isinstance(contract.call, partial) else contract.call
    takes = inspect.signature(function).parameters
    return {"batch_size": size} if "batch_size" in takes or "options" in takes else {}


@every_method
def test_a_localization_keeps_its_contract(every_model: Any, name: str):
    contract, model = METHODS[name], every_model
    with left_as_it_was(model):
        result = contract.call(model, tiny.prompts(model))
    rows = contract.rows(result)
    assert isinstance(result, contract.kind)
    assert tuple(map(str, contract.label(result))) == contract.labels
    assert len(rows) == 6 if contract.shuffled else 1
    assert torch.isfinite(rows).all()
    assert float(rows.abs().max()) > 1e-3
    if contract.kind not in (Verified, Tensor):
        assert_dressed(result.plot())
    other = tiny.prompts(model, padding="left")[ORDER]
    again = contract.rows(contract.call(model, other, **in_batches(contract, 4)))
    assert_close(rows[ORDER] if contract.shuffled else rows, again)
    if contract.alone:
        shortest = contract.rows(contract.call(model, tiny.prompts(model)[[0]]))
        assert_close(rows[:1], shortest)


def assert_dressed(figure: Any) -> None:
    """It says what it shows, and in what unit; it has the look of all figures, and fits a notebook."""
    layout = json.loads(figure.to_json())["layout"]
    assert layout["title"]["text"]
    assert layout["font"]["color"] == INK
    assert layout.get("width", 0) <= 1600
    assert any(layout[name].get("title") for name in layout if name.startswith(("xaxis", "yaxis")))
    assert all("_" not in layout[name].get("title", {}).get("text", "") for name in layout if "axis" in name)


def assert_close(found: Tensor, other: Tensor) -> None:
    """To the rounding of float32, of numbers whose largest are between 0.1 and 10."""
    torch.testing.assert_close(found.double(), other.double(), rtol=1e-4, atol=2e-5)


@every_method
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES if HAS_HOOKED else [])
def test_both_classes_give_the_same_numbers(architecture: str, name: str):
    contract = METHODS[name]
    models = shared("bridge", architecture), shared("hooked", architecture)
    found = [contract.rows(contract.call(model, tiny.prompts(model))) for model in models]
    torch.testing.assert_close(*found, rtol=1e-3, atol=2e-5)
