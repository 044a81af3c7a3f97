"""Every method checks its arguments in the same way: found by their names, so that a new method is tested too."""

import importlib
import inspect
import sys
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.arguments import _HOMES
from mechunlearn.components import ComponentMask, EdgeMask
from mechunlearn.localize import activation_patching, causal_tracing, faithfulness, logit_lens
from mechunlearn.localize.replacement import mean_over, zero
from mechunlearn.model import shape
from mechunlearn.tasks.positions import subject_last

METHODS = {
    name: function
    for name, function in vars(mu.localize).items()
    if inspect.isfunction(function) and "model" in (names := inspect.signature(function).parameters)
    if "values" not in names  # those are replacements, which methods take
}


def methods_with(argument):
    chosen = [name for name, method in METHODS.items() if argument in inspect.signature(method).parameters]
    return pytest.mark.parametrize("name", chosen)


def called(name, model, **options):
    """The method on tiny prompts, with all else that it needs."""
    prompts = tiny.prompts(model, n=4)
    circuit = ComponentMask.of(["L1MLP", "L1H2"], shape(model))
    edges = EdgeMask.of(["L0MLP->L1MLP"], shape(model))
    needed = {
        "sets": {"one": circuit},
        "circuit": circuit,
        "circuits": edges if name == "edge_faithfulness" else circuit,
        "forget": prompts,
        "retain": prompts,
        "senders": ["L0MLP"],
        "receivers": "logits",
        "labels": [0, 1, 0, 1],
        "folds": 2,
        "text": torch.randint(4, 100, (2, 9)),
        "k": 2,
        "seed": 0,
        "window": 1,
    }
    signature = inspect.signature(METHODS[name]).parameters
    given = {key: value for key, value in needed.items() if key in signature}
    if name == "fact_lookup_by_paths":
        del given["receivers"]
    first = (model, prompts) if "prompts" in signature else (model,)
    return METHODS[name](*first, **(given | options))


def refused(*parts):
    return pytest.raises(ValueError, match="(?s)" + ".*".join(parts))


@pytest.mark.parametrize("size", [0, -1])
@methods_with("batch_size")
def test_a_batch_without_rows_is_refused(llama, unchecked, name, size):
    with left_as_it_was(llama), refused("expected a batch_size of at least 1", f"got {size}", "use 1"):
        called(name, llama, batch_size=size)


@methods_with("metric")
def test_the_name_of_a_metric_is_refused(llama, unchecked, name):
    with (
        left_as_it_was(llama),
        refused("expected a function as metric, got 'logit_difference'", "pass the function itself", r"\.metrics"),
    ):
        called(name, llama, metric="logit_difference")


FUNCTIONS = [
    (n, a)
    for a in ("where", "at", "positions", "replacement", "by", "size", "estimate", "verify")
    for n, m in METHODS.items()
    if a in inspect.signature(m).parameters
]


@pytest.mark.parametrize(("name", "argument"), FUNCTIONS)
def test_the_name_of_another_function_is_refused(llama, unchecked, name, argument):
    with left_as_it_was(llama), refused(f"expected a function as {argument}, got 'mean'", "pass the function itself"):
        called(name, llama, **{argument: "mean"})


@pytest.mark.parametrize("name", ["gradient_times_weight", "fisher", "snip", "wagle"])
def test_the_name_of_a_loss_is_refused(llama, unchecked, name):
    argument = "forget_loss" if name == "wagle" else "loss"
    with left_as_it_was(llama), refused("expected a function as loss, got 'cross_entropy'", r"mechunlearn\.losses"):
        called(name, llama, **{argument: "cross_entropy"})


def test_a_way_to_make_receivers_is_a_function(llama, unchecked):
    with refused("expected a function as receivers, got 'lowest_layer'", r"one of mechunlearn\.localize"):
        called("fact_lookup_by_paths", llama, receivers="lowest_layer")


LISTS = [(n, a) for a in ("components", "senders") for n, m in METHODS.items() if a in inspect.signature(m).parameters]


@pytest.mark.parametrize(("name", "argument"), [pair for pair in LISTS if pair[0] not in ("logit_lens",)])
def test_no_components_are_refused(llama, unchecked, name, argument):
    with left_as_it_was(llama), refused(f"expected at least one component as {argument}, got none", "check what"):
        called(name, llama, **{argument: []})


