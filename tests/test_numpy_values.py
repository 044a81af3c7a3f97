"""Numbers and arrays of numpy are taken wherever Python's are, and give the same."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import mechunlearn as mu

FRAME = pd.DataFrame({"s": [f"w{i}" for i in range(10, 20)], "a": ["w5", "w6"] * 5})
RECORDS, QUESTIONS = mu.testbed.counterfact()


def plain(kind, value):
    return value


def numpy(kind, value):
    return kind(value)


def told(task):
    """What a task has drawn."""
    return task.name, {side: list(names) for side, names in task.splits.items()}, task.forget.tokens.tolist()


def mask(model):
    return mu.ComponentMask.of(["L1MLP"], mu.shape(model))


def top(model, number, **rule):
    return mu.localize.random(model, seed=number(np.int64, 3), components=mu.components.heads).top(**rule)


def finetuned(model, number):
    whole, real = partial(number, np.int64), partial(number, np.float64)
    sizes = {"steps": whole(2), "batch_size": whole(4), "text_batch_size": whole(2), "micro_batch_size": whole(2)}
    options = {"learning_rate": real(1e-2), "forget_coefficient": real(0.5), "seed": whole(1), "progress": False}
    return mu.edit.finetune(model, tiny.task(model), mask(model), **sizes, **options)


CALLS = {
    "k": lambda m, n: str(list(top(m, n, k=n(np.int64, 2)))),
    "fraction": lambda m, n: str(list(top(m, n, fraction=n(np.float64, 0.5)))),
    "parameters": lambda m, n: str(list(top(m, n, parameters=n(np.int64, 2000)))),
    "receivers": lambda m, n: mu.localize.path_patching(
        m, tiny.prompts(m), senders=["L0MLP"], receivers=n(np.int64, 2), batch_size=n(np.int64, 3)
    ).tensor.tolist(),
    "labels": lambda m, n: mu.localize.probes(
        m, tiny.prompts(m, n=4), labels=n(np.array, [0, 1, 0, 1]), folds=n(np.int64, 2)
    ).accuracy.tolist(),
    "layers": lambda m, n: mu.evaluate.lens_extraction(
        m, tiny.task(m), budget=n(np.int64, 2), layers=n(np.array, [0, 1])
    ).per_example.tolist(),
    "sizes": lambda m, n: (
        mu.localize.faithfulness(
            m,
            tiny.prompts(m),
            mu.localize.random(m, seed=0, components=mu.components.heads),
            sizes=n(np.array, [0.5]),
            random_circuits=n(np.int64, 1),
        )
        .summary(draws=20)
        .to_csv()
    ),
    "finetune": lambda m, n: {label: values.tolist() for label, values in finetuned(m, n).values.items()},
    "relearn": lambda m, n: mu.evaluate.relearn(
        m,
        tiny.task(m),
        learning_rates=n(np.array, [0.01]),
        steps=n(np.int64, 3),
        at=n(np.array, [0, 2]),
        seed=n(np.int64, 1),
    ).curve.per_prompt.tolist(),
    "seeds": lambda m, n: mu.evaluate.compare(
        m, tiny.task(m), {}, metrics={"seed": seed_itself}, seeds=n(np.array, [3, 5]), progress=False
    ).table.to_csv(),
    "frame": lambda m, n: told(
        mu.tasks.from_frame(
            m,
            FRAME,
            prompt="{s} w7",
            subject="s",
            answer="a",
            forget=n(np.int64, 2),
            candidates=n(np.int64, 2),
            seed=n(np.int64, 1),
        )
    ),
}
SHIPPED = {
    "athletes": lambda m, n: told(mu.tasks.sports_facts(m, forget=n(np.int64, 2), seed=n(np.int64, 3))),
    "drawn": lambda m, n: told(mu.tasks.sports_facts(m, forget=n(np.int64, 2), forget_seed=n(np.int64, 3))),
    "names": lambda m, n: told(mu.tasks.sports_facts(m, forget=n(np.array, ["LeBron James", "Tom Brady"]))),
    "records": lambda m, n: told(
        mu.tasks.counterfact(
            m, forget=n(np.int64, 4), source=RECORDS, questions=QUESTIONS, shots=0, seed=n(np.int64, 1)
        )
    ),
    "parts": lambda m, n: list(map(told, mu.tasks.partitioned(mu.tasks.sports_facts(m, forget=4), n(np.int64, 2)))),
}


def seed_itself(model, task, *, seed):
    return mu.evaluate.Result(torch.full((2,), float(seed)), "the seed")


@pytest.mark.parametrize("name", CALLS)
def test_a_number_of_numpy_is_the_number(llama, unchecked, name):
    assert CALLS[name](llama, numpy) == CALLS[name](llama, plain)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_number_of_numpy_is_the_number_for_the_shipped_model_too(shipped, unchecked, name):
    assert SHIPPED[name](shipped, numpy) == SHIPPED[name](shipped, plain)
