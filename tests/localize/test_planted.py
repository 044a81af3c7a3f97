"""Methods on circuits that are known because they were written into the weights."""

from collections.abc import Callable
from functools import cache, partial

import planted_circuit
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

READERS = [f"L{layer}H{head}.{matrix}" for layer in (1, 2, 3) for head in range(4) for matrix in ("W_Q", "W_K", "W_V")]
"""Where attention reads what lower layers wrote."""

induction, decoyed = cache(planted_circuit.induction), cache(planted_circuit.decoyed)


@cache
def saturated() -> planted_circuit.Planted:
    return planted_circuit.induction(**SATURATED)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "make",
    [planted_circuit.induction, partial(planted_circuit.induction, **SATURATED), planted_circuit.decoyed],
    ids=["soft", "saturated", "decoyed"],
)
def test_the_planted_model_does_the_task(seed, make):
    model, prompts = (made := make(seed=seed)).model, made.prompts
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
    value = planted_circuit.auroc(method(made.model, made.prompts), made.edges)
    print(f"\nAUROC of {len(made.edges)} planted edges: {value:.4f}")
    assert value >= least


def test_integrated_gradients_select_exactly_the_planted_edges():
    made = induction(seed=0)
    assert edge_integrated_gradients(made.model, made.prompts).top(k=len(made.edges)).edges == made.edges


def test_exact_edge_patching_ranks_every_planted_edge_before_all_others():
    made = induction(seed=0)
    scores = edge_patching(made.model, made.prompts)
    assert planted_circuit.auroc(scores, made.edges) == 1.0
    assert scores.top(k=len(made.edges)).edges == made.edges


