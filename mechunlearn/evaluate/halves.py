"""What an attack may see, and what it is tested on: never the same fact."""

import random

import torch

from mechunlearn.evaluate.sides import side_of
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task


def halves(task: Task, *, format: str | None = None, seed: int = 0) -> tuple[Prompts, Prompts]:
    """Prompts that an attack may train on, and those that test it, about other facts.

    Tested are the forgotten facts of the test split in `format` (default: the first, the trained prompt); an attack
    trains on `task.forget`. Where the two share facts, as in tasks that forget single athletes, a random half of the
    names is tested and the others are trained on (Deeb & Roger 2024, https://arxiv.org/abs/2410.08827).
    ValueError for prompts without names and for too few facts to split.
    """
    tested = formatted(task, format)
    if not (task.forget.names and tested.names):
        raise ValueError("expected prompts with names, to tell facts apart, got none: build them with subjects=....")
    names = sorted(set(tested.names))
    shared = set(names) & set(task.forget.names)
    kept = set(random.Random(seed).sample(names, (len(names) + 1) // 2)) if shared else set(names)
    trained = [i for i, name in enumerate(task.forget.names) if name not in kept]
    if not trained:
        raise ValueError(
            f"expected at least two forgotten facts, one to attack with and one to test, got {len(names)}: "
            f"take a task that forgets more."
        )
    rows = [i for i, name in enumerate(tested.names) if name in kept]
    return task.forget.rows(torch.tensor(trained)), tested.rows(torch.tensor(rows))


def formatted(task: Task, format: str | None) -> Prompts:
    """The forgotten facts of the test split, asked so; ValueError if the task has no such format."""
    return side_of(task, format=format)


def check_apart(trained: Prompts, tested: Prompts) -> None:
    """ValueError if an attack has seen what it is tested on."""
    shared = sorted(set(trained.names) & set(tested.names))
    if shared or not (trained.names and tested.names):
        raise ValueError(
            f"expected an attack on other facts than it is tested on, got {shared[:5] or 'prompts without names'} "
            "in both: take them from mu.evaluate.halves(task)."
        )
