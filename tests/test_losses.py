import math
from functools import partial

import pytest
import torch

from mechunlearn.losses import (
    Loss,
    cross_entropy,
    cross_entropy_unlearning,
    gradient_ascent,
    log_one_minus_probability,
    maximum_entropy,
    weighted_gradient_ascent,
)

LOG = math.log
never_stopping = partial(log_one_minus_probability, cutoff=-math.inf)
SMOOTH = {
    "cross_entropy": cross_entropy,
    "log_one_minus_probability": never_stopping,
    "gradient_ascent": gradient_ascent,
    "maximum_entropy": maximum_entropy,
}
"""Whose gradient is that of their value; the others hold a part of it."""
WITH_HELD_PARTS = {
    "weighted_gradient_ascent": weighted_gradient_ascent,
    "cross_entropy_unlearning": cross_entropy_unlearning,
}
EVERY = pytest.mark.parametrize("loss", list((SMOOTH | WITH_HELD_PARTS).values()), ids=[*SMOOTH, *WITH_HELD_PARTS])

# Probabilities 1/8 2/8 5/8; 3/4 1/8 1/8; 1/3 1/3 1/3.
LOGITS = torch.tensor([[1.0, 2.0, 5.0], [6.0, 1.0, 1.0], [1.0, 1.0, 1.0]]).log()
TARGETS = torch.tensor([2, 0, 1])
P = [5 / 8, 3 / 4, 1 / 3]


def test_cross_entropy_is_minus_log_p() -> None:
    assert cross_entropy(LOGITS, TARGETS).tolist() == pytest.approx([-LOG(p) for p in P])


def test_log_one_minus_probability_is_minus_log_of_the_rest() -> None:
    assert log_one_minus_probability(LOGITS, TARGETS).tolist() == pytest.approx([-LOG(1 - p) for p in P])


def test_the_examples_of_the_docstrings_hold() -> None:
    logits, target = torch.tensor([[0.0, LOG(3)]]), torch.tensor([1])
    assert cross_entropy(logits, target).item() == pytest.approx(0.2877, abs=5e-5)
    assert gradient_ascent(logits, target).item() == pytest.approx(-0.2877, abs=5e-5)
    assert weighted_gradient_ascent(logits, target).item() == pytest.approx(-0.2158, abs=5e-5)
    assert maximum_entropy(logits, target).item() == pytest.approx(0.1438, abs=5e-5)
    three = torch.tensor([[0.0, 0.0, LOG(2)]])
    assert cross_entropy_unlearning(three, torch.tensor([2])).item() == pytest.approx(1.3863, abs=5e-5)
    assert log_one_minus_probability(logits, target).item() == pytest.approx(1.3863, abs=5e-5)


def gradient_of(loss: Loss) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(loss(logits, TARGETS).sum(), logits)[0]


def test_weighted_ascent_is_ascent_times_the_probability_held() -> None:
    expected = gradient_of(gradient_ascent) * torch.tensor(P)[:, None] ** 2
    torch.testing.assert_close(gradient_of(partial(weighted_gradient_ascent, beta=2.0)), expected)
    assert torch.equal(weighted_gradient_ascent(LOGITS, TARGETS, beta=0.0), gradient_ascent(LOGITS, TARGETS))


def test_unlearning_by_cross_entropy_pulls_to_the_rest_of_the_prediction() -> None:
    """The gradient is p minus what is learned: 1/3 2/3 0 in the first row."""
    learned = torch.tensor([[1 / 3, 2 / 3, 0.0], [0.0, 1 / 2, 1 / 2], [1 / 2, 0.0, 1 / 2]])
    torch.testing.assert_close(gradient_of(cross_entropy_unlearning), LOGITS.softmax(-1) - learned)


def test_the_least_known_is_the_uniform_distribution() -> None:
    values = maximum_entropy(LOGITS, TARGETS)
    assert values[2].item() == pytest.approx(0, abs=1e-6)
    assert bool((values[:2] > 0.01).all())
    assert torch.equal(values, maximum_entropy(LOGITS, TARGETS.flip(0)))


def test_a_token_below_the_cutoff_contributes_nothing() -> None:
    # p = 0.0066 lies below exp(-5) = 0.00674, p = 0.007 above it.
    logits = torch.tensor([[0.0066, 0.9934], [0.007, 0.993]]).log().requires_grad_()
    loss = log_one_minus_probability(logits, torch.tensor([0, 0]))
    assert loss.tolist() == pytest.approx([0, -LOG(0.993)], rel=1e-4)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert not gradient[0].any()
    assert gradient[1].all()


