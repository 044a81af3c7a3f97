from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from mechunlearn.components import Component, ComponentMask, ComponentScores, ModelShape, heads_and_mlps, mlps

SHAPE = ModelShape(n_layers=3, n_heads=4, n_kv_heads=2, d_model=8, d_head=2, d_mlp=16, gated=True)
HEAD, MLP = 4 * 2 * 8, 3 * 16 * 8


def scores(values: dict[str, float], **fields: Any) -> ComponentScores:
    components = tuple(map(Component.parse, values))
    return ComponentScores(components, torch.tensor(list(values.values())), SHAPE, "method", "metric", **fields)


def random_scores(seed: int = 0) -> ComponentScores:
    components = tuple(heads_and_mlps(SHAPE))
    generator = torch.Generator().manual_seed(seed)
    per_prompt = torch.randn(20, len(components), generator=generator)
    return ComponentScores(components, per_prompt.mean(0), SHAPE, "method", "metric", {"seed": seed}, per_prompt)


def labels(mask: ComponentMask) -> list[str]:
    return [str(component) for component in mask]


FOUR = scores({"L0H0": 0.5, "L0MLP": -3.0, "L1H1": 2.0, "L2MLP": 1.0})


def test_scores_are_a_mapping_from_components_and_labels() -> None:
    assert FOUR["L0MLP"] == FOUR[Component(0, "MLP")] == -3.0
    assert len(FOUR) == 4
    assert "L1H1" in FOUR
    assert "L1H2" not in FOUR
    assert dict(FOUR) == dict(
        zip(map(Component.parse, ["L0H0", "L0MLP", "L1H1", "L2MLP"]), [0.5, -3, 2, 1], strict=True)
    )
    with pytest.raises(KeyError, match="L1H2"):
        FOUR["L1H2"]


def test_k_selects_the_largest_sizes() -> None:
    assert labels(FOUR.top(k=1)) == ["L0MLP"]
    assert labels(FOUR.top(k=2)) == ["L0MLP", "L1H1"]
    assert len(FOUR.top(k=4)) == 4


def test_by_decides_what_is_high() -> None:
    assert labels(FOUR.top(k=1, by=lambda t: t)) == ["L1H1"]
    assert labels(FOUR.top(k=2, by=torch.neg)) == ["L0H0", "L0MLP"]


@pytest.mark.parametrize(
    ("fraction", "count"), [(0.01, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.751, 4), (1.0, 4)]
)
def test_a_fraction_is_rounded_up(fraction: float, count: int) -> None:
    assert len(FOUR.top(fraction=fraction)) == count


def test_a_fraction_is_not_rounded_up_by_floating_point() -> None:
    shape = ModelShape(n_layers=100, n_heads=1, n_kv_heads=1, d_model=1, d_head=1, d_mlp=1, gated=False)
    hundred = ComponentScores(tuple(mlps(shape)), torch.rand(100), shape, "method")
    assert all(len(hundred.top(fraction=count / 100)) == count for count in range(1, 101))


def test_a_threshold_is_included() -> None:
    assert labels(FOUR.top(threshold=1.0)) == ["L0MLP", "L1H1", "L2MLP"]
    assert labels(FOUR.top(threshold=1.001)) == ["L0MLP", "L1H1"]
    assert labels(FOUR.top(threshold=-0.5, by=torch.neg)) == ["L0H0", "L0MLP"]


def test_the_component_that_crosses_the_budget_ends_the_selection() -> None:
    assert labels(FOUR.top(parameters=MLP)) == ["L0MLP"]
    assert labels(FOUR.top(parameters=MLP + HEAD - 1)) == ["L0MLP"]
    assert labels(FOUR.top(parameters=MLP + HEAD)) == ["L0MLP", "L1H1"]
    # L2MLP crosses, and L0H0, which would fit, comes after it.
    assert labels(FOUR.top(parameters=MLP + 2 * HEAD)) == ["L0MLP", "L1H1"]
    assert len(FOUR.top(parameters=10**9)) == 4


