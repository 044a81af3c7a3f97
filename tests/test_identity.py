"""Names and digests of functions, options and values."""

import operator
import random
import threading
from dataclasses import dataclass, replace
from functools import cache, partial, wraps

import numpy as np
import pytest
import tiny
import torch

from mechunlearn.identity import described, digest, identified, key_of, name_of


@pytest.fixture
def task(llama):
    return tiny.task(llama)


def loss(logits, *, beta=0.1, weights=None):
    return beta


def test_a_function_is_named_through_partial_and_as_an_object():
    class Mine:
        def __call__(self): ...

    assert name_of(partial(loss, beta=0.2)) == "loss"
    assert name_of(Mine()) == "Mine"


def test_a_description_has_the_plain_options():
    assert described(loss) == "loss"
    assert described(partial(loss, beta=0.2, weights=torch.ones(2))) == "loss(beta=0.2)"
    assert described(partial(loss, beta=partial(loss, weights=(1, 2)))) == "loss(beta=loss(weights=(1, 2)))"


def test_what_is_identified_is_readable_and_told_apart():
    assert [identified(value) for value in (None, True, 1, 0.5, "a")] == [None, True, 1, 0.5, "a"]
    one, other = (partial(loss, weights=torch.full((2,), value)) for value in (1.0, 2.0))
    assert identified(one).startswith("loss ")
    assert identified(one) != identified(other)
    assert identified((0.5, 1)).startswith("(0.5, 1) ")
    assert identified(torch.float32).startswith("dtype ")


def test_a_key_is_of_what_a_mapping_says_in_any_order():
    assert key_of({"a": 1, "b": {"c": 2, "d": 3}}) == key_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})


def test_a_digest_is_of_what_a_value_says(llama, task):
    def adding(n):
        return lambda model, task: n

    def plus_one(x):
        return x + 1

    def plus_two(x):
        return x + 2

    different = [
        1, 1.0, True, "1", None, (1,), [1], {"a": 1}, {"a": 2}, frozenset({1, 2}), torch.ones(2), torch.ones(1, 2),
        torch.ones(2).double(), plus_one, plus_two, partial(plus_one, x=1), partial(plus_one, x=2), adding(1),
        adding(2), task, task.forget, task.forget[:3], llama, tiny.bridge("llama", seed=5), torch.float32,
        random.Random(1),
    ]  # fmt: skip
    assert len({digest(value) for value in different}) == len(different)
    assert digest(frozenset("abc")) == digest(frozenset("cba"))
    assert digest(adding(1)) == digest(adding(1))
    assert digest(tiny.task(llama)) == digest(task)
    assert digest(replace(task, name="other")) != digest(task)
    around: list[object] = []
    around.append(around)
    assert digest(around) == digest(around)


def capped(cap):
    return lambda logits, targets: logits.clamp(max=cap)


class WithAttribute:
    def __init__(self, cap):
        self.cap = cap

    def __call__(self, logits, targets):
        return logits.clamp(max=self.cap)

    def method(self, logits, targets):
        return self(logits, targets)


class WithSlots:
    __slots__ = ("cap",)

    def __init__(self, cap):
        self.cap = cap


@dataclass
class WithField:
    cap: float


def local_class(cap):
    class Local:
        def __call__(self, logits):
            return logits.clamp(max=cap)

    return Local


def decorated(cap):
    def decorate(function):
        @wraps(function)
        def inner(*arguments):
            return function(*arguments) * cap

        return inner

    return decorate(loss)


def of_a_global(cap):
    known = {"CAP": cap}
    exec("def f(logits):\n    return logits.clamp(max=CAP)", known)
    return known["f"]


KINDS = {
    "closure": capped,
    "closure of a closure": lambda cap: partial(capped(cap), targets=None),
    "default": lambda cap: lambda logits, cap=cap: logits,
    "keyword default": lambda cap: lambda logits, *, cap=cap: logits,
    "bound argument": lambda cap: partial(loss, cap),
    "bound method": lambda cap: WithAttribute(cap).method,
    "bound method written in C": lambda cap: torch.full((2,), cap).add,
    "object": WithAttribute,
    "object with slots": WithSlots,
    "dataclass": WithField,
    "local class": local_class,
    "object of a local class": lambda cap: local_class(cap)(),
    "decorated": decorated,
    "cached": lambda cap: cache(capped(cap)),
    "global number": of_a_global,
    "function written in C": lambda cap: torch.relu if cap == 1.0 else torch.abs,
    "module of torch": torch.nn.LeakyReLU,
    "generator of random numbers": lambda cap: torch.Generator().manual_seed(int(cap)),
    "long array": lambda cap: np.full(5000, cap) * (np.arange(5000) != 2500) + np.arange(5000) * (cap == 9),
    "attrgetter": lambda cap: operator.attrgetter(f"a{cap}"),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_two_values_of_one_name_are_told_apart_and_two_alike_are_not(kind):
    """Law: where the name is the same, what is bound decides, whatever it is bound by."""
    assert digest(kind(1.0)) == digest(kind(1.0))
    assert digest(kind(1.0)) != digest(kind(5.0))
    assert digest(partial(loss, kind(1.0))) != digest(partial(loss, kind(5.0)))


@pytest.mark.parametrize("value", [object(), iter([1]), (i for i in [1]), threading.Lock()], ids=lambda v: str(type(v)))
def test_what_has_no_value_is_refused_also_inside_of_something(value):
    for whole in (value, partial(loss, value), lambda: value, WithAttribute(value), [value], {"a": value}):
        with pytest.raises(ValueError, match="expected values that a file can be recognised by, got"):
            digest(whole)


def test_a_digest_of_a_model_is_the_same_after_it_has_run(llama, task):
    before = digest(llama)
    task.forget.logits(llama)
    assert digest(llama) == before
