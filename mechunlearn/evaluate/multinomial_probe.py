"""Does a probe fitted on retained facts read the forgotten ones?"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.evaluate.halves import formatted
from mechunlearn.evaluate.latent import by_layer, retained
from mechunlearn.evaluate.result import Result
from mechunlearn.model import Model
from mechunlearn.reading import Where, answer, guesses
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task


def multinomial_probe(
    model: Model,
    task: Task,
    *,
    side: Literal["forget", "retain"] = "forget",
    injected: bool = False,
    at: Where = answer,
    splits: int = 5,
    seed: int = 0,
    penalty: float = 1.0,
    batch_size: int = 64,
) -> Result:
    """Accuracy on the forgotten facts of a linear probe that was fitted on retained ones, at its best layer.

    For each layer and split, a multinomial logistic regression for the answer's first token (features standardised,
    L2 penalty: scikit-learn's C = 1 / `penalty`) on the residual stream at the last token of the prompt. It is fitted
    on a random 80 % of `task.retain` and asked about every forgotten fact of the test split. The value of a fact is the
    share of `splits` in which the probe names its answer. `curve`: by layer, from the embedding ("0") to the final
    residual stream, n_layers + 1 points; the result is the layer with the highest mean, which is chosen on the tested
    facts: the best of many layers is above chance even where nothing is known. Rows share this, so compare with the
    original, which knew, and with a model that never knew: what names alone tell about their bearers (language,
    fashion of their time) is readable in both, and is no knowledge of the fact.

    `control`: the same probe for random labels, one for each last token of a subject, at the same layer (see
    `mechunlearn.localize.probes`). `side="retain"` asks about the retained facts of the test split: where that fails,
    the probe is bad, and its failure on the forgotten facts is no evidence. `injected=True` counts the injected answer
    as right instead of the true one.

    Chance: 1 / classes among the retained facts. Cost: 1 forward, and 2 x (n_layers + 1) x `splits` small fits.

    Guo et al. 2025, https://arxiv.org/abs/2410.12949, for single athletes: a forgotten sport is no class
    that retained facts have, and **`binary_probes` is for that**. They use raw features, one split, and leave out the
    last layer. ValueError for answers that no retained fact has, one class, prompts without names.
    """
    tested = formatted(task, None) if side == "forget" else retained(task)
    right = _injected(task, tested, side) if injected else tested.answers[:, 0].cpu()
    sense = f"multinomial probe of retained facts, {'injected answer' if injected else f'{side} facts'}, best layer"
    labels = torch.cat([task.retain.answers[:, 0].cpu(), right])
    options = {"at": at, "splits": splits, "seed": seed, "penalty": penalty, "batch_size": batch_size}
    remedy = "where a whole class is forgotten, use binary_probes"
    return by_layer(model, task.retain, tested, labels, _named, sense, **options, remedy=remedy)


def _named(features: np.ndarray, labels: np.ndarray, fit: np.ndarray, penalty: float) -> np.ndarray:
    return guesses(features, labels, fit, penalty) == labels


def _injected(task: Task, tested: Prompts, side: str) -> Int[Tensor, "prompt"]:
    """The injected answer of each tested fact."""
    if task.injection is None or side == "retain":
        raise ValueError(
            "expected a task with injected answers and the forgotten side for injected=True, got "
            f"{'the retained side' if task.injection else 'no Task.injection'}: leave injected out."
        )
    new = dict(zip(task.injection.names, task.injection.answers[:, 0].tolist(), strict=True))
    missing = [name for name in tested.names if name not in new]
    if missing:
        raise ValueError(
            f"expected an injected answer for every tested fact, got none for {missing[0]}: the task tests facts that "
            f"are not edited; leave injected out."
        )
    return torch.tensor([new[name] for name in tested.names])
