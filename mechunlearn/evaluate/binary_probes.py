"""Are forgotten facts still apart from the others, for probes that see some of both?"""

from typing import Literal

import numpy as np
import torch

from mechunlearn.evaluate.halves import check_apart, halves
from mechunlearn.evaluate.latent import by_layer, retained
from mechunlearn.evaluate.result import Result
from mechunlearn.model import Model
from mechunlearn.reading import Where, answer, guesses
from mechunlearn.tasks.joined import joined
from mechunlearn.tasks.task import Task


def binary_probes(
    model: Model,
    task: Task,
    *,
    side: Literal["forget", "retain"] = "forget",
    at: Where = answer,
    splits: int = 5,
    seed: int = 0,
    penalty: float = 1.0,
    batch_size: int = 64,
) -> Result:
    """Share of held-out facts for which the probes of all classes are right, at the best layer.

    For each layer, split and class (an answer's first token), a logistic regression "this class or not" on the
    residual stream at the last token of the prompt. They are fitted on a random 80 % of the forgotten facts that an
    attack may see (`halves(task, seed=seed)`: the train split of a whole sport, half of single athletes) and of
    `task.retain`, and asked about the other forgotten facts: never about a name that they saw. Right is who is right
    for every class. Standardising, penalty, `splits`, `curve`, `control`, `side` and the choice of the best layer: as
    for `multinomial_probe`.

    Compare with a model that never knew: what it reaches is the floor. Where a whole class is forgotten, probes could
    learn "a name that means nothing to this model" for it, since the retained facts are known and the forgotten ones
    are not, and be right about names that were *never* known too.

    Chance: 1 / classes, of a guess of one class. Probes that found nothing say no to every class and are never right.
    Cost: 1 forward, and 2 x (n_layers + 1) x `splits` x classes small fits.

    Guo et al. 2025, https://arxiv.org/abs/2410.12949 (three sports, first experiments). ValueError for answers of
    tested facts that no fitted fact has, one class only, too few facts to split, prompts without names.
    """
    seen, tested = halves(task, seed=seed)
    check_apart(seen, tested)
    fitted = joined(seen, task.retain)
    tested = tested if side == "forget" else retained(task)
    sense = f"one binary probe per class, all right, {side} facts, best layer"
    labels = torch.cat([prompts.answers[:, 0].cpu() for prompts in (fitted, tested)])
    options = {"at": at, "splits": splits, "seed": seed, "penalty": penalty, "batch_size": batch_size}
    remedy = "forget more facts with this answer, or retain some"
    return by_layer(model, fitted, tested, labels, _all_right, sense, **options, remedy=remedy)


def _all_right(features: np.ndarray, labels: np.ndarray, fit: np.ndarray, penalty: float) -> np.ndarray:
    """A class that no row has been fitted on is said never to be there."""
    right = np.ones(len(labels), dtype=bool)
    for label in np.unique(labels):
        is_label = labels == label
        right &= guesses(features, is_label, fit, penalty) == is_label
    return right
