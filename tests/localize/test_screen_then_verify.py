"""The candidates' scores are those of exact patching; the error and the bound are counted by hand."""

from dataclasses import replace
from functools import partial
from random import Random

import pytest
import tiny
import torch
from scipy.stats import hypergeom, pearsonr, spearmanr
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import ComponentScores, heads_and_mlps
from mechunlearn.localize import (
    activation_patching,
    atp_star,
    attribution_patching,
    integrated_gradients,
    relp,
    screen_then_verify,
)
from mechunlearn.localize.screening import Verified
from mechunlearn.metrics import answer_probability
from mechunlearn.model import shape

SHAPE = mu.ModelShape(8, 4, 2, 32, 8, 64, True)
ALL = heads_and_mlps(SHAPE)


def by_hand(exact, estimate, sampled=()):
    """The first components as candidates, the next ones as the sample."""

    def scores(components, values):
        return ComponentScores(tuple(components), torch.tensor(values, dtype=torch.float64), SHAPE, "by hand")

    n = len(exact)
    drawn = scores(ALL[n : n + len(sampled)], sampled) if sampled else None
    return Verified(scores(ALL[:n], exact), scores(ALL[: len(estimate)], estimate), drawn)


def test_candidates_are_the_top_of_the_estimate_with_exact_scores(model):
    prompts = tiny.prompts(model)
    found = screen_then_verify(model, prompts, k=5, sample=4)
    estimate, exact = attribution_patching(model, prompts), activation_patching(model, prompts)
    assert set(found.scores) == set(estimate.top(k=5))
    assert len(found.sampled) == 4
    assert not set(found.sampled) & set(found.scores)
    for verified in (found.scores, found.sampled):
        for place, component in enumerate(verified):
            expected = exact.per_prompt[:, exact.components.index(component)]
            assert torch.allclose(verified.per_prompt[:, place], expected, atol=1e-5)
    assert torch.allclose(found.estimate.tensor, estimate.tensor)
    assert set(found.top(k=3)) == set(sorted(found.scores, key=lambda c: -abs(exact[c]))[:3])


def test_options_reach_both_methods(llama):
    options = {"metric": answer_probability, "direction": "denoising"}
    prompts, chosen = tiny.prompts(llama), ["L0MLP", "L1MLP", "L2MLP", "L1H2", "L2N3"]
    found = screen_then_verify(llama, prompts, k=2, components=chosen, sample=9, batch_size=4, **options)
    exact = activation_patching(llama, prompts, components=chosen, **options)
    estimate = attribution_patching(llama, prompts, components=chosen, **options)
    assert found.scores.metric == "answer_probability"
    for component in chosen:
        verified = found.scores if component in found.scores else found.sampled
        assert verified[component] == pytest.approx(exact[component], abs=1e-6)
        assert found.estimate[component] == pytest.approx(estimate[component], abs=1e-6)


@pytest.mark.parametrize(
    "estimate",
    [atp_star, relp, partial(integrated_gradients, steps=2), partial(activation_patching, batch_size=3)],
    ids=["atp_star", "relp", "integrated", "exact"],
)
def test_any_method_can_screen(llama, estimate):
    given = (lambda *a, batch_size, **o: estimate(*a, **o)) if estimate.__class__ is partial else estimate
    prompts = tiny.prompts(llama)
    found = screen_then_verify(llama, prompts, k=4, estimate=given, sample=0)
    assert set(found.scores) == set(given(llama, prompts, batch_size=64).top(k=4))


def test_a_method_of_your_own_can_verify(llama):
    def mine(model, prompts, *, components, **options):
        chosen = {str(c): float(place) for place, c in enumerate(components)}
        return ComponentScores.of(chosen, shape(model), method="mine")

    found = screen_then_verify(llama, tiny.prompts(llama), k=3, verify=mine, sample=2)
    assert sorted([*found.scores.values(), *found.sampled.values()]) == [0, 1, 2, 3, 4]
    assert found.scores.settings["verify"] == "mine"
    assert found.scores.per_prompt is None


def test_an_exact_estimate_has_no_error(llama):
    found = screen_then_verify(llama, tiny.prompts(llama), fraction=0.4, estimate=activation_patching, sample=5)
    error = found.error
    assert error["components"].tolist() == [6, 5]
    assert error["bias"].abs().max() < 1e-6
    assert error["rms"].max() < 1e-6
    assert error["correlation"].tolist() == pytest.approx([1, 1])
    assert error["rank correlation"].tolist() == pytest.approx([1, 1])
    assert error["same sign"].tolist() == [1, 1]


