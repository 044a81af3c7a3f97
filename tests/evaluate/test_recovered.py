"""Recovered, taught, net and left, by hand and against a slow bootstrap."""

import math

import numpy as np
import pytest
import torch

from mechunlearn.evaluate.fractions import Fraction, avoidance_fraction, left_fraction, recovery
from mechunlearn.evaluate.results import Result

NAMES = ("a", "b", "c", "d")


def result(*values: float, names: tuple[str, ...] = NAMES, chance: float | None = 0.05) -> Result:
    return Result(torch.tensor(values), "accuracy", chance, "share", names[: len(values)])


ORIGINAL = result(1.0, 1.0, 0.8, 0.8)  # mean 0.9
NEVER = result(0.1, 0.1, 0.2, 0.0)  # 0.1
UNLEARNED = result(0.1, 0.3, 0.2, 0.2)  # 0.2
ATTACKED = result(0.7, 0.5, 0.7, 0.5)  # 0.6
TAUGHT = result(0.3, 0.1, 0.3, 0.1)  # 0.2


def test_each_fraction_by_hand() -> None:
    """Of 0.9 - 0.1: recovered 0.6 - 0.2, taught 0.2 - 0.1, left 0.6 - 0.1."""
    found = recovery(ATTACKED, UNLEARNED, ORIGINAL, never_knew=NEVER, attacked_never_knew=TAUGHT)
    assert found.recovered.value == pytest.approx(0.5)
    assert found.taught.value == pytest.approx(0.125)
    assert found.net.value == pytest.approx(0.375)
    assert left_fraction(ATTACKED, ORIGINAL, never_knew=NEVER).value == pytest.approx(0.5 / 0.8)


def test_chance_stands_in_for_a_model_that_never_knew() -> None:
    found = recovery(ATTACKED, UNLEARNED, ORIGINAL)
    assert found.recovered.value == pytest.approx(0.4 / 0.85)
    assert math.isnan(found.net.value)
    assert found.net.reason == "no model that never knew"
    assert left_fraction(ATTACKED, ORIGINAL).value == pytest.approx(0.55 / 0.85)


def test_the_floor_is_the_larger_of_chance_and_never_knew_and_avoidance_is_below_the_smaller() -> None:
    """With chance 0.25 and never knew 0.1, chance is the floor and never knew the lower one."""
    original, never = result(*[0.9] * 4, chance=0.25), result(*[0.1] * 4, chance=0.25)
    tested = {value: result(*[value] * 4, chance=0.25) for value in (0.6, 0.25, 0.1, 0.0)}
    left = {value: left_fraction(each, original, never_knew=never).value for value, each in tested.items()}
    assert left == pytest.approx({0.6: 0.35 / 0.65, 0.25: 0.0, 0.1: -0.15 / 0.65, 0.0: -0.25 / 0.65})
    avoided = {value: avoidance_fraction(each, original, never_knew=never).value for value, each in tested.items()}
    assert avoided == pytest.approx({0.6: -0.5 / 0.8, 0.25: -0.15 / 0.8, 0.1: 0.0, 0.0: 0.1 / 0.8})
    above = result(*[0.5] * 4, chance=0.25)
    assert left_fraction(tested[0.6], original, never_knew=above).value == pytest.approx(0.1 / 0.4)
    found = recovery(tested[0.6], tested[0.0], original, never_knew=never, attacked_never_knew=tested[0.25])
    assert found.recovered.value == pytest.approx(0.6 / 0.65)
    assert found.taught.value == pytest.approx(0.15 / 0.65)


def test_the_original_has_all_left_and_a_guesser_nothing_however_few_the_facts() -> None:
    """Of guessers of 33 facts, 0.975 or more have an interval that reaches 0."""
    names = tuple(map(str, range(33)))
    original = result(*[1.0] * 33, names=names, chance=0.25)
    assert left_fraction(original, original) == Fraction(1.0, 1.0, 1.0)
    random = np.random.default_rng(0)
    guessers = [result(*random.binomial(1, 0.25, 33).astype(float), names=names, chance=0.25) for _ in range(200)]
    lows = [left_fraction(guesser, original, draws=500, seed=i).low for i, guesser in enumerate(guessers)]
    assert sum(low > 0 for low in lows) <= 8
    avoided = [avoidance_fraction(guesser, original, draws=500).low for guesser in guessers]
    assert sum(low > 0 for low in avoided) <= 8


def test_nothing_is_clipped() -> None:
    low, high = result(0.0, 0.0, 0.0, 0.0), result(1.0, 1.0, 1.0, 1.0)
    assert recovery(low, UNLEARNED, ORIGINAL, never_knew=NEVER).recovered.value == pytest.approx(-0.25)
    assert recovery(high, low, ORIGINAL, never_knew=NEVER).recovered.value == pytest.approx(1.25)


