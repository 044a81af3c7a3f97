"""What every test and attack promises, on every architecture and in both model classes.

It runs; it gives a `Result` of finite numbers, one for each thing that it asked about, with its curve and control; the
model is left as it was, bit for bit; neither batches nor the side of the padding change a number.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from conftest import HAS_HOOKED, shared
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.evaluate import Result
from mechunlearn.tasks import Format
from mechunlearn.weights import read, select, write

TRAINED = {"learning_rates": (0.01,), "steps": 2, "at": (2,), "optimizer": partial(torch.optim.SGD)}
"""Adam divides by the gradient's size, so that one of pure rounding noise moves a weight too: SGD does not."""
LORA = {"rank": 4, "dropout": 0.0, "learning_rates": (0.05,), "steps": 1, "batch_size": 4, "text_batch_size": 2}
MICRO, BATCH = {"micro_batch_size": 3}, {"batch_size": 4}
STATES = ("0", "1", "2", "3")


def asked(task: mu.Task) -> tuple[str, ...]:
    return task.formats["trained prompt"].forget.names


def nobody(task: mu.Task) -> tuple[str, ...]:
    """Of what has no names, such as rows of text."""
    return ()


def held_out(task: mu.Task) -> tuple[str, ...]:
    return mu.evaluate.halves(task)[1].names


class Contract(NamedTuple):
    call: Callable[..., Result]
    """(model, task, **options) -> Result"""
    points: tuple[str, ...] | None = None
    """Of its curve; None where it has none."""
    options: dict[str, int] | None = None
    """Other batches, which do not matter."""
    names: Callable[[mu.Task], tuple[str, ...]] = asked
    task: Callable[..., mu.Task] = partial(tiny.task, answer=3)
    """(model, padding=...) -> Task"""
    may_be_zero: bool = False
    """True where a random model gives nothing right."""


def classes(model: Any, *, padding: str) -> mu.Task:
    """Facts whose answers are one of three classes, for probes: single ones, which are trained and tested on."""

    def facts(n: int, seed: int) -> mu.Prompts:
        prompts = tiny.prompts(model, n=n, seed=seed, padding=padding)
        labels = torch.tensor([[20, 30, 40][i % 3] for i in range(n)])
        return replace(prompts, answers=labels[:, None], candidates=None, corrupt=None)

    forget, text = facts(12, 0), torch.zeros(2, 4, dtype=torch.long)
    return mu.Task("classes", forget, facts(24, 1), {"trained prompt": Format(forget, facts(6, 2))}, text, text)


def known(model: Any, *, padding: str) -> mu.Task:
    """Facts whose answer is what the model says."""
    task = tiny.task(model, padding=padding)
    tested = task.formats["trained prompt"].forget
    with torch.no_grad():
        said = tested.logits(model)[:, 0].argmax(-1, keepdim=True)
    prompts = replace(tested, answers=said, candidates=None)
    return replace(task, formats={"trained prompt": Format(prompts, tested)})


@contextmanager
def edited(model: Any) -> Iterator[Any]:
    """The model with another MLP; yields what gives the original in its place."""
    mask = mu.ComponentMask.of(["L1MLP.W_out"], mu.shape(model))
    entries = select(model, mask)
    original = read(entries)
    noise = torch.Generator().manual_seed(0)
    changed = {label: value + 0.2 * torch.randn(value.shape, generator=noise) for label, value in original.items()}

    @contextmanager
    def taken_back() -> Iterator[Any]:
        write(entries, original)
        try:
            yield model
        finally:
            write(entries, changed)

    with mu.Edit(mask, changed, mu.fingerprint(model)).applied(model):
        yield taken_back


def beside_the_original(test: Callable[..., Result]) -> Callable[..., Result]:
    """The test of an edited model, which asks the original too."""

    def call(model: Any, task: mu.Task, **options: Any) -> Result:
        with edited(model) as original:
            return test(model, task, original=original, **options)

    return call


def accuracy(model: Any, task: mu.Task, **options: Any) -> Result:
    return mu.evaluate.accuracy(model, task.formats["trained prompt"].forget, **options).probability


def continuations(model: Any, task: mu.Task, **options: Any) -> Result:
    """The numbers in the words that it says."""
    texts = mu.evaluate.continuations(model, task.formats["trained prompt"].forget, 4, **options)
    return Result(torch.tensor([float("".join(c for c in text if c.isdigit())) for text in texts]), "words said")


def harness_model(model: Any, task: mu.Task, **options: Any) -> Result:
    pytest.importorskip("lm_eval")
    texts = [("w5 w6 w7", " w8"), ("w20", " w21 w22"), ("w5 w6 w7 w8 w9 w10", " w11 w12 w13")]
    requests = [SimpleNamespace(args=each) for each in texts]
    found = mu.evaluate.harness_model(model, **options).loglikelihood(requests)
    return Result(torch.tensor([value for value, _ in found]), "log likelihood")


