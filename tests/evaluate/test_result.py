import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from mechunlearn.evaluate import Fraction, Result

VALUES = torch.randn(50, generator=torch.Generator().manual_seed(0)).exp()


def test_the_value_is_the_mean() -> None:
    assert Result(torch.tensor([0.0, 1.0, 1.0, 1.0]), "share").value == 0.75


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_agrees_with_scipy(confidence: float) -> None:
    """Two bootstraps of 5000 draws: Monte Carlo noise of the ends stays below a tenth of a standard error."""
    low, high = Result(VALUES, "size").interval(confidence=confidence, draws=5000)
    options = {"confidence_level": confidence, "n_resamples": 5000, "method": "percentile"}
    expected = bootstrap((VALUES.double().numpy(),), np.mean, rng=np.random.default_rng(0), **options)
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.1 * expected.standard_error)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.1 * expected.standard_error)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    """300 samples of 40 at 90 %: the share lies within 0.9 +- 0.06 (three standard errors, some undercoverage)."""
    samples = torch.rand(300, 40, generator=torch.Generator().manual_seed(1))
    inside = 0
    for seed, sample in enumerate(samples):
        low, high = Result(sample, "uniform").interval(confidence=0.9, draws=400, seed=seed)
        inside += low <= 0.5 <= high
    assert inside / 300 == pytest.approx(0.9, abs=0.06)


def test_more_confidence_gives_a_wider_interval_around_the_value() -> None:
    result = Result(VALUES, "size")
    narrow, wide = result.interval(confidence=0.5), result.interval(confidence=0.99)
    assert wide[0] < narrow[0] < result.value < narrow[1] < wide[1]


def test_intervals_repeat_by_seed() -> None:
    result = Result(VALUES, "size")
    assert result.interval(seed=1) == result.interval(seed=1)
    assert result.interval(seed=1) != result.interval(seed=2)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert Result(torch.full((7,), 0.5), "share").interval() == (0.5, 0.5)


@pytest.mark.parametrize(("right", "n"), [(33, 33), (0, 33), (1, 1), (7, 20)])
def test_shares_of_right_answers_have_clopper_and_pearsons_interval(right: int, n: int) -> None:
    """Against scipy, but for the noise of draws; 33 of 33 is no proof of 100 %."""
    from scipy.stats import binomtest

    result = Result(torch.tensor([1.0] * right + [0.0] * (n - right)), "share")
    expected = binomtest(right, n).proportion_ci(method="exact")
    assert result.interval(draws=20_000) == pytest.approx((expected.low, expected.high), abs=0.004)


def test_shares_near_one_have_an_interval_as_wide_as_counts() -> None:
    """33 facts near 1 are not [1.000, 1.000], nor are 33 of 0.000 [0.000, 0.000]."""
    low, high = Result(torch.full((33,), 0.9996), "probability", unit="share").interval()
    assert low == pytest.approx(0.894, abs=0.01)
    assert 0.9996 < high <= 1
    assert Result(torch.zeros(33), "probability", unit="share").interval()[1] == pytest.approx(0.106, abs=0.01)
    assert Result(torch.full((33,), 1.2), "no share", unit="share").limits is None


def test_a_difference_is_paired() -> None:
    """The same noise in both results cancels: a difference of .1 with no width, by hand."""
    noise = torch.linspace(0, 1, 11)
    one, other = Result(noise + 0.1, "x"), Result(noise, "x")
    assert one.difference(other) == pytest.approx((0.1, 0.1, 0.1), abs=1e-6)
    with pytest.raises(ValueError, match="expected results on the same examples"):
        one.difference(Result(noise[:5], "x"))


def test_repr_shows_value_interval_count_sense_and_chance() -> None:
    result = Result(torch.ones(3), "argmax over the candidates", chance=0.25)
    assert repr(result) == "Result(1.000 [0.303, 1.000] over 3 examples; argmax over the candidates, chance 0.250)"
    assert "chance" not in repr(Result(torch.ones(3), "share"))
    assert "chance 0.000" in repr(Result(torch.ones(3), "share", chance=0.0))


def test_a_result_and_a_fraction_are_formatted_like_their_value():
    result = Result(torch.tensor([0.25, 0.5]), "share of x")
    assert f"{result:.3f} {result:>7.1%}" == "0.375   37.5%"
    assert f"{result}" == repr(result)
    fraction = Fraction(0.5, 0.25, 0.75)
    assert f"{fraction:.1f} {fraction}" == "0.5 0.50 [0.25, 0.75]"