def test_shared_key_heads_are_paid_for_once() -> None:
    pair = scores({"L0H0": 3.0, "L0H1": 2.0, "L0H2": 1.0})
    assert labels(pair.top(parameters=HEAD + HEAD // 2)) == ["L0H0", "L0H1"]
    assert labels(pair.top(parameters=HEAD + HEAD // 2 - 1)) == ["L0H0"]


@pytest.mark.parametrize("seed", range(3))
def test_masks_of_one_rule_nest(seed: int) -> None:
    made = random_scores(seed)
    by_count = [made.top(k=k) for k in range(1, len(made) + 1)]
    by_budget = [made.top(parameters=n) for n in range(MLP, made.top(k=len(made)).n_parameters + 1, HEAD // 2)]
    for chain in (by_count, by_budget):
        assert all(small <= large for small, large in pairwise(chain))
    assert all(mask in by_count for mask in by_budget)


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_is_never_exceeded_and_the_next_component_would(seed: int) -> None:
    made = random_scores(seed)
    for budget in range(MLP, made.top(k=len(made)).n_parameters, 50):
        mask = made.top(parameters=budget)
        assert mask.n_parameters <= budget < made.top(k=len(mask) + 1).n_parameters


@pytest.mark.parametrize("seed", range(3))
def test_ties_go_to_the_component_that_comes_first_whatever_the_dictionary_order(seed: int) -> None:
    names = list(map(str, heads_and_mlps(SHAPE)))
    shuffled = Random(seed).sample(names, len(names))
    tied = scores(dict.fromkeys(shuffled, 1.0 if seed % 2 else -1.0))
    assert labels(tied.top(k=6)) == names[:6] == ["L0H0", "L0H1", "L0H2", "L0H3", "L0MLP", "L1H0"]


def test_opposite_signs_of_one_size_tie() -> None:
    assert labels(scores({"L2MLP": 1.0, "L0MLP": -1.0}).top(k=1)) == ["L0MLP"]


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must lie in 1..4 \(the number of scores\), got {k}"):
        FOUR.top(k=k)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, 5.0])
def test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"fraction must lie in \(0, 1\], .* 4 scores, got {fraction}"):
        FOUR.top(fraction=fraction)


@pytest.mark.parametrize("rule", [{"threshold": 3.1}, {"parameters": MLP - 1}, {"parameters": 0}])
def test_a_rule_that_selects_nothing_is_refused_with_the_highest(rule: dict) -> None:
    with pytest.raises(
        ValueError, match=rf"selects at least one .*got {rule}.* highest is L0MLP with 3 and {MLP} weights"
    ):
        FOUR.top(**rule)


def test_exactly_one_rule_is_asked_for() -> None:
    with pytest.raises(ValueError, match="exactly one of k, fraction, threshold and parameters, got none"):
        FOUR.top()
    with pytest.raises(ValueError, match=r"got {'k': 1, 'fraction': 0.5}"):
        FOUR.top(k=1, fraction=0.5)


def test_the_mask_says_where_it_came_from() -> None:
    made = random_scores(7).top(k=2)
    assert made.provenance == {"method": "method", "metric": "metric", "settings": {"seed": 7}, "top": {"k": 2}}
    assert made.shape == SHAPE


def test_values_that_do_not_match_the_components_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one value for each of 1 components .* got 2 values"):
        ComponentScores((Component(0, "MLP"),), torch.ones(2), SHAPE, "method")
    with pytest.raises(ValueError, match=r"each of 0 components \(at least one\)"):
        ComponentScores((), torch.ones(0), SHAPE, "method")


def test_a_component_that_is_scored_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="L0MLP"):
        ComponentScores((Component(0, "MLP"), Component(0, "MLP")), torch.ones(2), SHAPE, "method")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match="finite scores, got NaN or infinity at L1MLP: check the metric"):
        scores({"L0MLP": 1.0, "L1MLP": value})


def test_components_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="got L3MLP: was the mask or score made for another model"):
        scores({"L3MLP": 1.0})


