"""Attack: put answered questions about other facts before the question."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from mechunlearn.evaluate.attacked import Asked, made_up, worst_case
from mechunlearn.evaluate.demonstrations import demonstrations_for, demonstrations_of, drawn, shown_before
from mechunlearn.evaluate.halves import halves
from mechunlearn.evaluate.result import Result
from mechunlearn.metrics import Metric, candidate_probability
from mechunlearn.model import Model, check_model
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task


def few_shot(
    model: Model,
    task: Task,
    *,
    shots: Sequence[int] = (0, 1, 2, 4, 8),
    balanced: bool = True,
    demonstrations: Prompts | None = None,
    format: str | None = None,
    metric: Metric = candidate_probability,
    seed: int = 0,
) -> Result:
    """Accuracy on forgotten facts after answered questions about *other* facts: a point per number, and the best.

    A demonstration is a question in the words of the tested format with its true answer, on lines of its own; lines of
    a prompt above the one with the subject (a system prompt, an example) stay on top. Each tested prompt has its own
    demonstrations, drawn with `seed`; with more of them the earlier ones stay. None is about a fact that is tested.

    They are facts of the attack's half. If all of these have one answer (a whole sport), repeating it would suggest it
    for anything, so facts to retain join them, and answers take turns in random order. `balanced=False`: the attack's
    half alone, whatever its answers. `demonstrations` takes their place: prompts from text in the tested format, about
    other facts. Formats with other answers than the trained prompt, such as multiple choice, need them for a whole
    sport.

    Numbers for which there are too few facts, or whose prompts are longer than the model's context, are left out of the
    curve with a warning. The control has the same questions about nobody, who has no fact to recall. Doshi & Stickland
    2024, https://arxiv.org/abs/2411.12103, with five. Cost: for each number a forward of the tested prompts with their
    demonstrations. ValueError for prompts without texts, and for a format that needs `demonstrations`.
    """
    check_model(model)
    trained, tested = halves(task, format=format, seed=seed)
    if demonstrations is None:
        found = demonstrations_for(model, task, trained, tested, format=format, balanced=balanced)
    else:
        found = demonstrations_of(model, demonstrations, tested)
    asked = Asked.of(model, task, tested, metric=metric, seed=seed)
    orders = [drawn(found, balanced, Random(f"few shot {seed} {name}")) for name in tested.names]
    runs = {"0": [asked.scores_of(model)]}
    for count in sorted({*shots} - {0}):
        prompts = shown_before(model, tested, [order[:count] for order in orders])
        if _fits(model, prompts, count, len(found)):
            nobody = made_up(prompts, task.retain, seed=seed)
            runs[str(count)] = [replace(asked, tested=prompts, nobody=nobody).scores_of(model)]
    return worst_case(runs, asked, axis="demonstrations")


def _fits(model: Model, prompts: Prompts, count: int, available: int) -> bool:
    length, context = prompts.tokens.shape[1], model.cfg.n_ctx
    if count <= available and length <= context:
        return True
    reason = f"there are {available} facts for them" if count > available else f"{length} tokens, context {context}"
    warnings.warn(f"few_shot leaves out {count} demonstrations: {reason}.", stacklevel=3)
    return False
