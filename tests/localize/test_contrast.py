"""Numbers worked out by hand."""

import pytest
import torch

from mechunlearn.components import Component, ComponentScores, ModelShape
from mechunlearn.localize import (
    absolute,
    average,
    contrast,
    mean_absolute,
    per_weight,
    rank_difference,
    ratio,
    standardised_difference,
)

SHAPE = ModelShape(n_layers=2, n_heads=2, n_kv_heads=1, d_model=8, d_head=4, d_mlp=16, gated=False)
LABELS = ("L0H0", "L0MLP", "L1H1")


def scores(*values, labels=LABELS, shape=SHAPE, metric="nats"):
    given = dict(zip(labels, map(float, values), strict=True))
    return ComponentScores.of(given, shape, method="mine", metric=metric)


def values(result):
    return [result[label] for label in LABELS]


def test_contrast_subtracts_with_a_weight():
    assert values(contrast(scores(3, -1, 0), scores(1, 1, 2))) == [2, -2, -2]
    assert values(contrast(scores(3, -1, 0), scores(1, 1, 2), weight=0.5)) == [2.5, -1.5, -1]


def test_the_order_of_components_does_not_matter():
    other = scores(2, 1, 1, labels=("L1H1", "L0MLP", "L0H0"))
    result = contrast(scores(3, -1, 0), other)
    assert values(result) == [2, -2, -2]
    assert result.components == scores(0, 0, 0).components


def test_ratio_divides_sizes():
    assert values(ratio(scores(-3, 1, 0), scores(1, -2, 5))) == [3, 0.5, 0]
    assert values(ratio(scores(-3, 1, 0), scores(0, -2, 5), damping=1.0)) == pytest.approx([3, 1 / 3, 0])


def test_ratio_refuses_to_divide_by_nothing():
    with pytest.raises(ValueError, match=r"expected retain scores other than 0, got 0 at L0MLP: pass damping"):
        ratio(scores(1, 1, 1), scores(1, 0, 1))
    with pytest.raises(ValueError, match=r"expected a damping of at least 0, got -1\.0"):
        ratio(scores(1, 1, 1), scores(1, 2, 1), damping=-1.0)


def test_standardised_difference_compares_z_scores():
    """(1, 2, 3) and (10, 30, 20) have z-scores (-1, 0, 1) and (-1, 1, 0)."""
    assert values(standardised_difference(scores(1, 2, 3), scores(10, 30, 20))) == pytest.approx([0, -1, 1])
    with pytest.raises(ValueError, match="expected retain scores that differ between components"):
        standardised_difference(scores(1, 2, 3), scores(2, 2, 2))


def test_rank_difference_compares_ranks_of_sizes():
    assert values(rank_difference(scores(-5, 1, 2), scores(0, 7, 3))) == [1, -1, 0]
    assert values(rank_difference(scores(4, 4, 9), scores(1, 2, 3))) == [0.25, -0.25, 0]
    with pytest.raises(ValueError, match="expected at least two components"):
        rank_difference(scores(1, labels=("L0H0",)), scores(1, labels=("L0H0",)))


def with_prompts(rows):
    per_prompt = torch.tensor(rows, dtype=torch.float64)
    components = tuple(map(Component.parse, LABELS))
    return ComponentScores(components, per_prompt.mean(0), SHAPE, "mine", "nats", {"seed": 3}, per_prompt)


def test_mean_absolute_does_not_let_prompts_cancel():
    signed = with_prompts([[2, -1, 0], [-2, -3, 1]])
    assert values(signed) == [0, -2, 0.5]
    assert values(absolute(signed)) == [0, 2, 0.5]
    sizes = mean_absolute(signed)
    assert values(sizes) == [2, 2, 0.5]
    assert sizes.interval().loc["L0MLP", "low"] == 1
    with pytest.raises(ValueError, match="expected scores with per-prompt values, got none: mine"):
        mean_absolute(scores(1, 2, 3))


def test_per_weight_divides_by_the_number_of_weights():
    """A head of this model has 4 * 32 weights, an MLP 2 * 128."""
    assert values(per_weight(scores(128, 256, -128))) == [1, 1, -1]


def test_mean_over_weighs_all_the_same():
    assert values(average(scores(1, 2, 3), scores(3, 2, 1), scores(2, 5, 2))) == [2, 3, 2]
    with pytest.raises(ValueError, match="expected at least one ComponentScores, got none"):
        average()


@pytest.mark.parametrize("combine", [contrast, ratio, standardised_difference, rank_difference, average])
def test_scores_over_other_components_are_refused(combine):
    with pytest.raises(ValueError, match=r"same components, got 2 that only one of them has \(L0H1, L1H1\)"):
        combine(scores(1, 2, 3), scores(1, 2, 4, labels=("L0H0", "L0MLP", "L0H1")))
    other = ModelShape(n_layers=3, n_heads=2, n_kv_heads=1, d_model=8, d_head=4, d_mlp=16, gated=False)
    with pytest.raises(ValueError, match="expected scores of models of the same shape"):
        combine(scores(1, 2, 3), scores(1, 2, 4, shape=other))


def test_where_it_came_from_is_kept_and_saved(tmp_path):
    result = contrast(with_prompts([[1, 2, 3]]), scores(1, 2, 4, metric="probability"), weight=2.0)
    assert (result.method, result.metric, result.per_prompt) == ("contrast", "nats, probability", None)
    forget = {"method": "mine", "metric": "nats", "settings": {"seed": 3}}
    assert result.settings["forget"] == forget
    assert result.settings["weight"] == 2.0
