"""Relearning from harmless text: train on what says nothing about the forgotten facts, ask about all of them."""

from collections.abc import Iterable, Sequence

from mechunlearn.evaluate.attacked import Asked, worst_case
from mechunlearn.evaluate.halves import formatted
from mechunlearn.evaluate.relearning import measured_at, relearning_terms
from mechunlearn.evaluate.result import Result
from mechunlearn.evaluate.tuned import Tuning
from mechunlearn.metrics import Metric, candidate_probability
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.tasks.text import pack
from mechunlearn.training import MakesOptimizer, adamw


def relearn_benign(
    model: Model,
    task: Task,
    *,
    text: Iterable[str | Sequence[int]] | None = None,
    text_length: int = 64,
    learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3),
    steps: int = 50,
    batch_size: int = 4,
    warmup: float = 0.1,
    retain_coefficient: float = 1.0,
    at: Sequence[int] | None = None,
    format: str | None = None,
    metric: Metric = candidate_probability,
    optimizer: MakesOptimizer = adamw,
    micro_batch_size: int | None = None,
    seed: int = 0,
) -> Result:
    """Accuracy on all forgotten facts after training on text and retained facts: in the worst case.

    `text` (default: `task.text`) is packed to rows of `text_length` tokens; rows that name a forgotten fact are left
    out. With `retain_coefficient=0` it is text alone. No answer is taught for any forgotten fact, so what comes back
    was there; this also holds where one answer is forgotten, such as a whole sport, and `relearn` teaches it.

    Hu et al. 2024 (https://arxiv.org/abs/2406.13356). Everything else is as for `relearn`, and so are cost and errors.
    """
    tested = formatted(task, format)
    terms = relearning_terms(
        model,
        task,
        None,
        tested,
        coefficients=(0.0, retain_coefficient, 1.0),
        batch_sizes=(batch_size, batch_size, batch_size),
        text=None if text is None else pack(model, text, length=text_length),
    )
    asked = Asked.of(model, task, tested, metric=metric, seed=seed)
    tuning = Tuning(learning_rates, warmup, optimizer, micro_batch_size, seed)
    runs = tuning.scores(model, terms, asked, steps=steps, at=measured_at(steps, at))
    return worst_case(runs, asked, axis="steps")