@pytest.mark.parametrize(("name", "argument"), LISTS)
def test_one_component_in_no_list_and_the_name_of_a_level_are_refused(llama, unchecked, name, argument):
    for given in ("L1MLP", mu.Component.parse("L1MLP"), "heads", 3):
        with left_as_it_was(llama), refused(f"expected {argument} as a list, a mask or a level", "got", "in a list"):
            called(name, llama, **{argument: given})


def test_a_lens_without_components_reads_the_layers_alone(llama):
    assert logit_lens(llama, tiny.prompts(llama), components=()).points == ("0", "1", "2", "3")


@pytest.mark.parametrize(("window", "draws", "message"), [(4, 1, r"window must lie in 1\.\.3"), (1, 0, "draws=0")])
def test_a_window_larger_than_the_model_and_no_draws_are_refused(llama, window, draws, message):
    with left_as_it_was(llama), pytest.raises(ValueError, match=message):
        causal_tracing(llama, tiny.prompts(llama), window=window, draws=draws)


@pytest.mark.parametrize("method", [partial(activation_patching, components=["L1MLP"]), "faithfulness"])
def test_a_replacement_that_gives_something_else_is_refused(llama, unchecked, method):
    prompts = tiny.prompts(llama)
    if method == "faithfulness":
        method = partial(faithfulness, circuits=ComponentMask.of(["L0MLP"], shape(llama)))

    def too_few(model, prompts, values):
        return {name: value[:1] for name, value in values.items()}

    for wrong, got in ((too_few, r"got \(1, "), (lambda *_: {}, "got NoneType"), (lambda *_: 0.0, "got float")):
        given: Any = wrong
        with (
            left_as_it_was(llama),
            refused("to give a tensor of shape", "hook_mlp_out|hook_z", got, "give one for each"),
        ):
            method(llama, prompts, replacement=given)


def test_functions_of_every_kind_are_accepted(llama):
    class Callable:
        def __call__(self, logits, prompts):
            return logits[:, 0, 5]

    options = {"metric": Callable(), "where": subject_last, "replacement": mean_over(tiny.prompts(llama))}
    assert len(activation_patching(llama, tiny.prompts(llama), components=["L1MLP"], **options)) == 1
    assert len(activation_patching(llama, tiny.prompts(llama), components=iter(["L1MLP"]), replacement=zero)) == 1


def test_an_interval_without_draws_is_refused(llama):
    scores = activation_patching(llama, tiny.prompts(llama), components=["L1MLP"])
    with refused("expected at least one draw for an interval, got 0", "use a thousand"):
        scores.interval(draws=0)


@pytest.mark.parametrize("argument", _HOMES)
def test_an_error_names_a_public_function_of_the_kind_that_the_argument_takes(llama, argument):
    home, example = _HOMES[argument]
    function = getattr(importlib.import_module(home), example)
    assert home == "torch" or (example in sys.modules[home].__all__ and home.removeprefix("mechunlearn.") in mu.__all__)
    if argument == "rankings":
        mu.evaluate.lens_extraction(llama, tiny.task(llama), rankings=function)
    elif argument == "receivers":
        called("path_effect", llama, receivers=function([mu.Component.parse("L2H1")]))
    else:
        name = next(n for n, method in METHODS.items() if argument in inspect.signature(method).parameters)
        called(name, llama, **{argument: function})


SHARING = [name for name, method in METHODS.items() if "\nOptions:\n" in (method.__doc__ or "")]
"""The methods that take options of a table."""


@pytest.mark.parametrize("name", SHARING)
def test_help_has_a_sentence_for_every_shared_option(name):
    signature = inspect.signature(METHODS[name]).parameters
    listed = inspect.getdoc(METHODS[name]).partition("\nOptions:\n")[2].split("\n- ")[1:]
    assert "`metric` = logit_difference: What is measured" in listed[0]
    for item in listed:
        assert signature[item.split("`")[1]].kind is inspect.Parameter.KEYWORD_ONLY
        assert item.strip().endswith(".")


@pytest.mark.parametrize("name", SHARING)
def test_a_misspelt_option_is_an_error_that_names_the_nearest(llama, name):
    with pytest.raises(TypeError, match=f"{name} has no option metrics: did you mean metric"):
        called(name, llama, metrics=None)
