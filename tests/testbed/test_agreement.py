"""Agreement with the truth, by hand on a toy of four heads and two MLPs."""

import pytest
from sklearn.metrics import roc_auc_score

import mechunlearn as mu
from mechunlearn.testbed import agreement, within

SHAPE = mu.ModelShape(n_layers=2, n_heads=2, n_kv_heads=2, d_model=4, d_head=2, d_mlp=4, gated=False)
HEAD, MLP = 4 * 2 * 4, 2 * 4 * 4
VALUES = {"L0H0": 0.1, "L0H1": -0.9, "L0MLP": 0.5, "L1H0": 0.2, "L1H1": 0.3, "L1MLP": -0.4}


def scored(values=VALUES):
    return mu.ComponentScores.of(values, SHAPE)


def mask(*labels):
    return mu.ComponentMask.of(labels, SHAPE)


def test_auroc_and_precision_by_hand():
    found = agreement(scored(), mask("L0H1", "L1MLP"))
    assert found.auroc == pytest.approx(7 / 8)  # of 2 x 4 pairs, only (L1MLP, L0MLP) is the wrong way round
    assert found.precision == 1 / 2  # the two highest are L0H1 and L0MLP
    assert found.chance == pytest.approx(2 / 6)


def test_the_whole_truth_on_top_is_1_and_at_the_bottom_0():
    top, bottom = agreement(scored(), mask("L0H1", "L0MLP")), agreement(scored(), mask("L0H0", "L1H0"))
    assert (top.auroc, top.precision, top.covered) == (1, 1, 1)
    assert (bottom.auroc, bottom.precision, bottom.covered) == (0, 0, 0)


def test_equal_scores_are_chance():
    found = agreement(scored(dict.fromkeys(VALUES, 0.0)), mask("L0H1", "L1MLP"))
    assert found.auroc == found.auroc_of_weights == 0.5
    assert found.precision == pytest.approx(found.chance)


def test_by_weights_a_large_component_counts_more():
    shape = mu.ModelShape(n_layers=2, n_heads=2, n_kv_heads=2, d_model=4, d_head=2, d_mlp=12, gated=False)
    truth = mu.ComponentMask.of(["L0H1", "L1MLP"], shape)
    found = agreement(mu.ComponentScores.of(VALUES, shape), truth)
    large = 2 * 12 * 4
    pairs = {(32, 32): 3, (32, large): 1, (large, 32): 3}  # (true, other): right pairs
    assert found.auroc_of_weights == pytest.approx(
        sum(a * b * n for (a, b), n in pairs.items()) / ((32 + large) * (3 * 32 + large))
    )


def test_an_attention_layer_in_the_truth_makes_each_of_its_heads_true():
    found = agreement(scored(), mask("L1ATTN"))
    assert found.auroc == pytest.approx(roc_auc_score([0, 0, 0, 1, 1, 0], [abs(v) for v in VALUES.values()]))
    assert found.chance == pytest.approx(2 / 6)


def test_half_of_an_mlps_neurons_make_it_true_and_fewer_do_not():
    assert agreement(scored(), mask("L0N0", "L0N1", "L1H0")).chance == pytest.approx(2 / 6)
    assert agreement(scored(), mask("L0N0", "L1H0")).chance == pytest.approx(1 / 6)


def test_a_mask_is_scored_by_what_it_covers():
    found = agreement(mask("L0ATTN", "L0MLP"), mask("L0H1", "L1MLP"))
    assert found.auroc == pytest.approx(((0.5 + 0.5 + 1 + 1) + (0 + 0 + 0.5 + 0.5)) / 8)  # of the head, of the MLP
    assert found.covered == HEAD / (HEAD + MLP)


def test_within_passes_over_what_does_not_fit():
    shape = mu.ModelShape(n_layers=2, n_heads=2, n_kv_heads=2, d_model=4, d_head=2, d_mlp=12, gated=False)
    scores = mu.ComponentScores.of({"L0MLP": 0.9, "L0H1": -0.5, "L1H0": 0.4, "L1H1": 0.3}, shape)
    assert within(scores, 64) == mu.ComponentMask.of(["L0H1", "L1H0"], shape)
    assert within(scores, 128) == mu.ComponentMask.of(["L0MLP", "L0H1"], shape)
    with pytest.raises(ValueError, match="holds at least one component, got 31 weights"):
        within(scores, 31)


def test_a_truth_that_leaves_nothing_to_tell_apart_is_an_error():
    with pytest.raises(ValueError, match="some scored components in the truth and some not, got 0 of 2"):
        agreement(scored({"L0H0": 1.0, "L0H1": 2.0}), mask("L1MLP"))


def test_a_truth_of_another_shape_is_an_error():
    other = mu.ModelShape(n_layers=2, n_heads=2, n_kv_heads=2, d_model=4, d_head=2, d_mlp=12, gated=False)
    with pytest.raises(ValueError, match="expected scores of a model of the truth's shape"):
        agreement(scored(), mu.ComponentMask.of(["L1MLP"], other))