def test_the_frame_has_a_row_per_component_highest_size_first() -> None:
    frame = FOUR.to_frame()
    assert list(frame.index) == ["L0MLP", "L1H1", "L2MLP", "L0H0"]
    assert frame.loc["L0MLP", "score"] == -3.0
    assert frame.loc["L1H1", ["layer", "part", "index", "weights"]].tolist() == [1, "H", 1, HEAD]
    assert frame["weights"].tolist() == [MLP, HEAD, MLP, HEAD]


def test_the_interval_agrees_with_scipy() -> None:
    """Two bootstraps of 5000 draws: percentiles differ by Monte Carlo noise, about 0.02 standard errors x 3."""
    generator = torch.Generator().manual_seed(1)
    per_prompt = torch.randn(40, 3, generator=generator).exp() * torch.tensor([1.0, 10.0, 0.1])
    made = ComponentScores(tuple(mlps(SHAPE)), per_prompt.mean(0), SHAPE, "method", per_prompt=per_prompt)
    frame = made.interval(confidence=0.9, draws=5000)
    for label, column in zip(frame.index, per_prompt.double().numpy().T, strict=True):
        options = {
            "confidence_level": 0.9,
            "n_resamples": 5000,
            "method": "percentile",
            "rng": np.random.default_rng(0),
        }
        expected = bootstrap((column,), np.mean, **options)
        tolerance = 0.1 * expected.standard_error
        assert frame.loc[label, "low"] == pytest.approx(expected.confidence_interval.low, abs=tolerance)
        assert frame.loc[label, "high"] == pytest.approx(expected.confidence_interval.high, abs=tolerance)
        assert frame.loc[label, "score"] == pytest.approx(column.mean(), rel=1e-6)


def test_an_interval_of_other_prompts_needs_prompts() -> None:
    """How often it contains them is in `tests/localize/test_intervals.py`."""
    with pytest.raises(ValueError, match="expected scores with per-prompt values"):
        scores({"L0MLP": 1.0}).interval(others=5)
    with pytest.raises(ValueError, match="expected two examples or more and one other or more, got 1 and 5"):
        scores({"L0MLP": 1.0}, per_prompt=torch.ones(1, 1)).interval(others=5)


def test_the_interval_of_equal_prompts_is_a_point_and_seeds_repeat() -> None:
    constant = ComponentScores(
        (Component(0, "MLP"),), torch.tensor([2.0]), SHAPE, "m", per_prompt=torch.full((9, 1), 2.0)
    )
    assert constant.interval().loc["L0MLP"].tolist() == pytest.approx([2, 2, 2])
    made = random_scores()
    assert made.interval(seed=3, draws=200).equals(made.interval(seed=3, draws=200))
    assert not made.interval(seed=3, draws=200).equals(made.interval(seed=4, draws=200))


def test_an_interval_needs_per_prompt_values() -> None:
    assert FOUR.n_prompts is None
    with pytest.raises(ValueError, match="expected scores with per-prompt values, got none: method does not give them"):
        FOUR.interval()


def test_the_plot_puts_each_score_in_its_cell() -> None:
    figure = FOUR.plot()
    heat = figure.data[0]
    assert list(heat.x) == ["H0", "H1", "MLP"]
    assert list(heat.y) == ["L0", "L1", "L2"]
    assert [list(row) for row in heat.z] == [[0.5, None, -3.0], [None, 2.0, None], [None, None, 1.0]]
    assert (heat.zmin, heat.zmid, heat.zmax) == (-3, 0, 3)
    assert figure.layout.title.text == "method: metric"


def test_repr_shows_the_strongest() -> None:
    assert "method, metric; 4 components; L0MLP: -3, L1H1: +2, L2MLP: +1, L0H0: +0.5" in repr(FOUR)


def test_negative_cells_bear_a_minus_that_survives_print() -> None:
    heat = FOUR.plot().data[0]
    assert [list(row) for row in heat.text] == [["", "", "–"], ["", "", ""], ["", "", ""]]
