"""Options that several functions share: shown by each, with the defaults that it uses; a misspelt one is an error."""

import inspect
import pickle
from functools import partial
from typing import Unpack, get_args

import pytest
import tiny
import torch

import mechunlearn as mu
from mechunlearn.edit import (
    alpha_edit,
    finetune,
    ft_l,
    learn_weight_mask,
    learn_weight_mask_in_place,
    lora,
    memit,
    rome,
)
from mechunlearn.edit.inject.targets import InjectOptions
from mechunlearn.evaluate.attacks.relearning import (
    BenignOptions,
    RelearnOptions,
    RunsOptions,
    relearn,
    relearn_and_ask,
    relearn_benign,
    relearn_few,
)
from mechunlearn.evaluate.attacks.relearning_lora import LoraOptions, relearn_lora
from mechunlearn.identity import digest
from mechunlearn.options import with_options
from mechunlearn.training import fit
from mechunlearn.training.options import RunOptions, TrainingOptions

EDITORS = {
    finetune: TrainingOptions,
    lora: TrainingOptions,
    ft_l: RunOptions,
    learn_weight_mask: TrainingOptions,
    learn_weight_mask_in_place: TrainingOptions,
}
ATTACKS = {
    relearn: RelearnOptions,
    relearn_few: RelearnOptions,
    relearn_benign: BenignOptions,
    relearn_and_ask: RunsOptions,
    relearn_lora: LoraOptions,
}
INJECTORS = dict.fromkeys((rome, memit, alpha_edit), InjectOptions)
TABLES = EDITORS | ATTACKS | INJECTORS
named = pytest.mark.parametrize("function", TABLES, ids=lambda function: function.__name__)
DEPARTURES = {
    "finetune": {},
    "lora": {"learning_rate": 1e-2},
    "ft_l": {"steps": 25, "learning_rate": 5e-4, "clip": None},
    "learn_weight_mask": {"learning_rate": 1.0, "forget_coefficient": 0.3, "clip": None},
    "learn_weight_mask_in_place": {"learning_rate": 1.0, "forget_coefficient": 0.3, "clip": None},
    "rome": {"steps": 120, "clamp": 4.0, "stop_below": 0.001},
    "memit": {},
    "alpha_edit": {},
    "relearn": {},
    "relearn_few": {"steps": 20},
    "relearn_benign": {"steps": 50},
    "relearn_and_ask": {},
    "relearn_lora": {"learning_rates": (2e-4,), "steps": 20, "batch_size": 32, "text_coefficient": 1.0}
    | {"text_batch_size": 16},
}


def defaults(function):
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@named
def test_a_signature_shows_every_option_with_its_type_and_default(function):
    parameters = inspect.signature(function).parameters
    given = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    assert given[:2] == ["model", "task"]
    assert given[2:] == (["mask"] if function in EDITORS | INJECTORS else ["questions"] * (function is relearn_and_ask))
    table = TABLES[function].__annotations__
    assert [name for name in parameters if name in table] == list(table)
    for name, entry in table.items():
        assert parameters[name].annotation == get_args(entry)[0], name
        expected = DEPARTURES[function.__name__].get(name, entry.__metadata__[0])
        assert name == "optimizer" or parameters[name].default == expected, name


@pytest.mark.parametrize("function", EDITORS, ids=lambda function: function.__name__)
def test_the_defaults_shown_are_those_used(function, llama, monkeypatch):
    """Seen where they arrive: in the training loop, in the terms, and in the provenance."""
    arrived = {}

    def recording(model, entries, terms, **options):
        arrived.update(options, terms=terms)
        return fit(model, entries, terms, **{**options, "steps": 1, "progress": False})

    monkeypatch.setattr("mechunlearn.edit.finetuning.fit", recording)
    provenance = function(llama, tiny.task(llama), mu.ComponentMask.of(["L1MLP"], mu.shape(llama))).provenance
    shown = defaults(function)
    for name in ("steps", "learning_rate", "optimizer", "clip", "micro_batch_size", "compute_dtype", "seed"):
        assert arrived[name] == shown[name], name
    for name in ("progress", "on_step", "until"):
        assert arrived[name] == shown[name], name
    assert arrived["checkpoints"] is None
    assert shown["checkpoint"] is None
    assert provenance["learning_rate"] == shown["learning_rate"]
    for term in arrived["terms"]:
        side = term.name if term.name != "inject" else "forget"
        assert term.batch_size == shown["text_batch_size" if side == "text" else "batch_size"]
        if function is not ft_l:
            assert term.coefficient == shown[f"{side}_coefficient"]
            assert side == "forget" or term.loss == shown[f"{side}_loss"]


@named
def test_help_has_a_sentence_for_every_option(function):
    told = " ".join(inspect.getdoc(function).split())
    for name, entry in TABLES[function].__annotations__.items():
        assert f"- `{name}` = " in told
        assert f": {entry.__metadata__[1]}" in told
        assert entry.__metadata__[1].endswith(".")


@pytest.mark.parametrize("function", EDITORS | ATTACKS, ids=lambda function: function.__name__)
def test_a_misspelt_option_is_an_error_that_names_the_nearest_before_any_work(function):
    with pytest.raises(TypeError, match=f"{function.__name__} has no option batchsize: did you mean batch_size?"):
        function(None, None, None, batchsize=8)
    with pytest.raises(TypeError, match=r"has no option zzz: its options are .*steps, .*batch_size"):
        partial(function, zzz=1)(None, None, None)


def test_functions_with_other_defaults_are_told_apart():
    """A grid goes on from its file only where its tests are the same."""

    def attack(**options: Unpack[RunOptions]):
        return options

    slow, again, slower = (with_options(steps=steps)(attack) for steps in (10, 10, 20))
    plain = with_options(steps=10, optimizer=torch.optim.SGD)(attack)
    assert digest(slow) == digest(again)
    assert len({digest(slow), digest(slower), digest(plain)}) == 3


def test_an_editor_has_no_options_of_another():
    with pytest.raises(TypeError, match="ft_l has no option retain_coefficient"):
        ft_l(None, None, None, retain_coefficient=1.0)
    with pytest.raises(TypeError, match="finetune has no option rank"):
        finetune(None, None, None, rank=1)


@named
def test_it_is_pickled_by_name_and_options_may_be_bound(function):
    assert pickle.loads(pickle.dumps(function)) is function
    bound = pickle.loads(pickle.dumps(partial(function, steps=7)))
    assert inspect.signature(bound).parameters["steps"].default == 7
    assert list(inspect.signature(bound).parameters) == list(inspect.signature(function).parameters)
