"""Relearning from a few examples: how many other forgotten facts bring the rest back."""

from collections.abc import Sequence

from mechunlearn.evaluate.attacked import Asked, Scores, worst_case
from mechunlearn.evaluate.halves import halves
from mechunlearn.evaluate.relearning import measured_at, relearning_terms, some_of
from mechunlearn.evaluate.result import Result
from mechunlearn.evaluate.tuned import Tuning
from mechunlearn.metrics import Metric, candidate_probability
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.training import MakesOptimizer, adamw


def relearn_few(
    model: Model,
    task: Task,
    *,
    examples: Sequence[int] | None = None,
    learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3),
    steps: int = 20,
    batch_size: int = 4,
    warmup: float = 0.1,
    retain_coefficient: float = 1.0,
    text_coefficient: float = 0.0,
    text_batch_size: int = 4,
    at: Sequence[int] | None = None,
    format: str | None = None,
    metric: Metric = candidate_probability,
    optimizer: MakesOptimizer = adamw,
    micro_batch_size: int | None = None,
    seed: int = 0,
) -> Result:
    """`relearn` with 1, 2, 4, ... other forgotten facts: the curve is over how many, each in its worst case.

    `examples`: how many, in turn; by default powers of two up to 16, or to what `halves` leaves to train on. The facts
    of a smaller number are among those of a larger one. Each number has the same `steps`, whatever it is, and of them
    and of the learning rates the best one counts, the start ("0" examples) included.

    Łucki et al. 2024 (https://arxiv.org/abs/2409.18025) found that a handful of examples, some of them unrelated to
    what was unlearned, undo much. Cost: `relearn`'s for each number. Errors: `relearn`'s, and ValueError for more
    examples than there are.
    """
    trained, tested = halves(task, format=format, seed=seed)
    if examples is None:
        examples = [count for count in (1, 2, 4, 8, 16) if count <= len(trained)]
    asked = Asked.of(model, task, tested, metric=metric, seed=seed)
    tuning = Tuning(learning_rates, warmup, optimizer, micro_batch_size, seed)
    runs: dict[str, list[Scores]] = {"0": [asked.scores_of(model)]}
    for count in examples:
        terms = relearning_terms(
            model,
            task,
            some_of(trained, count, seed=seed),
            tested,
            coefficients=(1.0, retain_coefficient, text_coefficient),
            batch_sizes=(batch_size, batch_size, text_batch_size),
        )
        found = tuning.scores(model, terms, asked, steps=steps, at=measured_at(steps, at))
        runs[str(count)] = [scores for reached in found.values() for scores in reached]
    return worst_case(runs, asked, axis="examples")
