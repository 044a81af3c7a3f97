"""Recovered, taught, net and left, by hand and against a slow bootstrap."""

import math

import numpy as np
import pytest
import torch

from mechunlearn.evaluate.fractions import left_fraction, recovery
from mechunlearn.evaluate.results import Result

NAMES = ("a", "b", "c", "d")


def result(*values: float, names: tuple[str, ...] = NAMES, chance: float | None = 0.25) -> Result:
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
    assert found.recovered.value == pytest.approx(0.4 / 0.65)
    assert math.isnan(found.net.value)
    assert found.net.reason == "no model that never knew"
    assert left_fraction(ATTACKED, ORIGINAL).value == pytest.approx(0.35 / 0.65)


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
    assert "original minus never knew is not clearly above 0" in found.reason
    assert str(found) == "undefined"
    assert "no chance level" in left_fraction(ATTACKED, result(1.0, 1.0, 1.0, 1.0, chance=None)).reason


def test_the_interval_resamples_the_same_facts_in_every_result() -> None:
    """Against a loop; 4000 draws each, so the ends differ by Monte Carlo noise alone."""
    found = recovery(ATTACKED, UNLEARNED, ORIGINAL, never_knew=NEVER, attacked_never_knew=TAUGHT, draws=4000)
    random = np.random.default_rng(1)
    columns = [each.per_example.double().numpy() for each in (ATTACKED, UNLEARNED, ORIGINAL, NEVER, TAUGHT)]
    drawn = []
    for _ in range(4000):
        chosen = random.integers(4, size=4)
        a, u, o, n, t = (column[chosen].mean() for column in columns)
        drawn.append(((a - u) / (o - n), (t - n) / (o - n), (a - u - t + n) / (o - n)))
    expected = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    for place, each in enumerate((found.recovered, found.taught, found.net)):
        assert (each.low, each.high) == pytest.approx(expected[:, place], abs=0.03)
        assert each.low <= each.value <= each.high


def test_facts_that_all_agree_leave_no_width_and_pairing_cancels_noise() -> None:
    noise = torch.tensor([0.0, 0.1, 0.2, 0.3])
    models = [Result(noise + start, "accuracy", 0.25, names=NAMES) for start in (0.4, 0.2, 0.6, 0.0)]
    found = recovery(models[0], models[1], models[2], never_knew=models[3]).recovered
    assert (found.value, found.low, found.high) == pytest.approx((1 / 3,) * 3)


def test_seeds_are_resampled_too() -> None:
    """Two seeds, 0.4 and 0.8 on every fact: the mean is 0.6 and the interval reaches to both."""
    attacked = {0: result(0.4, 0.4, 0.4, 0.4), 1: result(0.8, 0.8, 0.8, 0.8)}
    flat = [result(*[value] * 4) for value in (0.2, 1.0, 0.0)]
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
