"""Exact patching of models in bfloat16, against the same weights in float32."""

from functools import cache, partial

import odd_models
import pytest
import tiny
import torch
from conftest import CASES, EVERY_CASE, TWO
from scipy.stats import spearmanr
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import ComponentMask, ComponentScores, EdgeMask, EdgeScores
from mechunlearn.localize import (
    activation_patching,
    activation_patching_by_position,
    causal_tracing,
    edge_attribution_patching,
    edge_faithfulness,
    edge_patching,
    faithfulness,
    incompleteness,
    path_effect,
    path_patching,
    set_patching,
)
from mechunlearn.metrics import logit_difference
from mechunlearn.model import base_run
from mechunlearn.model.running import linear_in_chunks, unembedded

COMPONENTS = ("L0H1", "L1H2", "L2H3", "L0H3.W_K", "L1H2.W_Q", "L0MLP", "L2MLP", "L1ATTN", "L1N7")
EDGES = ("embed->L0H1.W_Q", "L0MLP->L1H2.W_V", "L0H1->L1H2.W_K", "L1H2->logits", "L1MLP->L2MLP", "L2MLP->logits")
SENDERS = ("L0H1", "L1H2", "L0MLP", "L1MLP")


def circuit(model, labels=("L0H1", "L1H3", "L1MLP")):
    return ComponentMask.of(labels, mu.shape(model))


def path_between(model, prompts, **options):
    return path_effect(model, prompts, SENDERS, ["L2H1", "L2MLP"], through_mlps=True, **options)


def sets(model, prompts, **options):
    return set_patching(model, prompts, {"circuit": circuit(model), "one": ["L2N3"]}, **options).per_prompt


def faithful(model, prompts, **options):
    found = faithfulness(model, prompts, circuit(model), random_circuits=1, **options)
    return torch.cat([found.alone, found.without, found.whole[:, None]], 1)


def faithful_edges(model, prompts, **options):
    edges = EdgeMask.of(EDGES, mu.shape(model))
    return edge_faithfulness(model, prompts, edges, random_circuits=0, **options).alone


METHODS = {
    "activation_patching": lambda m, p, **o: activation_patching(m, p, components=COMPONENTS, **o).per_prompt,
    "activation_patching_by_position": lambda m, p, **o: (
        activation_patching_by_position(m, p, components=SENDERS, **o).per_prompt
    ),
    "causal_tracing": lambda m, p, **o: causal_tracing(m, p, draws=2, metric=logit_difference, **o).effects,
    "edge_faithfulness": faithful_edges,
    "edge_patching": lambda m, p, **o: edge_patching(m, p, edges=EDGES, **o).per_prompt,
    "faithfulness": faithful,
    "incompleteness": lambda m, p, **o: incompleteness(m, p, circuit(m), knockouts=2, **o).circuit_without,
    "path_effect": path_between,
    "path_patching": lambda m, p, **o: path_patching(m, p, senders=SENDERS, **o).per_prompt,
    "set_patching": sets,
}
"""Every method that takes `compute_dtype`."""

GRANITE, COHERE = ("odd", "granite"), ("odd", "cohere")
SOME = [*(case for case in CASES if EVERY_CASE or case[1] in TWO), GRANITE]
every_case = pytest.mark.parametrize("case", [*CASES, GRANITE, COHERE], ids="-".join)


@cache
def pair(case):
    """A model in bfloat16, and another with the same rounded weights in float32."""
    kind, name = case
    make = getattr(odd_models, name) if kind == "odd" else partial(getattr(tiny, kind), name)
    models = make().to(torch.bfloat16), make().to(torch.bfloat16).to(torch.float32)
    for model in models:
        model(torch.tensor([[1, 5]]))  # TransformerLens installs hooks of its own at the first forward
    return models