def test_an_attack_that_teaches_as_much_as_it_brings_back_recovers_nothing_net() -> None:
    """0.9 on both: recovered 0.7 / 0.8, taught 0.8 / 0.8."""
    found = recovery(ORIGINAL, UNLEARNED, ORIGINAL, never_knew=NEVER, attacked_never_knew=ORIGINAL)
    assert (found.recovered.value, found.taught.value) == pytest.approx((0.875, 1.0))
    assert found.net.value == pytest.approx(-0.125)


@pytest.mark.parametrize("never", [ORIGINAL, result(1.0, 1.0, 1.0, 0.7), result(0.0, 1.0, 1.0, 1.0)])
def test_a_denominator_that_is_not_clearly_above_0_gives_a_reason(never: Result) -> None:
    found = recovery(ATTACKED, UNLEARNED, ORIGINAL, never_knew=never).recovered
    assert all(map(math.isnan, (found.value, found.low, found.high)))
    assert "original minus floor is not clearly above 0" in found.reason
    assert str(found) == "undefined"
    assert "no chance level" in left_fraction(ATTACKED, result(1.0, 1.0, 1.0, 1.0, chance=None)).reason


def test_the_interval_resamples_the_same_facts_in_every_result() -> None:
    """Against a loop that weighs five facts, the last at 0 for the low end and at 1 for the high one in what is tested.

    4000 draws each, so the ends differ by Monte Carlo noise alone.
    """
    found = recovery(ATTACKED, UNLEARNED, ORIGINAL, never_knew=NEVER, attacked_never_knew=TAUGHT, draws=4000)
    random = np.random.default_rng(1)
    columns = [each.per_example.double().numpy() for each in (ATTACKED, UNLEARNED, ORIGINAL, NEVER, TAUGHT)]
    drawn = []
    for _ in range(4000):
        *weights, unseen = random.dirichlet([1.0] * 5)
        a, u, o, n, t = (float(np.average(column, weights=weights)) for column in columns)
        least, most = (1 - unseen) * a, (1 - unseen) * a + unseen
        low, high = (1 - unseen) * t, (1 - unseen) * t + unseen
        gains = (least - u, most - u, low - n, high - n, least - u - t + n, most - u - t + n)
        drawn.append([gain / (o - n) for gain in gains])
    expected = [np.quantile(column, (0.025, 0.975)) for column in np.array(drawn).T]
    for place, each in enumerate((found.recovered, found.taught, found.net)):
        assert each.low == pytest.approx(expected[2 * place][0], abs=0.03)
        assert each.high == pytest.approx(expected[2 * place + 1][1], abs=0.03)
        assert each.low <= each.value <= each.high


def test_facts_that_all_agree_leave_no_width_and_pairing_cancels_noise() -> None:
    noise = torch.tensor([0.0, 0.1, 0.2, 0.3])
    models = [Result(noise + start, "size", 0.05, names=NAMES) for start in (0.4, 0.2, 0.6, 0.0)]
    found = recovery(models[0], models[1], models[2], never_knew=models[3]).recovered
    assert (found.value, found.low, found.high) == pytest.approx((1 / 3,) * 3)


def test_seeds_are_resampled_too() -> None:
    """Two seeds, 0.4 and 0.8 on every fact: the mean is 0.6 and the interval reaches to both."""
    flat = [Result(torch.full((4,), value), "size", None, names=NAMES) for value in (0.4, 0.8, 0.2, 1.5, 0.5)]
    attacked = {0: flat.pop(0), 1: flat.pop(0)}
    found = recovery(attacked, flat[0], flat[1], never_knew=flat[2]).recovered
    assert (found.value, found.low, found.high) == pytest.approx((0.4, 0.2, 0.6))


def test_only_the_facts_that_the_attack_was_tested_on_count_with_each_seed() -> None:
    """Seed 0 tests a and b, seed 1 only c: unlearned is (0.1 + 0.3 + 0.2) / 3 and original 2.8 / 3."""
    attacked = {0: result(0.7, 0.5), 1: result(0.6, names=("c",))}
    found = recovery(attacked, UNLEARNED, ORIGINAL, never_knew=NEVER).recovered
    assert found.value == pytest.approx((1.8 - 0.6) / (2.8 - 0.4))
    with pytest.raises(ValueError, match="expected results on the same facts, got one without 'd'"):
        recovery(ATTACKED, result(0.1, 0.3, 0.2), ORIGINAL)


def test_prompts_about_one_fact_are_one_fact() -> None:
    attacked = result(0.6, 0.8, 0.5, names=("a", "a", "b"))
    found = recovery(attacked, UNLEARNED, ORIGINAL, never_knew=NEVER).recovered
    assert found.value == pytest.approx((0.7 + 0.5 - 0.4) / (2.0 - 0.2))
