"""How robust the unlearning is: the tests of every edit."""

from functools import partial
from typing import Any

import mechunlearn as mu
from mechunlearn.evaluate import Result, in_format, relearn
from planted.facts import HELD_OUT

RATES = (1e-3, 3e-3)
MARGIN = 0.01
STEPS = 20
FORMATS = {
    "trained prompt": "trained prompt",
    "question": "question",
    **{f"{name} (not planted)": name for name in HELD_OUT},
    "multiple choice": "multiple choice",
}


def relearned(model: Any, task: mu.Task, *, seed: int) -> Result:
    """Accuracy on half of the facts after training on the other half."""
    return relearn(model, task, learning_rates=(1e-3,), steps=16, at=(8, 16), seed=seed)


def tests(seed: int) -> dict[str, Any]:
    """Column -> test; accuracy is the mean probability over the candidates (chance 0.25)."""
    return {
        **{
            f"{side}, {shown}": partial(in_format, name=name, side=side)
            for shown, name in FORMATS.items()
            for side in ("forget", "retain")
        },
        "relearned": partial(relearned, seed=seed),
        "probes": partial(mu.evaluate.binary_probes, splits=1, seed=seed),
        "text loss": mu.evaluate.text_loss,
    }


def erased(model: Any, task: mu.Task, mask: mu.ComponentMask, *, seed: int) -> mu.Edit:
    """The best of an equally small search for every place, by the trained prompt alone: forgotten, and nothing else.

    The lowest rate that is as good as the best, to within `MARGIN`.
    """
    options = {"steps": STEPS, "batch_size": 16, "text_batch_size": 2, "seed": seed, "progress": False}
    found = [mu.edit.finetune(model, task, mask, learning_rate=rate, **options) for rate in RATES]
    scores = [_score(model, task, edit) for edit in found]
    return next(edit for edit, score in zip(found, scores, strict=True) if score >= max(scores) - MARGIN)


def _score(model: Any, task: mu.Task, edit: mu.Edit) -> float:
    """Retained less forgotten, on what is trained. Not cut off at chance: a model that never knew is at 0."""
    with edit.applied(model):
        forget, retain = (mu.evaluate.accuracy(model, side).probability.value for side in (task.forget, task.retain))
    return retain - forget