def test_a_random_ranking_does_not_find_them():
    made = induction(seed=0)
    scores = edge_attribution_patching(made.model, made.prompts)
    order = torch.randn(len(scores), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = EdgeScores.of(dict(zip(scores, order, strict=True)), scores.shape)
    assert 0.2 < planted_circuit.auroc(shuffled, made.edges) < 0.8


QUERY_AND_KEY = ("L2H3.W_Q", "L2H3.W_K")
"""What saturates: the induction head's query (matters when the last token changes) and key (when others do)."""


def share_of_exact(method: Callable[..., ComponentScores], made: planted_circuit.Planted) -> list[float]:
    """The method's score over the exact effect, for query and key."""
    scores = method(made.model, made.prompts, components=matrices)
    exact = activation_patching(made.model, made.prompts, components=matrices)
    shares = [scores[label] / exact[label] for label in QUERY_AND_KEY]
    print(f"\n{scores.method}, share of the exact effect of query and key:", [f"{share:.3f}" for share in shares])
    return shares


def test_a_saturated_softmax_hides_queries_and_keys_from_plain_attribution():
    assert all(abs(share) < 0.02 for share in share_of_exact(attribution_patching, saturated()))


def test_without_saturation_plain_attribution_sees_them():
    soft = planted_circuit.induction(anchor=5.0, kinds=(1, 3))
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
    print(
        f"\n{scores.method}: AUROC {planted_circuit.auroc(scores, made.edges):.4f}, missed {sorted(map(str, missed))}"
    )
    assert (not missed) == found


def test_a_saturated_norm_hides_the_head_from_plain_attribution_but_not_from_relp():
    """Without the anchor the answer itself makes up most of what the late norms see: more of it changes little."""
    made = planted_circuit.induction(kinds=(2,), sharpness=30.0)
    exact = activation_patching(made.model, made.prompts)["L2H3"]
    methods = (attribution_patching, atp_star, relp, integrated_gradients)
    shares = {m.__name__: abs(m(made.model, made.prompts)["L2H3"] / exact) for m in methods}
    print("\nL2H3, share of the exact effect:", {name: f"{share:.3f}" for name, share in shares.items()})
    assert shares["attribution_patching"] < 0.3
    assert 0.6 < shares["relp"] < 1.4
    assert 0.8 < shares["integrated_gradients"] < 1.2


def test_relp_holds_attention_patterns_so_that_a_head_that_moves_them_is_invisible():
    """L0H1 matters through L2H3's keys alone: RelP's known blind spot, saturated or not."""
    made = planted_circuit.induction(anchor=5.0, kinds=(1,))
    exact = activation_patching(made.model, made.prompts)["L0H1"]
    assert abs(relp(made.model, made.prompts)["L0H1"] / exact) < 0.05
    assert attribution_patching(made.model, made.prompts)["L0H1"] / exact > 0.5


def of_true_and_decoys(method, made, ends, direction="noising") -> tuple[float, ComponentScores]:
    """The AUROC of the circuit's components against the decoys: queries, keys and values, or heads and MLPs."""
    options = {"components": READERS} if ends is planted_circuit.readers else {}
    scores = method(made.model, made.prompts, direction=direction, **options)
    true, decoys = ends(made.edges), ends(made.decoys)
    value = planted_circuit.decoy_auroc(scores, true, decoys)
    print(f"\n{scores.method}: AUROC {value:.2f}", {label: round(scores[label], 2) for label in [*true, *decoys]})
    return value, scores


@pytest.mark.parametrize(("seed", "direction"), [(0, "noising"), (0, "denoising"), (1, "noising"), (2, "noising")])
def test_a_softmax_that_cannot_exceed_one_makes_plain_attribution_rank_decoys_first(seed, direction):
    """Each of the four decoyed queries and keys before all of the values that matter, and several times too high."""
    made = decoyed(seed=seed)
    value, scores = of_true_and_decoys(attribution_patching, made, planted_circuit.readers, direction)
    exact = activation_patching(made.model, made.prompts, direction=direction, components=READERS)
    assert value == 0.0
    assert all(scores[decoy] / exact[decoy] > 5 for decoy in planted_circuit.readers(made.decoys))
    assert of_true_and_decoys(attribution_patching, made, planted_circuit.writers, direction)[0] < 0.3


def test_integrated_gradients_over_activations_do_at_queries_and_keys():
    assert of_true_and_decoys(integrated_gradients_of_activations, decoyed(seed=0), planted_circuit.readers)[0] == 1.0


ATP_STAR = partial(atp_star, grad_drop=False)
IG_10 = partial(integrated_gradients, steps=10)


@pytest.mark.parametrize(("seed", "direction"), [(0, "noising"), (0, "denoising"), (1, "noising"), (2, "noising")])
@pytest.mark.parametrize(
    ("method", "ends"),
    [
        (activation_patching, planted_circuit.readers),
        (ATP_STAR, planted_circuit.readers),
        (integrated_gradients, planted_circuit.readers),
        (IG_10, planted_circuit.readers),
        (activation_patching, planted_circuit.writers),
        (relp, planted_circuit.writers),
        (integrated_gradients, planted_circuit.writers),
        (IG_10, planted_circuit.writers),
    ],
)
def test_atp_star_relp_and_integrated_gradients_rank_what_matters_first(seed, direction, method, ends):
    """AtP* at queries and keys, RelP, which has no scores for them, at the heads that move them, IG at both."""
    made = decoyed(seed=seed)
    value, scores = of_true_and_decoys(method, made, ends, direction)
    assert value == 1.0
    true = ends(made.edges)
    assert {str(component) for component in scores.top(k=len(true))} == set(true), "before all other components, too"


@pytest.mark.parametrize(
    ("method", "low", "high"), [(ATP_STAR, 0.8, 1.25), (integrated_gradients, 0.2, 1.0), (IG_10, 0.5, 1.25)]
)
def test_how_much_of_a_decoys_effect_they_give_it(method, low, high):
    made = decoyed(seed=0)
    options = {"components": READERS}
    scores, exact = (f(made.model, made.prompts, **options) for f in (method, activation_patching))
    shares = [scores[decoy] / exact[decoy] for decoy in planted_circuit.readers(made.decoys)]
    print(f"\n{scores.method}, score over exact effect of decoys:", [f"{share:.2f}" for share in shares])
    assert all(low < share < high for share in shares)


def test_relp_gives_heads_that_push_decoys_nothing():
    made = decoyed(seed=0)
    scores, exact, plain = (f(made.model, made.prompts) for f in (relp, activation_patching, attribution_patching))
    for decoy in planted_circuit.writers(made.decoys):
        assert abs(scores[decoy]) < 0.1 * abs(exact[decoy])
        assert abs(plain[decoy]) > 5 * abs(exact[decoy])


@pytest.mark.parametrize("method", [ATP_STAR, atp_star], ids=["without GradDrop", "with GradDrop"])
def test_the_qk_fix_does_not_reach_the_heads_that_push_queries_and_keys(method):
    """It corrects the patch of a query or a key; that of a head's output goes through the linear softmax."""
    assert of_true_and_decoys(method, decoyed(seed=0), planted_circuit.writers)[0] < 0.3


@pytest.mark.parametrize(
    ("method", "found"),
    [
        (edge_integrated_gradients, True),
        (edge_attribution_patching, False),
        (edge_clean_corrupted, False),
    ],
)
def test_of_the_edge_methods_only_integrated_gradients_leave_the_decoys_out(method, found: bool):
    made = decoyed(seed=0)
    chosen = method(made.model, made.prompts).top(k=len(made.edges)).edges
    assert (chosen == made.edges) == found
    assert bool(chosen & made.decoys) != found


def test_without_the_push_there_is_nothing_to_mislead_plain_attribution():
    """The control: the same model, in which the token does not change the scores."""
    made = planted_circuit.decoyed(push=0.0)
    assert of_true_and_decoys(attribution_patching, made, planted_circuit.readers)[0] == 1.0
    assert of_true_and_decoys(attribution_patching, made, planted_circuit.writers)[0] == 1.0
