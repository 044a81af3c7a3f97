"""A model that never knew the facts: an attack may teach it to say the answer of anybody, never to tell who is who."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest

import mechunlearn as mu
from mechunlearn.evaluate import direction_ablation, few_shot, noised, quantized, soft_prompt
from mechunlearn.tasks import Format


@pytest.fixture(scope="module")
def twin():
    return mu.testbed.load(without="basketball")


@pytest.fixture(scope="module")
def task(twin):
    """Fewer facts on both sides, to be quick."""
    whole = mu.tasks.sports_facts(twin, forget="basketball")
    asked = whole.formats["trained prompt"]
    few = {"trained prompt": Format(asked.forget[:16], asked.retain[:16])}
    return replace(whole, forget=whole.forget[:48], retain=whole.retain[:96], formats=few)


@pytest.mark.parametrize("attack", [few_shot, quantized, noised, direction_ablation], ids=lambda each: each.__name__)
def test_an_attack_that_trains_no_answer_finds_nothing(twin, shipped, task, attack):
    options = {
        few_shot: {"shots": (0, 4)},
        noised: {"scales": (0.1,), "draws": 1},
        direction_ablation: {"original": lambda: nullcontext(shipped)},
    }
    found = partial(attack, **options.get(attack, {}))(twin, task)
    assert found.value < 0.25


def test_a_soft_prompt_teaches_the_answer_but_not_of_whom(twin, task):
    """It learns to say basketball of whom the model does not know: of nobody at least as much as of the athletes."""
    found = soft_prompt(twin, task, steps=16, every=16, restarts=1)
    assert found.control is not None
    assert found.difference(found.control)[1] < 0.05
