"""Relearning by full fine-tuning: train on some forgotten facts, ask about the others."""

from collections.abc import Sequence

from mechunlearn.evaluate.attacked import Asked, worst_case
from mechunlearn.evaluate.halves import halves
from mechunlearn.evaluate.relearning import measured_at, relearning_terms
from mechunlearn.evaluate.result import Result
from mechunlearn.evaluate.tuned import Tuning
from mechunlearn.metrics import Metric, candidate_probability
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.training import MakesOptimizer, adamw


def relearn(
    model: Model,
    task: Task,
    *,
    learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3),
    steps: int = 100,
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
    """Accuracy on forgotten facts after training on *other* forgotten facts: the worst case over rates and steps.

        loss = relearned + retain_coefficient * retained + text_coefficient * text

    each a mean cross-entropy over answer tokens, in nats, on what `halves(task, seed=seed)` leaves to train on, on
    `task.retain` and on `task.text` without the rows that name a tested fact. Trained are all weights of attention and
    MLPs; embeddings, norms, biases and the unembedding are not. The schedule rises for a share `warmup` of the steps
    and falls along a cosine; gradients are clipped at norm 1. `at`: after how many steps the facts are asked, in
    `format` (default: the trained prompt) by `metric`; by default after 0, 1, 2, 4, ... and the last.

    The curve has, at each step, the learning rate that does best there; the value is its highest point. A rate that
    diverges counts up to the step where it does. `control` has the same questions about made-up subjects, put to the
    same attacked models: what the attack teaches to say about anybody. Retained facts in the mix keep that low, so
    they are there by default; a model that never knew the facts may still learn to give those it does not know the
    forgotten answer, where there is only one (a whole sport). Attack such a model too.

    Deeb & Roger 2024 (https://arxiv.org/abs/2410.08827), who train on relearned facts alone, with Lion, batches of 4,
    24 steps of warm-up, 6 epochs and rates in steps of 2. The default rates suit the shipped model; theirs for 7B-8B
    models are 1e-7 to 3.2e-6. Cost: per rate and step F + B of each batch; F of the tested facts, twice, at each point.

    The weights are put back bit for bit, also after a failure; a copy of those that are trained is kept for it.
    ValueError for too few facts, an unknown format, prompts without names, processed or quantised weights.
    """
    trained, tested = halves(task, format=format, seed=seed)
    terms = relearning_terms(
        model,
        task,
        trained,
        tested,
        coefficients=(1.0, retain_coefficient, text_coefficient),
        batch_sizes=(batch_size, batch_size, text_batch_size),
    )
    asked = Asked.of(model, task, tested, metric=metric, seed=seed)
    tuning = Tuning(learning_rates, warmup, optimizer, micro_batch_size, seed)
    runs = tuning.scores(model, terms, asked, steps=steps, at=measured_at(steps, at))
    return worst_case(runs, asked, axis="steps")
