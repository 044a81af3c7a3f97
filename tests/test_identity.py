"""Names and digests of functions, options and values."""

from dataclasses import replace
from functools import partial

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
        adding(2), task, task.forget, task.forget[:3], llama, tiny.bridge("llama", seed=5), torch.float32, object(),
    ]  # fmt: skip
    assert len({digest(value) for value in different}) == len(different)
    assert digest(frozenset("abc")) == digest(frozenset("cba"))
    assert digest(adding(1)) == digest(adding(1))
    assert digest(tiny.task(llama)) == digest(task)
    assert digest(replace(task, name="other")) != digest(task)
    assert digest(object()) == digest(object())
    around: list[object] = []
    around.append(around)
    assert digest(around) == digest(around)
