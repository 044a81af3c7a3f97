"""Attack: learned input vectors in front of the prompt that bring the forgotten answers out."""

from collections.abc import Callable
from dataclasses import replace

from torch.optim import Adam, Optimizer
from tqdm.auto import tqdm

from mechunlearn.evaluate.attacked import Asked, worst_case
from mechunlearn.evaluate.halves import check_apart, halves
from mechunlearn.evaluate.input_vectors import Search, mean_norm, n_bos, with_room
from mechunlearn.evaluate.result import Result
from mechunlearn.metrics import Metric, candidate_probability
from mechunlearn.model import Model, check_model
from mechunlearn.model.residual_changes import with_input_vectors
from mechunlearn.tasks.task import Task


def soft_prompt(
    model: Model,
    task: Task,
    *,
    n_vectors: int = 4,
    radius: float | None = None,
    steps: int = 64,
    learning_rate: float = 0.03,
    batch_size: int = 16,
    restarts: int = 2,
    retain_coefficient: float = 1.0,
    every: int = 16,
    optimizer: Callable[..., Optimizer] = Adam,
    format: str | None = None,
    metric: Metric = candidate_probability,
    seed: int = 0,
    progress: bool = False,
) -> Result:
    """Accuracy on forgotten facts behind a soft prompt that was trained on *other* forgotten facts, along its training.

    `n_vectors` input vectors go between BOS and the text of every prompt, in place of token embeddings. They minimise

        mean -log p(answer) over the attack's half + retain_coefficient * the same over `task.retain`

    with `batch_size` facts of each side at a step, and after each step every vector is put back into the ball
    |v| <= `radius` (default: the mean norm of the prompts' token embeddings, as the first layer sees them). The
    retained facts keep it from always saying the forgotten answer, which would be enough where all forgotten facts have
    the same one. It may still learn to say it of everybody whom the model does not know: the control has the same
    questions about nobody, and a model that never knew the facts shows what a soft prompt teaches
    (https://arxiv.org/abs/2502.15836 elicit strings that no model had seen).

    Each restart begins at the embeddings of other random tokens of the attack's half. The one with the lowest loss on
    the facts that it was trained on is reported; of the curve over steps the tested facts choose the best. Guo et al.
    2025, https://arxiv.org/abs/2410.12949, train keys and values of an attention behind the embeddings instead, with
    radius 6, learning rate 1e-5, 128 steps of 16 facts, 4 restarts and no retained facts.

    Cost: restarts * steps * (F + B) of both batches, and a forward of the tested half for each `every` steps.
    ValueError for prompts that become longer than the model's context, and for options that are not positive.
    """
    check_model(model)
    _check_positive(n_vectors=n_vectors, steps=steps, batch_size=batch_size, restarts=restarts, every=every)
    trained, tested = halves(task, format=format, seed=seed)
    for seen in (trained, task.retain):
        check_apart(seen, tested)
    asked = Asked.of(model, task, tested, metric=metric, seed=seed)
    start = min(n_bos(model, prompts) for prompts in (trained, task.retain, tested))
    reach = mean_norm(model, trained) if radius is None else radius
    _check_positive(radius=reach)
    sides = [with_room(model, prompts, n_vectors, start) for prompts in (trained, task.retain)]
    search = Search(model, sides[0], sides[1], n_vectors, start, reach, retain_coefficient, batch_size)
    attempts = []
    for restart in tqdm(range(restarts), desc="soft prompt", disable=not progress, leave=False):
        found = search.run(steps, every, learning_rate, optimizer, seed=1000 * seed + restart)
        attempts.append((search.loss(found[steps]), found))
    best = min(attempts, key=lambda attempt: attempt[0])[1]
    runs = {"0": [asked.scores_of(model)]}
    nobody = asked.nobody and with_room(model, asked.nobody, n_vectors, start)
    behind = replace(asked, tested=with_room(model, asked.tested, n_vectors, start), nobody=nobody)
    for step, vectors in best.items():
        with with_input_vectors(model, vectors, start):
            runs[str(step)] = [behind.scores_of(model)]
    return worst_case(runs, asked, axis="steps")


def _check_positive(**numbers: int | float) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
