"""Mass editing: many facts at once, in the MLPs of several layers, by least squares."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mechunlearn.components import ComponentMask
from mechunlearn.edit.inject.facts import subject_end
from mechunlearn.edit.inject.keys import KeyCovariance
from mechunlearn.edit.inject.solving import least_squares
from mechunlearn.edit.inject.targets import Row, Search, Sought, add, facts_written, selected, target_move
from mechunlearn.model import Model
from mechunlearn.model.mlp_values import adding_to_mlp, before_post_norm
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, Entries


def memit(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    covariance: KeyCovariance | None = None,
    covariance_weight: float = 50.0,
    prefixes: Sequence[str] | None = None,
    steps: int = 40,
    learning_rate: float = 0.5,
    kl_coefficient: float = 0.0625,
    decay: float = 0.5,
    clamp: float = 1.5,
    stop_below: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> Edit:
    """Write all facts of `task.injection` into the W_out of every MLP that the mask names.

        W_out + (w C + K^T K)^-1 K^T R      w = covariance_weight

    For each fact, the move of the highest MLP's output at the subject's last token is sought as in `rome`, and with it
    the residual stream that is wanted there. Then, from the lowest MLP to the highest, R is what that stream still
    lacks, one row per fact, over the number of MLPs left; K are the facts' keys, means over the contexts; C is the
    second moment of the keys of general text, which counts as much as w tokens of it. A larger w writes facts less
    fully and spares other text more.

    In models with a norm after the MLP (Gemma 2) moves are added before it, and the residual stream's lack is taken
    back through it (`before_post_norm`). Biases, other matrices, neurons, `covariance`, `prefixes`: as in `rome`.

    Meng et al. 2023, https://arxiv.org/abs/2210.07229. `covariance_weight`, `steps` and `clamp` suit the shipped model;
    theirs are 15,000 for GPT-J and 20,000 for GPT-2 XL, 20 to 25 steps, and 0.75. `clamp` and `decay` are relative to
    the norm of that residual stream. Cost: for each fact the search of `rome` from the highest MLP's layer up, and one
    forward of its contexts for each MLP; for each MLP one solve of d_mlp equations.
    Errors: as for `rome`, without its limit to one MLP; and ValueError for a weight that is not above 0.
    """
    if covariance_weight <= 0:
        raise ValueError(f"covariance_weight must be above 0, got {covariance_weight}.")
    search = Search(steps, learning_rate, kl_coefficient, decay, clamp, stop_below)
    return facts_written(
        model,
        task,
        mask,
        partial(spread, model, search, partial(_solved, covariance_weight), progress),
        covariance=covariance,
        prefixes=prefixes,
        search=search,
        seed=seed,
        provenance={"editor": "memit", "covariance_weight": covariance_weight},
    )


def _solved(weight: float, output: Entries, covariance: KeyCovariance, keys: Tensor, moves: Tensor) -> Tensor:
    return least_squares(selected(output, covariance), keys, moves, weight)


Solve: TypeAlias = Callable[[Entries, KeyCovariance, Tensor, Tensor], Tensor]
"""(W_out, covariance, keys [fact, unit], moves [fact, d_model]) -> its change [unit, d_model], in float64."""


def spread(
    model: Model,
    search: Search,
    solve: Solve,
    progress: bool,
    sought: Sequence[Sought],
    outputs: Sequence[Entries],
    covariance: KeyCovariance,
) -> list[Row]:
    """From the lowest MLP to the highest: what is lacking, over the number of MLPs left, by `solve`.

    What is wanted is the residual stream that leaves the highest MLP's layer at the subject's last token, as it is
    with the move that `target_move` finds there, bounded by that stream's norm. Keys and what is lacking are measured
    anew for each MLP, on the model as changed below it, as means over the contexts.
    """
    layers = [e.slot.layer for e in outputs]
    wanted, history = list[Tensor](), list[Row]()
    for number, fact in enumerate(tqdm(sought, desc="values", disable=not progress, leave=False)):
        residual = fact.values(model, layers[-1:]).residual[0]
        move, rows = target_move(model, fact, layers[-1], residual, search)
        wanted.append(_residual_with(model, fact, layers[-1], move))
        history += [{"fact": number, **row} for row in rows]
    for place, output in enumerate(outputs):
        keys, moves = _keys_and_moves(model, sought, torch.cat(wanted), layers[place:])
        add(output, solve(output, covariance, keys.double().cpu()[:, output.units], moves.double().cpu()))
    return history


def _residual_with(model: Model, fact: Sought, layer: int, move: Tensor) -> Float[Tensor, "1 d_model"]:
    with adding_to_mlp(model, layer, subject_end(fact.contexts), move):
        return fact.values(model, [layer]).residual


def _keys_and_moves(
    model: Model, sought: Sequence[Sought], wanted: Float[Tensor, "fact d_model"], left: Sequence[int]
) -> tuple[Float[Tensor, "fact d_mlp"], Float[Tensor, "fact d_model"]]:
    """Of the lowest layer left: its keys, and how far its outputs should move."""
    found = [fact.values(model, {left[0], left[-1]}) for fact in sought]
    lacking = wanted - torch.cat([values.residual for values in found])
    outputs = torch.cat([values.outputs[left[0]] for values in found])
    keys = torch.cat([values.keys[left[0]] for values in found])
    return keys, before_post_norm(model, left[0], outputs, lacking / len(left))
