"""What both protocols of latent-knowledge probes share: fit on some facts, ask about others, layer by layer."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.curve import Curve
from mechunlearn.evaluate.halves import check_apart, formatted
from mechunlearn.evaluate.result import Result
from mechunlearn.model import Model, check_model, shape
from mechunlearn.reading import (
    Where,
    check_batch_size,
    check_functions,
    labels_by_token,
    states_at,
    subject_tokens,
)
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task

Right: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
"""(features, labels, rows to fit on, penalty) -> for each row, whether probes fitted on those rows get its label."""

Share: TypeAlias = Float[np.ndarray, "tested point"]

FITTED = 0.8
"""The share of the facts of each class that a round fits on, as in Guo et al."""


def by_layer(
    model: Model,
    fitted: Prompts,
    tested: Prompts,
    labels: Int[Tensor, "prompt"],
    right: Right,
    sense: str,
    *,
    at: Where,
    splits: int,
    seed: int,
    penalty: float,
    batch_size: int,
    remedy: str,
) -> Result:
    """Probes at every point of the residual stream, fitted on some prompts and asked about others.

    `labels`: one for each fitted prompt, then for each tested one what counts as right. `remedy`: for the error
    about a class that no fitted prompt has.
    """
    check_model(model)
    given, count = labels.cpu().numpy(), len(fitted)
    _check(fitted, tested, at, splits, penalty, batch_size)
    _check_classes(given[:count], given[count:], tested.names, remedy)
    states = np.concatenate([states_at(model, p, at, batch_size=batch_size) for p in (fitted, tested)], 1)
    tokens = np.concatenate([subject_tokens(p, at) for p in (fitted, tested)])
    facts, control = np.zeros((2, len(tested), len(states)))
    for turn in range(splits):
        rng = np.random.default_rng([seed, turn])
        fit = np.append(_sample(given[:count], fitted.names, rng), np.zeros(len(tested), dtype=bool))
        for total, asked in ((facts, given), (control, labels_by_token(tokens, given, rng))):
            total += np.stack([right(layer, asked, fit, penalty)[count:] for layer in states], 1) / splits
    points = tuple(str(layer) for layer in range(shape(model).n_layers + 1))
    return _result(points, facts, control, 1 / len(np.unique(given[:count])), sense, tested.names)


def retained(task: Task) -> Prompts:
    """The retained facts of the test split, in the trained format."""
    formatted(task, None)  # raises where there is none
    return next(iter(task.formats.values())).retain


def _result(
    points: tuple[str, ...], facts: Share, control: Share, chance: float, sense: str, names: tuple[str, ...]
) -> Result:
    curves = [Curve(points, torch.from_numpy(share), "accuracy", chance) for share in (facts, control)]
    best = int(curves[0].mean.argmax())
    nothing = Result(
        curves[1].per_prompt[:, best], f"{sense}, random labels", chance, "share", names=names, curve=curves[1]
    )
    return Result.strongest(curves[0], sense, names=names, control=nothing)


def _check(fitted: Prompts, tested: Prompts, at: Where, splits: int, penalty: float, batch_size: int) -> None:
    check_batch_size(batch_size)
    check_functions(at=at)
    check_apart(fitted, tested)
    if splits < 1 or penalty <= 0:
        raise ValueError(f"expected at least one split and a positive penalty, got splits={splits}, penalty={penalty}.")


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


def _sample(
    labels: Int[np.ndarray, "prompt"], names: Sequence[str], rng: np.random.Generator
) -> Bool[np.ndarray, "prompt"]:
    """True at the prompts of a random 80 % of the facts of each class, at least one; their order does not matter."""
    kept: set[str] = set()
    for label in np.unique(labels):
        facts = sorted({name for name, own in zip(names, labels, strict=True) if own == label})
        kept |= {facts[place] for place in rng.permutation(len(facts))[: max(1, round(FITTED * len(facts)))]}
    return np.array([name in kept for name in names])
