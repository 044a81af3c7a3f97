"""Intervals of means: bounded and bootstrap."""

from itertools import pairwise
from math import isnan, sqrt

import numpy as np
import pytest
import torch
from scipy.stats import beta, norm, t

from mechunlearn.intervals import bootstrap, bootstrap_of_others, bounded


def test_the_interval_is_the_percentiles_of_resampled_means():
    """The slow way: resample, average, sort."""
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).double()
    low, high = bootstrap(values, confidence=0.9, draws=500, seed=5)
    drawn = torch.randint(7, (500, 7), generator=torch.Generator().manual_seed(5))
    means = torch.stack([values[rows].mean(0) for rows in drawn])
    for i in range(3):
        expected = torch.quantile(means[:, i], torch.tensor([0.05, 0.95]).double())
        assert torch.allclose(torch.stack([low[i], high[i]]), expected)


def test_examples_without_a_value_are_left_out():
    values = torch.tensor([[1.0, float("nan")], [2.0, 5.0], [4.0, 5.0]])
    low, high = bootstrap(values)
    assert 1 <= low[0] < high[0] <= 4
    assert (low[1], high[1]) == (5.0, 5.0)


def test_one_number_and_many_shapes():
    assert bootstrap(torch.ones(4))[0].shape == ()
    assert bootstrap(torch.ones(4, 2, 3))[1].shape == (2, 3)
    assert bootstrap_of_others(torch.ones(4), 2)[0].shape == ()
    assert bootstrap_of_others(torch.ones(4, 2, 3), 2)[1].shape == (2, 3)


def one_by_one(values, others, confidence, draws, seed):
    """The slow way for one number: resample two sets, subtract their means, sort, widen."""
    drawn = torch.randint(len(values), (draws, len(values) + others), generator=torch.Generator().manual_seed(seed))
    away = []
    for row in drawn.tolist():
        own, other = (mean([values[i] for i in part]) for part in (row[: len(values)], row[len(values) :]))
        away.append(other - own)
    n, tail = sum(not isnan(value) for value in values), (1 + confidence) / 2
    widened = sqrt(n / (n - 1)) * t.ppf(tail, n - 1) / norm.ppf(tail)
    return [mean(values) + widened * np.nanquantile(away, end) for end in (1 - tail, tail)]


def mean(values):
    there = [value for value in values if not isnan(value)]
    return sum(there) / len(there) if there else float("nan")


@pytest.mark.parametrize("missing", [0, 3])
@pytest.mark.parametrize("others", [1, 4, 30])
def test_the_interval_of_others_agrees_with_one_made_one_by_one(others, missing):
    values = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)).exp().double()
    values[:missing, 1] = float("nan")
    found = torch.stack(bootstrap_of_others(values, others, confidence=0.9, draws=300, seed=5))
    for number in range(2):
        slow = one_by_one(values[:, number].tolist(), others, 0.9, 300, 5)
        assert found[:, number].tolist() == pytest.approx(slow, rel=1e-9)


def test_the_interval_of_others_of_normal_values_is_students():
    """mean +- t * s * sqrt(1 / n + 1 / others), the textbook's; the ends' Monte Carlo error is .02 of it."""
    values = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)).double()
    low, high = bootstrap_of_others(values, 25, draws=4000)
    half = float(t.ppf(0.975, 199)) * values.std(0) * sqrt(1 / 200 + 1 / 25)
    assert torch.allclose((low + high) / 2, values.mean(0), atol=0.1 * float(half.mean()))
    assert float(((high - low) / 2 / half).mean()) == pytest.approx(1, abs=0.02)


def test_with_very_many_others_only_the_own_mean_varies():
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    width = torch.stack(bootstrap_of_others(values, 20_000, draws=1000)).diff(dim=0)
    own = torch.stack(bootstrap(values)).diff(dim=0)
    widened = sqrt(40 / 39) * t.ppf(0.975, 39) / norm.ppf(0.975)
    assert torch.allclose(width, widened * own, rtol=0.1)