def test_the_cutoff_is_in_nats_and_minus_infinity_never_stops() -> None:
    logits, target = torch.tensor([[0.2, 0.8]]).log(), torch.tensor([0])
    assert log_one_minus_probability(logits, target, cutoff=LOG(0.19)).item() == pytest.approx(-LOG(0.8))
    assert log_one_minus_probability(logits, target, cutoff=LOG(0.21)).item() == 0
    rare = torch.tensor([[1e-3, 1 - 1e-3]]).log()
    assert never_stopping(rare, target).item() == pytest.approx(-LOG(1 - 1e-3), rel=1e-3)


def test_the_cutoff_itself_still_counts() -> None:
    logits, target = torch.zeros(1, 2), torch.tensor([0])
    exactly = float(logits.log_softmax(-1)[0, 0])
    assert log_one_minus_probability(logits, target, cutoff=exactly).item() == pytest.approx(LOG(2))


@pytest.mark.parametrize("margin", [5.0, 10.0, 15.0, 20.0, 40.0, 80.0])
def test_log_one_minus_probability_is_right_when_p_nears_one(margin: float) -> None:
    """-log(1 - p) = log(1 + exp(margin) / n) for a margin over n others; 1 - p underflows float32 from 17 on."""
    logits = torch.zeros(1, 11)
    logits[0, 3] = margin
    reference = torch.log1p(torch.tensor(margin, dtype=torch.float64).exp() / 10).item()
    loss = log_one_minus_probability(logits, torch.tensor([3]))
    assert loss.item() == pytest.approx(reference, rel=1e-4)


@EVERY
def test_losses_and_gradients_stay_finite_at_extreme_logits(loss: Loss) -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4], [1e4, 1e4, 1e4]], requires_grad=True)
    values = loss(logits, torch.tensor([0, 0, 1]))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert bool(values.isfinite().all())
    assert bool(gradient.isfinite().all())


@EVERY
def test_losses_of_half_precision_logits_are_computed_in_float32(loss: Loss) -> None:
    half = LOGITS.bfloat16()
    values = loss(half, TARGETS)
    assert values.dtype == torch.float32
    assert torch.equal(values, loss(half.float(), TARGETS))


@pytest.mark.parametrize("loss", list(SMOOTH.values()), ids=list(SMOOTH))
def test_gradients_agree_with_finite_differences(loss: Loss) -> None:
    """The losses compute in float32, so the step is large (0.02) and the tolerance 1e-3."""
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits, eps=2e-2, atol=1e-3, rtol=1e-3)


def test_gradients_are_those_worked_out_by_hand() -> None:
    # d(-log p) = softmax - onehot; d(-log(1 - p)) = p / (1 - p) * (onehot - softmax)
    logits = LOGITS.clone().requires_grad_()
    away = torch.nn.functional.one_hot(TARGETS, 3) - LOGITS.softmax(-1)
    p = torch.tensor(P)[:, None]
    for loss, expected in ((cross_entropy, -away), (log_one_minus_probability, p / (1 - p) * away)):
        (gradient,) = torch.autograd.grad(loss(logits, TARGETS).sum(), logits)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@EVERY
def test_a_shift_of_all_logits_changes_nothing(loss: Loss) -> None:
    torch.testing.assert_close(loss(LOGITS + 10, TARGETS), loss(LOGITS, TARGETS), rtol=1e-5, atol=1e-5)


@EVERY
def test_each_token_has_its_own_loss(loss: Loss) -> None:
    values = loss(LOGITS, TARGETS)
    assert values.shape == (3,)
    torch.testing.assert_close(torch.cat([loss(LOGITS[i : i + 1], TARGETS[i : i + 1]) for i in range(3)]), values)


def test_learning_and_erasing_pull_in_opposite_directions() -> None:
    logits = LOGITS.clone().requires_grad_()
    learn, erase = (
        torch.autograd.grad(loss(logits, TARGETS).sum(), logits)[0]
        for loss in (cross_entropy, log_one_minus_probability)
    )
    assert bool((learn * erase <= 0).all())
    assert bool((erase.gather(1, TARGETS[:, None]) > 0).all())


def test_the_logits_are_left_as_they_were() -> None:
    logits = LOGITS.clone()
    for loss in (cross_entropy, log_one_minus_probability):
        loss(logits, TARGETS)
    assert torch.equal(logits, LOGITS)