@pytest.mark.classes
@every_case
@torch.no_grad()
def test_logits_are_the_float32_unembedding_of_the_final_residual(case):
    half, whole = pair(case)
    prompts = tiny.prompts(half)
    run = base_run(half, prompts.tokens, prompts.attention_mask, prompts.positions)
    assert run.residuals[-1].dtype == torch.bfloat16
    final = run.residuals[-1][torch.arange(6), prompts.positions[:, 0]]
    assert prompts.logits(half).dtype == run.logits.dtype == torch.float32
    torch.testing.assert_close(run.logits[:, 0], unembedded(whole, final.float()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(unembedded(half, final), run.logits[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_large_unembedding_is_cast_in_pieces_with_the_same_values_and_gradients(monkeypatch, with_bias):
    monkeypatch.setattr("mechunlearn.model.running._CHUNK", 8 * 5)
    torch.manual_seed(0)
    weight, bias = torch.randn(23, 8).bfloat16(), torch.randn(23).bfloat16() if with_bias else None
    value = torch.randn(2, 3, 8, requires_grad=True)
    expected = torch.nn.functional.linear(value, weight.float(), None if bias is None else bias.float())
    logits = linear_in_chunks(value, weight, bias)
    torch.testing.assert_close(logits, expected)
    slopes = [torch.autograd.grad(found.square().sum(), value)[0] for found in (logits, expected)]
    torch.testing.assert_close(*slopes)


@pytest.mark.classes
@pytest.mark.parametrize("case", SOME, ids="-".join)
@pytest.mark.parametrize("method", METHODS)
def test_compute_dtype_gives_what_the_same_weights_give_in_float32(case, method):
    half, whole = pair(case)
    prompts, call = tiny.prompts(half), METHODS[method]
    with left_as_it_was(half):
        precise = call(half, prompts, compute_dtype=torch.float32)
    reference = call(whole, prompts)
    torch.testing.assert_close(precise, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))
    assert not torch.allclose(call(half, prompts), reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


def test_in_a_float32_model_compute_dtype_changes_nothing(model):
    prompts = tiny.prompts(model)
    for name in ("activation_patching", "edge_patching", "path_patching"):
        call = METHODS[name]
        assert torch.equal(call(model, prompts, compute_dtype=torch.float32), call(model, prompts))


@pytest.mark.classes
@pytest.mark.parametrize("place", ["metric", "block"])
def test_an_interrupt_leaves_the_model_in_bfloat16(place):
    half, _ = pair(("bridge", "gpt2"))
    prompts = tiny.prompts(half)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    handle = half.blocks[1].mlp.register_forward_hook(interrupt if place == "block" else lambda *arguments: None)
    try:
        with left_as_it_was(half), pytest.raises(KeyboardInterrupt):
            metric = interrupt if place == "metric" else logit_difference
            activation_patching(half, prompts, metric=metric, compute_dtype=torch.float32)
    finally:
        handle.remove()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_another_dtype_and_packed_weights_are_refused(llama):
    with left_as_it_was(llama), pytest.raises(ValueError, match=r"expected compute_dtype None .* got torch.bfloat16"):
        activation_patching(llama, tiny.prompts(llama), compute_dtype=torch.bfloat16)
    packed = odd_models.quantised(8)
    with pytest.raises(ValueError, match=r"expected compute_dtype None .* weights in torch.float32, torch.int8"):
        activation_patching(packed, tiny.prompts(packed), compute_dtype=torch.float32)


@pytest.mark.nightly
def test_of_512_small_edges_float32_sees_what_the_estimate_sees_and_bfloat16_does_not():
    """The bar: a rank correlation with float32 not below the estimate's, and no zero that float32 does not have."""
    half = mu.testbed.load().to(torch.bfloat16)
    whole = mu.testbed.load().to(torch.bfloat16).to(torch.float32)
    prompts = mu.tasks.sports_facts(whole, forget=4).forget[[0]]
    estimates = edge_attribution_patching(whole, prompts)
    by_size = sorted(estimates, key=lambda edge: abs(estimates[edge]))
    edges = by_size[len(by_size) // 4 :: max(1, len(by_size) // 1024)][:512]
    assert len(edges) == 512
    reference = edge_patching(whole, prompts, edges=edges).values_in_order
    rough = edge_patching(half, prompts, edges=edges).values_in_order
    precise = edge_patching(half, prompts, edges=edges, compute_dtype=torch.float32).values_in_order
    estimate = edge_attribution_patching(half, prompts, edges=edges).values_in_order
    correlation = {
        name: spearmanr(values, reference).statistic
        for name, values in {"rough": rough, "precise": precise, "estimate": estimate}.items()
    }
    assert correlation["precise"] >= correlation["estimate"] > correlation["rough"]
    assert not bool(((precise == 0) & (reference != 0)).any())


@pytest.mark.parametrize("case", SOME, ids="-".join)
def test_the_resolution_is_the_rounding_error_of_a_difference_of_two_means(case):
    half, whole = pair(case)
    prompts = tiny.prompts(half)
    with torch.no_grad():
        runs = prompts, prompts.exchanged()
        errors = [logit_difference(p.logits(half), p) - logit_difference(p.logits(whole), p) for p in runs]
    expected = float((2 / 6 * torch.stack(errors).double().square().mean()).sqrt())
    found = [
        activation_patching(half, prompts, components=COMPONENTS),
        path_patching(half, prompts, senders=SENDERS),
        edge_patching(half, prompts, edges=EDGES),
    ]
    assert [scores.resolution for scores in found] == pytest.approx([expected] * 3, rel=1e-3)
    assert all(f"; resolves {scores.resolution:.2g})" in repr(scores) for scores in found)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_resolution_is_about_the_error_of_patching(architecture):
    """Here at most five times it and at least a tenth: patches in late layers share rounding with the unpatched run."""
    half, _ = pair(("bridge", architecture))
    prompts = tiny.prompts(half, n=12)
    rough = activation_patching(half, prompts)
    precise = activation_patching(half, prompts, compute_dtype=torch.float32)
    error = float((rough.tensor - precise.tensor).square().mean().sqrt())
    assert rough.resolution is not None
    assert rough.resolution / 5 < error < 10 * rough.resolution


def test_the_resolution_is_saved_and_only_where_there_is_one(tmp_path, llama):
    half, _ = pair(("bridge", "llama"))
    prompts = tiny.prompts(half)
    for number, scores in enumerate(
        (activation_patching(half, prompts, components=["L0MLP"]), edge_patching(half, prompts, edges=EDGES))
    ):
        scores.save(tmp_path / str(number))
        cls = ComponentScores if number == 0 else EdgeScores
        assert cls.load(tmp_path / str(number)).resolution == scores.resolution > 0
    for scores in (
        activation_patching(llama, prompts, components=["L0MLP"]),
        activation_patching(half, prompts, components=["L0MLP"], compute_dtype=torch.float32),
        edge_attribution_patching(half, prompts),
    ):
        assert scores.resolution is None
        assert "resolves" not in repr(scores)