def test_numbers_are_independent_of_each_other_and_of_how_many_there_are():
    values = torch.randn(6, 1500, generator=torch.Generator().manual_seed(0)).double()
    low, high = bootstrap_of_others(values, 3, draws=100)
    alone = bootstrap_of_others(values[:, 1200], 3, draws=100)
    assert torch.allclose(torch.stack(alone), torch.stack([low[1200], high[1200]]))


def test_one_value_does_not_say_how_much_values_differ():
    values = torch.tensor([[1.0, 1.0], [2.0, float("nan")], [4.0, float("nan")]])
    low, high = bootstrap_of_others(values, 50)
    assert low[0] < high[0]
    assert isnan(low[1])
    assert isnan(high[1])


@pytest.mark.parametrize(("examples", "others"), [(1, 5), (5, 0), (5, -1)])
def test_too_few_examples_or_others_are_refused(examples, others):
    with pytest.raises(ValueError, match="expected two examples or more and one other or more"):
        bootstrap_of_others(torch.ones(examples, 2), others)


def test_the_bounded_interval_of_yes_and_no_is_clopper_and_pearsons():
    """The exact one: quantiles of Beta distributions; draws move an end by a few thousandths."""
    for yes in (0, 1, 20, 33):
        values = torch.tensor([1.0] * yes + [0.0] * (33 - yes))
        low, high = (float(end) for end in bounded(values, draws=20_000))
        assert low == pytest.approx(beta.ppf(0.025, yes, 34 - yes) if yes else 0.0, abs=0.004)
        assert high == pytest.approx(beta.ppf(0.975, yes + 1, 33 - yes) if yes < 33 else 1.0, abs=0.004)


def test_the_bounded_interval_agrees_with_one_made_one_by_one():
    """The slow way: cut a stick at random places, weigh the sorted values with its pieces."""
    values, cuts = [0.2, 0.9, 0.4, 0.4, 1.0, 0.7], np.random.default_rng(0)
    least, most = [], []
    for _ in range(20_000):
        edges = [0.0, *sorted(cuts.random(len(values))), 1.0]
        pieces = [after - before for before, after in pairwise(edges)]
        least.append(sum(w * x for w, x in zip(pieces, [0.0, *values], strict=True)))
        most.append(sum(w * x for w, x in zip(pieces, [*values, 1.0], strict=True)))
    low, high = bounded(torch.tensor(values), confidence=0.9, draws=20_000)
    assert (float(low), float(high)) == pytest.approx((np.quantile(least, 0.05), np.quantile(most, 0.95)), abs=0.006)


@pytest.mark.parametrize("n", [8, 16, 33, 64])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (0.5, 0.5), (4, 0.2), (0.1, 2)])
def test_the_bounded_interval_covers_also_where_values_are_skewed_and_near_the_ends(n, a, b):
    """2,000 sets of Beta-distributed values: the standard error of 0.95 is 0.005."""
    uniform = torch.rand(n, 2000, generator=torch.Generator().manual_seed(n)).numpy()
    low, high = bounded(torch.from_numpy(beta.ppf(uniform, a, b)), draws=1000)
    mean = a / (a + b)
    assert float(((low <= mean) & (mean <= high)).double().mean()) > 0.94


def test_equal_values_leave_room_for_what_was_not_seen():
    low, high = bounded(torch.full((33, 2), 0.999))
    assert torch.allclose(low, torch.tensor(0.999 * 0.025 ** (1 / 33)).double(), atol=0.01)
    assert (high < 1).all()
    assert (high > 0.999).all()


def test_other_limits_and_examples_without_a_value():
    values = torch.tensor([[0.1, float("nan")], [0.7, 0.5], [0.4, 0.9], [0.9, 0.2]])
    low, high = (end.double() for end in bounded(values))
    alone = bounded(values[1:, 1])
    assert low[1] == pytest.approx(float(alone[0]), abs=0.02)  # of other draws
    assert high[1] == pytest.approx(float(alone[1]), abs=0.02)
    doubled = bounded(2 * values - 1, (-1.0, 1.0))
    assert torch.allclose(torch.stack(doubled), 2 * torch.stack([low, high]) - 1)
    with pytest.raises(ValueError, match=r"expected values from 0\.0 to 1\.0, got -0\.8"):
        bounded(2 * values - 1)
