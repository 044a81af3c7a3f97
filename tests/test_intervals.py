"""Bootstrap intervals of means."""

import torch

from mechunlearn.intervals import bootstrap


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
