import inspect
from itertools import product

import pytest

from mechunlearn.edit import PAPER_PRODUCT, PAPER_STAGES, finetune, paper_settings
from mechunlearn.edit.paper import PAPER_COEFFICIENTS, PAPER_GROUPS, PAPER_LEARNING_RATES, PAPER_SETTINGS

MODELS = ("gemma-7b", "gemma-2-9b", "llama-3-8b")
TASKS = ("athletes 16", "athletes 64", "sport", "counterfact 16", "counterfact 64", "counterfact 64 sequential")
LOCALIZATIONS = (
    *("fact lookup", "random mlps", "attribution patching mlps", "causal tracing mlps"),
    *("causal tracing", "attribution patching", "random", "nonlocalized", "all mlps"),
)


@pytest.mark.parametrize(
    ("model", "task", "localization", "rate", "coefficient"),
    [
        ("gemma-7b", "athletes 64", "attribution patching", 1e-5, 0.1),
        ("gemma-7b", "counterfact 16", "fact lookup", 5e-6, 0.1),
        ("gemma-7b", "counterfact 64", "all mlps", 2e-6, 1.0),
        ("gemma-2-9b", "sport", "nonlocalized", 1e-5, 5.0),
        ("gemma-2-9b", "athletes 16", "random", 5e-5, 5.0),
        ("llama-3-8b", "sport", "random mlps", 5e-5, 0.2),
        ("llama-3-8b", "counterfact 16", "fact lookup", 1e-4, 1.0),
        ("llama-3-8b", "counterfact 64 sequential", "causal tracing", 5e-5, 2.0),
    ],
)
def test_settings_are_those_of_the_authors_runs(model, task, localization, rate, coefficient):
    found = paper_settings(model=model, task=task, localization=localization)
    assert (found["learning_rate"], found["forget_coefficient"]) == (rate, coefficient)
    assert found["inject"] is True
    assert found["steps"] == (25 if "sequential" in task else 50)


def test_every_model_task_and_localization_has_settings_that_finetune_takes():
    known = set(inspect.signature(finetune).parameters)
    for model, task, localization in product(MODELS, TASKS, LOCALIZATIONS):
        found = paper_settings(model=model, task=task, localization=localization)
        assert set(found) <= known
        assert found["learning_rate"] in PAPER_LEARNING_RATES
        assert found["forget_coefficient"] in PAPER_COEFFICIENTS
    assert tuple(PAPER_SETTINGS) == MODELS
    assert all(tuple(tasks) == TASKS for tasks in PAPER_SETTINGS.values())
    assert sorted(name for names in PAPER_GROUPS.values() for name in names) == sorted(LOCALIZATIONS)
    assert all(names[0] == group for group, names in PAPER_GROUPS.items())


def test_the_searches_are_the_papers():
    rates, coefficients = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4), (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
    first, second = PAPER_STAGES
    assert first == {"learning_rate": rates, "forget_coefficient": (1.0,)}
    assert second == {"forget_coefficient": coefficients}
    assert ({"learning_rate": rates, "forget_coefficient": coefficients},) == PAPER_PRODUCT


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", r"expected a model of the paper \(gemma-7b, gemma-2-9b, llama-3-8b\), got 'other'"),
        ("task", r"expected a task of the paper \(athletes 16, .*counterfact 64 sequential\), got 'other'"),
        ("localization", r"expected a localization of the paper \(fact lookup, .*all mlps\), got 'other'"),
    ],
)
def test_other_names_are_refused_with_what_there_is(name, message):
    names = {"model": "gemma-7b", "task": "sport", "localization": "random"}
    with pytest.raises(ValueError, match=message):
        paper_settings(**names | {name: "other"})
