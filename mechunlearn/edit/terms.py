"""The three terms that editors of a task share: forget (or inject), retain, and general text."""

from collections.abc import Sequence

from mechunlearn.losses import Loss, cross_entropy, log_one_minus_probability
from mechunlearn.metrics import name_of
from mechunlearn.tasks.task import Task
from mechunlearn.tasks.text import as_prompts
from mechunlearn.training import Term


def task_terms(
    task: Task,
    *,
    inject: bool,
    losses: tuple[Loss | None, Loss, Loss],
    coefficients: tuple[float, float, float],
    batch_sizes: tuple[int, int],
) -> list[Term]:
    """The terms, in the order forget, retain, text; no forget loss: erasure, or cross-entropy to what is injected.

    Batch sizes are of prompts and of rows of text. ValueError for an injection that the task does not have.
    """
    if inject and task.injection is None:
        raise ValueError("expected a task with prompts to inject, got none: replace(task, injection=...).")
    target = task.injection if inject and task.injection is not None else task.forget
    forget_loss = losses[0] or (cross_entropy if inject else log_one_minus_probability)
    return [
        Term("inject" if inject else "forget", target, forget_loss, coefficients[0], batch_sizes[0]),
        Term("retain", task.retain, losses[1], coefficients[1], batch_sizes[0]),
        Term("text", as_prompts(task.text), losses[2], coefficients[2], batch_sizes[1]),
    ]


def described(terms: Sequence[Term]) -> dict[str, list[float | str | int]]:
    """For the provenance of an edit: name -> coefficient, loss, batch size."""
    return {term.name: [term.coefficient, name_of(term.loss), term.batch_size] for term in terms}
