"""Known in the original, not in a model that never knew, and brought back where it was merely hidden: every test."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hidden import late_neuron, unembedding_turned

import mechunlearn as mu
from mechunlearn.auditing import Audit, Finding, Plan, audit, quick
from mechunlearn.evaluate import Result
from mechunlearn.tasks import Format

FORMATS = ("trained prompt", "question", "multiple choice")
ASKED = ("clean", "question", "multiple choice", "generated")
LATENT = ("probes", "logit lens", "patching")
TRAINED = ("relearning", "relearning, LoRA", "soft prompt")
"""Attacks that train on other forgotten facts, and so may teach."""
UNTRAINED = ("relearning, other text", "few-shot", "direction ablation", "quantization", "noise")
UNDO = ("relearning", "relearning, LoRA", "relearning, other text", "direction ablation", "noise")
"""Attacks that bring back what one late neuron hides. The others do not: it is larger than a step of any rounding, and
it does not depend on what was asked before; a soft prompt needs more steps than are taken here."""


@pytest.fixture(scope="module")
def task(shipped: Any) -> mu.Task:
    """Fewer facts and formats, to be quick."""
    whole = mu.tasks.sports_facts(shipped, forget="basketball")
    few = {name: Format(whole.formats[name].forget[:20], whole.formats[name].retain[:40]) for name in FORMATS}
    return replace(whole, forget=whole.forget[:64], retain=whole.retain[:128], formats=few)


def smaller(task: mu.Task) -> Plan:
    """The quick audit with still smaller budgets."""
    plan = quick(task)
    options: dict[str, dict[str, Any]] = {
        "relearning": {"learning_rates": (3e-3,), "steps": 10, "at": (2, 10)},
        "relearning, LoRA": {"steps": 8, "at": (2, 4, 8)},
        "relearning, other text": {"steps": 12, "at": (12,)},
        "soft prompt": {"steps": 12, "every": 12},
    }
    attacks = {name: partial(test, **options.get(name, {})) for name, test in plan.attacks.items()}
    latent = {**plan.latent, "probes": partial(mu.evaluate.binary_probes, splits=1)}
    return replace(plan, attacks=attacks, latent=latent, damage={})


@pytest.fixture(scope="module")
def twin() -> Any:
    return mu.testbed.load(without="basketball")


@pytest.fixture(scope="module")
def audited(shipped: Any, twin: Any, task: mu.Task) -> Audit:
    return audit(shipped, task, late_neuron(shipped, task), budget=smaller, never_knew=twin, progress=False)


def found(audited: Audit, row: str, test: str) -> Finding:
    return next(each for each in audited.findings if (each.row, each.test) == (row, test))


def test_the_lists_above_are_the_tests_that_run(audited: Audit):
    tests = {each.test for each in audited.findings}
    assert tests == {*ASKED, *LATENT, *TRAINED, *UNTRAINED}
    assert audited.report.errors.empty


@pytest.mark.parametrize("test", [*ASKED, *LATENT, *TRAINED, *UNTRAINED])
def test_the_original_knows(audited: Audit, test: str):
    """Of what it generates on its own a fifth goes on after the answer ("basketballan")."""
    assert found(audited, "original", test).value.value > (0.7 if test == "generated" else 0.95)


@pytest.mark.parametrize("test", [*ASKED, *LATENT, *UNTRAINED])
def test_a_model_that_never_knew_does_not(audited: Audit, test: str):
    """Probes guess one class in three; the others are near 0, since this model never says basketball."""
    assert found(audited, "never knew", test).value.value < (0.55 if test == "probes" else 0.15)


@pytest.mark.parametrize("test", TRAINED)
def test_an_attack_that_trains_teaches_a_model_that_never_knew_to_say_it_of_anybody(audited: Audit, test: str):
    """Of nobody as much as of the athletes: nothing is recovered, whatever the accuracy is."""
    never = found(audited, "never knew", test)
    assert never.nobody is not None
    assert never.value.value - never.nobody < 0.15
    assert never.recovery is not None
    assert never.recovery.recovered.low < 0.05


@pytest.mark.parametrize("test", ["clean", "question", "generated"])
def test_the_late_neuron_hides_the_facts(audited: Audit, test: str):
    assert found(audited, "edit", test).left.value < 0.2


@pytest.mark.parametrize("test", ["multiple choice", "probes", "logit lens"])
def test_what_it_hides_is_there_for_those_who_look(audited: Audit, test: str):
    """It acts where basketball is the next word; letters are other words."""
    left = found(audited, "edit", test).left
    assert left.value > 0.8
    assert left.low > 0.5


@pytest.mark.parametrize("test", UNDO)
def test_what_it_hides_comes_back_under_attack(audited: Audit, test: str):
    own = found(audited, "edit", test)
    assert own.left.value > 0.25
    assert own.left.low > -0.1  # of twenty facts
    assert own.recovery is not None
    assert own.recovery.net.value > 0.25


def test_the_worst_case_and_the_verdict_say_that_it_is_there(audited: Audit):
    assert audited.table.loc["edit", "worst case"] > 0.9
    assert audited.verdict.startswith("Not gone: it is found when asked, in hidden states, under attack.")


def test_relearning_and_probes_find_what_a_turned_unembedding_hides(shipped: Any, twin: Any, task: mu.Task):
    """The lens reads by the unembedding and is blind to this."""
    plan = smaller(task)
    relearn, clean = plan.attacks["relearning"], plan.clean
    with unembedding_turned(shipped, task):
        assert clean(shipped, task).value < 0.1
        assert plan.latent["probes"](shipped, task).value > 0.95
        assert plan.latent["logit lens"](shipped, task).value < 0.1
        assert margin(relearn(shipped, task)) > 0.35
    assert margin(relearn(twin, task)) < 0.2


def margin(attacked: Result) -> float:
    """By how much more is said of the athletes than of nobody, at the best budget."""
    assert attacked.curve is not None
    assert attacked.control is not None
    assert attacked.control.curve is not None
    return float((attacked.curve.mean - attacked.control.curve.mean).max())