TESTS = {
    "accuracy": Contract(accuracy, options=BATCH),
    "binary_probes": Contract(
        partial(mu.evaluate.binary_probes, splits=1), STATES, {"batch_size": 7}, held_out, classes
    ),
    "continuations": Contract(continuations, None, BATCH, nobody),
    "direction_ablation": Contract(
        beside_the_original(mu.evaluate.direction_ablation), ("0", "after L1", "after L2", "each")
    ),
    "extraction_strength": Contract(mu.evaluate.extraction_strength, options=BATCH, may_be_zero=True),
    "few_shot": Contract(partial(mu.evaluate.few_shot, shots=(1, 2)), ("0", "1", "2")),
    "generated": Contract(mu.evaluate.generated, options=BATCH, may_be_zero=True),
    "harness_model": Contract(harness_model, None, {"batch_size": 2}, nobody),
    "in_format": Contract(mu.evaluate.in_format),
    "injected": Contract(mu.evaluate.injected, names=lambda task: task.injection.names),
    "knowledge": Contract(mu.evaluate.knowledge, names=lambda task: task.knowledge.names),
    "lens_extraction": Contract(
        partial(mu.evaluate.lens_extraction, budget=32), ("1", "2", "4", "8", "16", "32"), BATCH, may_be_zero=True
    ),
    "multinomial_probe": Contract(
        partial(mu.evaluate.multinomial_probe, splits=1), STATES, {"batch_size": 7}, task=classes
    ),
    "noised": Contract(partial(mu.evaluate.noised, scales=(0.1,), draws=1), ("0", "0.1")),
    "patching_audit": Contract(beside_the_original(mu.evaluate.patching_audit), STATES, BATCH, task=known),
    "quantized": Contract(mu.evaluate.quantized, ("float32", "int8", "int4", "nf4")),
    "relearn": Contract(partial(mu.evaluate.relearn, text_coefficient=1.0, **TRAINED), ("0", "2"), MICRO),
    "relearn_benign": Contract(partial(mu.evaluate.relearn_benign, **TRAINED), ("0", "2"), MICRO),
    "relearn_few": Contract(partial(mu.evaluate.relearn_few, examples=(2,), **TRAINED), ("0", "2"), MICRO),
    "relearn_lora": Contract(partial(mu.evaluate.relearn_lora, **LORA), ("0", "1"), MICRO),
    "soft_prompt": Contract(
        partial(mu.evaluate.soft_prompt, steps=2, every=2, restarts=1, batch_size=3), ("0", "2"), task=tiny.task
    ),
    "text_kl": Contract(beside_the_original(mu.evaluate.text_kl), None, {"batch_size": 1}, nobody),
    "text_loss": Contract(mu.evaluate.text_loss, names=nobody),
    "whole_answers": Contract(mu.evaluate.whole_answers, task=tiny.task),
}
"""A new test or attack is one line."""

BRIDGES_ONLY = ("relearn_lora",)
"""What trains a copy made by Hugging Face."""

NO_TEST = {
    "audit": "runs many tests: test_audit.py",
    "compare": "runs any tests: test_compare.py",
    "measure": "what `accuracy` and all the others run",
    "lm_eval_task": "runs `harness_model` on a file: test_lm_eval.py",
    "relearn_and_ask": "`relearn`, with several questions: test_relearned.py",
    "relearn_halves": "`relearn_lora` with options: test_relearned_lora.py",
    "relearn_two_facts": "`relearn_lora` with options: test_relearned_lora.py",
}
"""Public functions that take a model and are no test of their own, and where they are tested."""

every_test = pytest.mark.parametrize("name", TESTS)


def test_every_public_test_and_attack_is_in_the_contract():
    public = {name: getattr(mu.evaluate, name) for name in mu.evaluate.__all__}
    functions = {name: f for name, f in public.items() if inspect.isfunction(f) or isinstance(f, partial)}
    asked = {name for name, function in functions.items() if "model" in inspect.signature(function).parameters}
    assert asked - set(TESTS) - set(NO_TEST) == set(), "add a line to TESTS"
    assert set(TESTS) <= set(public)


@every_test
def test_a_test_keeps_its_contract(every_model: Any, name: str):
    contract, model = TESTS[name], every_model
    task, left = (contract.task(model, padding=side) for side in ("right", "left"))
    if name in BRIDGES_ONLY and type(model).__name__ == "HookedTransformer":
        with left_as_it_was(model), pytest.raises(ValueError, match="expected a TransformerBridge"):
            contract.call(model, task)
        return
    random = torch.get_rng_state()
    with left_as_it_was(model):
        result = contract.call(model, task)
    assert torch.equal(torch.get_rng_state(), random)
    assert isinstance(result, Result)
    assert result.names == contract.names(task)
    check_numbers(contract, result)
    assert_same(result, contract.call(model, left, **(contract.options or {})))


def check_numbers(contract: Contract, result: Result) -> None:
    assert torch.isfinite(result.per_example).all()
    assert contract.may_be_zero or float(result.per_example.abs().max()) > 1e-3
    assert not result.names or len(result.names) == len(result.per_example)
    assert (None if result.curve is None else result.curve.points) == contract.points
    if result.curve is not None:
        assert torch.isfinite(result.curve.per_prompt).all()


def assert_same(result: Result, other: Result, atol: float = 1e-4) -> None:
    """In each number, of the curve and of the control too. Some are differences of logarithms: hence 1e-4."""
    assert result.names == other.names
    torch.testing.assert_close(result.per_example, other.per_example, rtol=1e-4, atol=atol)
    if result.curve is not None and other.curve is not None:
        torch.testing.assert_close(result.curve.per_prompt, other.curve.per_prompt, rtol=1e-4, atol=atol)
    if result.control is not None and other.control is not None:
        assert_same(result.control, other.control, atol)


@pytest.mark.parametrize("name", [name for name in TESTS if name not in BRIDGES_ONLY])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES if HAS_HOOKED else [])
def test_both_classes_give_the_same_result(architecture: str, name: str):
    contract = TESTS[name]
    models = shared("bridge", architecture), shared("hooked", architecture)
    one, other = (contract.call(model, contract.task(model, padding="right")) for model in models)
    assert_same(one, other, 1e-3)
