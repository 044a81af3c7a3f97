"""Methods on circuits that are known because they were written into the weights."""

from collections.abc import Callable
from functools import cache, partial

import planted
import pytest
import torch

from mechunlearn.components import ComponentScores, EdgeScores, matrices
from mechunlearn.localize import (
    activation_patching,
    atp_star,
    attribution_patching,
    edge_attribution_patching,
    edge_clean_corrupted,
    edge_integrated_gradients,
    edge_integrated_gradients_of_activations,
    edge_patching,
    integrated_gradients,
    integrated_gradients_of_activations,
    relp,
)
from mechunlearn.metrics import is_top_of_candidates, is_top_of_vocabulary

SATURATED = {"sharpness": 30.0, "anchor": 5.0, "kinds": (1, 3)}
"""All attention on one place, and norms that divide by about the same everywhere."""

induction = cache(planted.induction)


@cache
def saturated() -> planted.Planted:
    return planted.induction(**SATURATED)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, SATURATED], ids=["soft", "saturated"])
def test_the_planted_model_does_the_task(seed, options):
    model, prompts = (made := planted.induction(seed=seed, **options)).model, made.prompts
    with torch.no_grad():
        logits, corrupt = prompts.logits(model), prompts.corrupted().logits(model)
    assert is_top_of_vocabulary(logits, prompts).float().mean() >= 0.9
    assert not is_top_of_candidates(corrupt, prompts).any(), "corrupted prompts have the other answer"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("method", "least"),
    [
        (edge_attribution_patching, 0.95),
        (partial(edge_attribution_patching, direction="denoising"), 0.95),
        (partial(edge_integrated_gradients, steps=5), 0.99),
        (partial(edge_integrated_gradients_of_activations, steps=2), 0.99),
        (edge_clean_corrupted, 0.95),
    ],
    ids=["EAP", "EAP denoising", "EAP-IG inputs", "EAP-IG activations", "clean-corrupted"],
)
def test_the_planted_edges_rank_first(seed: int, method: Callable[..., EdgeScores], least: float):
    made = induction(seed=seed)
    value = planted.auroc(method(made.model, made.prompts), made.edges)
    print(f"\nAUROC of {len(made.edges)} planted edges: {value:.4f}")
    assert value >= least


def test_integrated_gradients_select_exactly_the_planted_edges():
    made = induction(seed=0)
    assert edge_integrated_gradients(made.model, made.prompts).top(k=len(made.edges)).edges == made.edges


def test_exact_edge_patching_ranks_every_planted_edge_before_all_others():
    made = induction(seed=0)
    scores = edge_patching(made.model, made.prompts)
    assert planted.auroc(scores, made.edges) == 1.0
    assert scores.top(k=len(made.edges)).edges == made.edges


def test_a_random_ranking_does_not_find_them():
    made = induction(seed=0)
    scores = edge_attribution_patching(made.model, made.prompts)
    order = torch.randn(len(scores), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = EdgeScores.of(dict(zip(scores, order, strict=True)), scores.shape)
    assert 0.2 < planted.auroc(shuffled, made.edges) < 0.8


QUERY_AND_KEY = ("L2H3.W_Q", "L2H3.W_K")
"""What saturates: the induction head's query (matters when the last token changes) and key (when others do)."""


def share_of_exact(method: Callable[..., ComponentScores], made: planted.Planted) -> list[float]:
    """The method's score over the exact effect, for query and key."""
    scores = method(made.model, made.prompts, components=matrices)
    exact = activation_patching(made.model, made.prompts, components=matrices)
    shares = [scores[label] / exact[label] for label in QUERY_AND_KEY]
    print(f"\n{scores.method}, share of the exact effect of query and key:", [f"{share:.3f}" for share in shares])
    return shares


def test_a_saturated_softmax_hides_queries_and_keys_from_plain_attribution():
    assert all(abs(share) < 0.02 for share in share_of_exact(attribution_patching, saturated()))


def test_without_saturation_plain_attribution_sees_them():
    soft = planted.induction(anchor=5.0, kinds=(1, 3))
    assert all(share > 0.5 for share in share_of_exact(attribution_patching, soft))


@pytest.mark.parametrize(
    "method",
    [partial(atp_star, grad_drop=False), integrated_gradients, integrated_gradients_of_activations],
    ids=["AtP*", "IG inputs", "IG activations"],
)
def test_atp_star_and_integrated_gradients_see_queries_and_keys_behind_it(method: Callable[..., ComponentScores]):
    assert all(0.5 < share < 2 for share in share_of_exact(method, saturated()))


@pytest.mark.parametrize(
    ("method", "found"),
    [(edge_attribution_patching, False), (edge_clean_corrupted, False), (edge_integrated_gradients, True)],
    ids=["EAP", "clean-corrupted", "EAP-IG inputs"],
)
def test_of_the_edge_methods_only_integrated_gradients_select_the_circuit_behind_it(method, found: bool):
    made = saturated()
    scores = method(made.model, made.prompts)
    missed = made.edges - scores.top(k=len(made.edges)).edges
    print(f"\n{scores.method}: AUROC {planted.auroc(scores, made.edges):.4f}, missed {sorted(map(str, missed))}")
    assert (not missed) == found


def test_a_saturated_norm_hides_the_head_from_plain_attribution_but_not_from_relp():
    """Without the anchor the answer itself makes up most of what the late norms see: more of it changes little."""
    made = planted.induction(kinds=(2,), sharpness=30.0)
    exact = activation_patching(made.model, made.prompts)["L2H3"]
    methods = (attribution_patching, atp_star, relp, integrated_gradients)
    shares = {m.__name__: abs(m(made.model, made.prompts)["L2H3"] / exact) for m in methods}
    print("\nL2H3, share of the exact effect:", {name: f"{share:.3f}" for name, share in shares.items()})
    assert shares["attribution_patching"] < 0.3
    assert 0.6 < shares["relp"] < 1.4
    assert 0.8 < shares["integrated_gradients"] < 1.2


def test_relp_holds_attention_patterns_so_that_a_head_that_moves_them_is_invisible():
    """L0H1 matters through L2H3's keys alone: RelP's known blind spot, saturated or not."""
    made = planted.induction(anchor=5.0, kinds=(1,))
    exact = activation_patching(made.model, made.prompts)["L0H1"]
    assert abs(relp(made.model, made.prompts)["L0H1"] / exact) < 0.05
    assert attribution_patching(made.model, made.prompts)["L0H1"] / exact > 0.5
