"""Probes for latent knowledge: fitted on some facts, asked about others, layer by layer."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechunlearn.arguments import check_batch_size, check_functions
from mechunlearn.curve import Curve
from mechunlearn.evaluate.attacks.exam import check_apart, halves
from mechunlearn.evaluate.results import Result
from mechunlearn.evaluate.scoring import side_of
from mechunlearn.model import Model, check_model, shape
from mechunlearn.probing import guesses, labels_by_token, states_at, subject_tokens
from mechunlearn.tasks.positions import Where, answer
from mechunlearn.tasks.prompts import Prompts, joined
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
    """Share of forgotten facts for which the probes of all classes are right, at the best layer.

    For each layer, split and class (an answer's first token), a logistic regression tells "this class" from the others
    by the residual stream at the last token of the prompt. It is fitted on a random 80 % of the forgotten facts that an
    attack may see (`halves(task, seed=seed)`) and of `task.retain`, and asked about the other forgotten facts. A fact
    counts if the probes of all classes are right about it. The other options and the choice of the layer are those of
    `multinomial_probe`.

    The floor is what a model that never knew reaches. Where a whole class is forgotten, probes may learn "a name that
    means nothing to this model" for it, and be right about names that were *never* known too.

    Chance is 1 / classes, that of guessing one class; probes that find nothing say no to every class and are never
    right. Cost: 1 forward, and 2 x (n_layers + 1) x `splits` x classes small fits.

    Guo et al. 2025, https://arxiv.org/abs/2410.12949 (three sports, first experiments). ValueError for answers of
    tested facts that no fitted fact has.
    """
    seen, tested = halves(task, seed=seed)
    fitted = joined(seen, task.retain)
    tested = tested if side == "forget" else side_of(task, side=side)
    sense = f"one binary probe per class, all right, {side} facts, best layer"
    labels = torch.cat([prompts.answers[:, 0].cpu() for prompts in (fitted, tested)])
    options = {"at": at, "splits": splits, "seed": seed, "penalty": penalty, "batch_size": batch_size}
    remedy = "forget more facts with this answer, or retain some"
    return _best_layer(model, fitted, tested, labels, _all_right, sense, **options, remedy=remedy)


def _all_right(features: np.ndarray, labels: np.ndarray, fit: np.ndarray, penalty: float) -> np.ndarray:
    """Whether the probes of all classes are right about each row; a class with no fitted row is never predicted."""
    right = np.ones(len(labels), dtype=bool)
    for label in np.unique(labels):
        is_label = labels == label
        right &= guesses(features, is_label, fit, penalty) == is_label
    return right


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

    For each layer and split, a multinomial logistic regression (features standardised, L2 penalty: scikit-learn's C = 1
    / `penalty`) predicts the answer's first token from the residual stream at the last token of the prompt. It is
    fitted on a random 80 % of `task.retain` and asked about every forgotten fact of the test split. The value of a fact
    is the share of `splits` in which the probe names its answer. `curve`: by layer, n_layers + 1 points from the
    embedding ("0") to the final residual stream.

    The result is the layer with the highest mean on the tested facts, which is above chance even where nothing is
    known. So compare with the original and with a model that never knew.

    - `control`: the same probe for random labels, one for each last token of a subject, at the same layer.
    - `side="retain"`: ask about the retained facts of the test split. A probe that fails there is no evidence
      elsewhere.
    - `injected=True`: count the injected answer as right instead of the true one.

    Chance is 1 / classes among the retained facts. Cost: 1 forward, and 2 x (n_layers + 1) x `splits` small fits.

    Guo et al. 2025, https://arxiv.org/abs/2410.12949, with raw features, one split and without the last layer. A
    forgotten sport is no class of the retained facts, which is an error: **take `binary_probes` then**.
    """
    tested = side_of(task, side=side)
    right = _injected(task, tested, side) if injected else tested.answers[:, 0].cpu()
    sense = f"multinomial probe of retained facts, {'injected answer' if injected else f'{side} facts'}, best layer"
    labels = torch.cat([task.retain.answers[:, 0].cpu(), right])
    options = {"at": at, "splits": splits, "seed": seed, "penalty": penalty, "batch_size": batch_size}
    remedy = "where a whole class is forgotten, use binary_probes"

    def is_named(features: np.ndarray, labels: np.ndarray, fit: np.ndarray, penalty: float) -> np.ndarray:
        return guesses(features, labels, fit, penalty) == labels

    return _best_layer(model, task.retain, tested, labels, is_named, sense, **options, remedy=remedy)


def _injected(task: Task, tested: Prompts, side: str) -> Int[Tensor, "prompt"]:
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


_FITTED_SHARE = 0.8
"""The share of the facts of each class that a split fits on, as in Guo et al."""

_Right: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
"""A function (features, labels, rows to fit on, penalty) -> whether fitted probes give each row its label."""


def _best_layer(
    model: Model,
    fitted: Prompts,
    tested: Prompts,
    labels: Int[Tensor, "prompt"],
    right: _Right,
    sense: str,
    *,
    at: Where,
    splits: int,
    seed: int,
    penalty: float,
    batch_size: int,
    remedy: str,
) -> Result:
    """`labels`: the class of each fitted prompt, then of each tested one; `remedy`: the advice for a class unseen."""
    check_model(model)
    wanted, count = labels.cpu().numpy(), len(fitted)
    check_batch_size(batch_size)
    check_functions(at=at)
    check_apart(fitted, tested)
    if splits < 1 or penalty <= 0:
        raise ValueError(f"expected at least one split and a positive penalty, got splits={splits}, penalty={penalty}.")
    _check_classes(wanted[:count], wanted[count:], tested.names, remedy)
    states = np.concatenate([states_at(model, p, at, batch_size=batch_size) for p in (fitted, tested)], 1)
    tokens = np.concatenate([subject_tokens(p, at) for p in (fitted, tested)])
    facts, control = np.zeros((2, len(tested), len(states)))
    for turn in range(splits):
        # The order of the draws (facts to fit on, then labels of the control) is part of what a seed means.
        rng = np.random.default_rng([seed, turn])
        fit = np.append(_fitted_rows(wanted[:count], fitted.names, rng), np.zeros(len(tested), dtype=bool))
        for total, asked in ((facts, wanted), (control, labels_by_token(tokens, wanted, rng))):
            total += np.stack([right(layer, asked, fit, penalty)[count:] for layer in states], 1) / splits
    points = tuple(str(layer) for layer in range(shape(model).n_layers + 1))
    chance, names = 1 / len(np.unique(wanted[:count])), tested.names
    found, random = (
        Curve(points, torch.from_numpy(share), "accuracy", chance, limits=(0.0, 1.0)) for share in (facts, control)
    )
    at_best = random.per_prompt[:, int(found.mean.argmax())]
    nothing = Result(at_best, f"{sense}, random labels", chance, "share", names, random)
    return Result.strongest(found, sense, names=names, control=nothing)


def _check_classes(
    known: Int[np.ndarray, "fitted"], looked_for: Int[np.ndarray, "tested"], names: tuple[str, ...], remedy: str
) -> None:
    unseen = np.flatnonzero(~np.isin(looked_for, known))
    if len(unseen):
        raise ValueError(
            f"expected probes to be fitted on facts with every answer that they are asked for, got none with that of "
            f"{names[unseen[0]]} (token {looked_for[unseen[0]]}), and a class never seen cannot be found: {remedy}."
        )
    if len(np.unique(known)) < 2:
        raise ValueError(
            "expected facts of at least two classes to fit probes on, got one: there is nothing to tell apart; retain "
            "facts with other answers too."
        )


def _fitted_rows(
    labels: Int[np.ndarray, "prompt"], names: Sequence[str], rng: np.random.Generator
) -> Bool[np.ndarray, "prompt"]:
    """True at the prompts of a random 80 % of the facts of each class, at least one; their order does not matter."""
    kept: set[str] = set()
    for label in np.unique(labels):
        facts = sorted({name for name, own in zip(names, labels, strict=True) if own == label})
        kept |= {facts[place] for place in rng.permutation(len(facts))[: max(1, round(_FITTED_SHARE * len(facts)))]}
    return np.array([name in kept for name in names])
