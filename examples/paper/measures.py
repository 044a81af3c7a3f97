"""What is asked of the original model, of every edit, and of the twin that never knew."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

import mechunlearn as mu
from mechunlearn.evaluate import Question, Result, Test, in_format
from mechunlearn.metrics import Metric
from paper.facts import CHOICE, PARAPHRASES, is_sports
from paper.relearning import Attack, relearned
from paper.setup import Setup

SIDES: tuple[Literal["forget", "retain"], ...] = ("forget", "retain")


def formats_of(name: str, task: mu.Task) -> dict[str, Test]:
    """Both sides of each format that the task has: a broken format is not forgetting."""
    sports = is_sports(name)
    last = "capitalised" if sports else "neighbourhood"
    asked: dict[str, Test] = {
        "trained prompt": in_its_sense(in_format, name),
        "multiple choice": partial(in_format, name=CHOICE[sports]),
        "paraphrases": in_its_sense(partial(in_formats, names=PARAPHRASES[sports]), name),
        last if sports else f"{last} (keep)": in_its_sense(partial(in_format, name=last), name),
    }
    tests: dict[str, Test] = {f"{s}, {format}": partial(test, side=s) for format, test in asked.items() for s in SIDES}
    return {test: found for test, found in tests.items() if not _asks(found, _lacking(name, task))}


def tests_of(setup: Setup, name: str, task: mu.Task) -> dict[str, Test]:
    """Every column of a task; those of formats that the task lacks are left out."""
    tests = formats_of(name, task)
    choice = CHOICE[is_sports(name)]
    tests |= {
        "injected, trained prompt": in_its_sense(partial(mu.evaluate.injected, format="trained prompt"), name),
        "injected, multiple choice": partial(mu.evaluate.injected, format=choice),
        "other knowledge": mu.evaluate.knowledge,
        "text loss": mu.evaluate.text_loss,
        **_relearning(setup, name, task),
    }
    if is_sports(name):
        probe = mu.evaluate.binary_probes if name == "sport" else mu.evaluate.multinomial_probe
        tests["probe"] = partial(probe, splits=1)
    if setup.soft_prompt:
        tests["soft prompt"] = mu.evaluate.soft_prompt
    return {test: found for test, found in tests.items() if not _asks(found, _lacking(name, task))}


def in_its_sense(test: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Accuracy as the paper has it, but for multiple choice, where it is always the probability among the letters: of a
    sport among four sports, which is the default, and of a CounterFact answer among all tokens. After erasure that may
    be the likeliest of four candidates and yet never be said."""
    return test if is_sports(name) else partial(test, metric=mu.metrics.answer_probability)


def in_formats(
    model: Any,
    task: mu.Task,
    *,
    names: Sequence[str],
    side: Literal["forget", "retain"],
    metric: Metric = mu.metrics.candidate_probability,
) -> Result:
    """The mean over formats, of each prompt; where a format asks several times about a fact, of each fact."""
    found = [in_format(model, task, name=name, side=side, metric=metric) for name in names]
    if len(found) == 1:
        return found[0]
    values = torch.stack([result.per_example for result in found]).mean(0)
    return replace(found[0], per_example=values, sense=f"{found[0].sense}, mean of {len(names)} formats")


def _relearning(setup: Setup, name: str, task: mu.Task) -> dict[str, Test]:
    """On the half of the forgotten facts that is not asked, with one rate; at 0, a quarter, a half and all steps, by
    multiple choice before and after."""
    steps, size, micro = setup.relearn_steps, setup.relearn_batch_size, setup.micro_batch_size
    choice, columns = CHOICE[is_sports(name)], ("relearning", "relearning, multiple choice")
    metric = mu.metrics.candidate_probability if is_sports(name) else mu.metrics.answer_probability
    trained = Question(None, metric, tuple(sorted({0, steps // 4, steps // 2, steps})))
    by_choice = Question(choice, mu.metrics.candidate_probability, (0, steps))
    asked = [each for each in (trained, by_choice) if each.format not in _lacking(name, task)]
    if not setup.lora:
        attack = Attack(tuple(asked), setup.relearn_rate, steps, size, micro)
        test = partial(relearned, attack=attack)
        return {column: partial(test, format=each.format) for column, each in zip(columns, asked, strict=False)}
    test = partial(mu.evaluate.relearn_halves, rank=setup.rank, steps=steps, batch_size=size, micro_batch_size=micro)
    test = partial(test, text_batch_size=max(1, size // 2))
    options = [{"format": each.format, "metric": each.metric, "at": each.at} for each in asked]
    return {column: partial(test, **each) for column, each in zip(columns, options, strict=False)}


def _lacking(name: str, task: mu.Task) -> list[str]:
    return [format for format in (CHOICE[is_sports(name)], "neighbourhood") if format not in task.formats]


def _asks(test: Test, formats: Sequence[str]) -> bool:
    options = test.keywords if isinstance(test, partial) else {}
    return any(options.get(option) in formats for option in ("name", "format"))