def test_the_error_agrees_with_scipy():
    exact, estimate = [2.0, -1.0, 0.5, 0.5, -3.0], [1.0, -2.0, -0.25, 1.0, -2.5]
    row = by_hand(exact, [*estimate, 0.0]).error.loc["candidates"]
    assert row["bias"] == pytest.approx((-1 - 1 - 0.75 + 0.5 + 0.5) / 5)
    assert row["rms"] == pytest.approx(((1 + 1 + 0.75**2 + 0.25 + 0.25) / 5) ** 0.5)
    assert row["correlation"] == pytest.approx(pearsonr(estimate, exact).statistic)
    sizes = [[abs(value) for value in values] for values in (estimate, exact)]
    assert row["rank correlation"] == pytest.approx(spearmanr(*sizes).statistic)
    assert row["same sign"] == pytest.approx(0.8)


def test_one_candidate_has_no_correlation():
    row = by_hand([2.0], [1.0, 0.5]).error.loc["candidates"]
    assert row[["correlation", "rank correlation"]].isna().all()
    assert row["rms"] == 1


def test_the_frame_has_a_row_for_each_verified_component(llama):
    found = screen_then_verify(llama, tiny.prompts(llama), k=5, sample=3)
    frame = found.to_frame()
    assert frame["verified as"].value_counts().to_dict() == {"candidate": 5, "sample": 3}
    assert (frame["estimate"] - frame["exact"]).tolist() == pytest.approx(frame["error"].tolist())
    assert frame["exact"].abs().is_monotonic_decreasing
    assert "5 of 15 components, attribution_patching then activation_patching" in repr(found)
    assert found.top(k=2).provenance["settings"]["sample"] == 3


def test_what_was_missed_is_counted_in_the_sample():
    found = by_hand([5.0, -3.0, 1.0], [5.0, -3.0, 1.0] + [0.0] * 10, sampled=(0.5, -2.0, 0.1, 4.0))
    missed = found.missed()
    assert (missed.threshold, missed.dropped, missed.sampled, missed.found, missed.largest) == (1.0, 10, 4, 2, 4.0)
    assert found.missed(threshold=3.0).found == 1
    assert found.missed(threshold=4.0).found == 0
    assert "of 10 dropped components 4 were verified: 2 exceed 1" in str(missed)


@pytest.mark.parametrize(("dropped", "sampled", "found"), [(20, 5, 0), (20, 5, 2), (30, 10, 0), (27, 27, 4), (9, 0, 0)])
def test_the_bound_is_the_largest_number_that_the_sample_does_not_reject(dropped, sampled, found):
    ranks = [2.0] * found + [0.5] * (sampled - found)
    missed = by_hand([1.0, 1.5, 3.0], [1.0] * (dropped + 3), sampled=ranks).missed()
    assert (missed.found, missed.dropped) == (found, dropped)
    allowed = [m for m in range(dropped + 1) if hypergeom.cdf(found, dropped, m, sampled) > 0.05]
    assert missed.at_most == max(allowed)
    if sampled == dropped:
        assert missed.at_most == found
        assert f"all {dropped} dropped components were verified" in str(missed)


@pytest.mark.parametrize("marked", [0, 2, 6])
def test_the_bound_holds_as_often_as_it_claims(marked):
    """Of 27 dropped components `marked` exceed the threshold; samples of 9 bound their number in 95 % or more."""
    ranks, held = [2.0] * marked + [0.5] * (27 - marked), 0
    for seed in range(400):
        drawn = Random(seed).sample(ranks, 9)
        held += by_hand([1.0], [1.0] * 28, sampled=drawn).missed(confidence=0.8).at_most >= marked
    assert held / 400 >= 0.8 - 3 * (0.8 * 0.2 / 400) ** 0.5


def test_the_sample_depends_on_the_seed_alone_and_is_all_that_is_left_if_large(llama):
    prompts = tiny.prompts(llama)
    find = partial(screen_then_verify, llama, prompts, k=5)
    one, two, other = find(sample=4), find(sample=4, batch_size=3), find(sample=4, seed=1)
    assert one.sampled.components == two.sampled.components != other.sampled.components
    everything = find(sample=99)
    assert len(everything.sampled) == 10
    assert everything.missed().at_most == everything.missed().found
    assert find(sample=0).sampled is None
    assert find(sample=0).missed().at_most == 10


def test_bad_input_is_refused_and_the_model_left_as_it_was(model):
    prompts = tiny.prompts(model)
    with left_as_it_was(model):
        screen_then_verify(model, prompts, k=2, sample=1)
    with left_as_it_was(model), pytest.raises(ValueError, match="expected prompts with a corrupted counterpart"):
        screen_then_verify(model, replace(prompts, corrupt=None), k=2)
    with left_as_it_was(model), pytest.raises(ValueError, match=r"k must lie in 1\.\.15 .* got 16"):
        screen_then_verify(model, prompts, k=16)
    with left_as_it_was(model), pytest.raises(ValueError, match="expected exactly one of k, fraction"):
        screen_then_verify(model, prompts)
    with left_as_it_was(model), pytest.raises(ValueError, match="expected a sample of at least 0 components, got -1"):
        screen_then_verify(model, prompts, k=2, sample=-1)
