"""Direction ablation: an attack that finds what an edit adds to the residual stream and projects it out."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.evaluate.asking import Original, required
from mechunlearn.evaluate.attacks.exam import Asked, halves, worst_case
from mechunlearn.evaluate.results import Result
from mechunlearn.metrics import Metric, candidate_probability
from mechunlearn.model import Model, base_run, device_of, preserved
from mechunlearn.model.running import without_directions
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task

Direction: TypeAlias = Callable[[Float[Tensor, "token d_model"]], Float[Tensor, "d_model"]]
"""A function from differences of activations (tested minus original) to their direction, as a vector of any length."""


def mean_difference(differences: Float[Tensor, "token d_model"]) -> Float[Tensor, "d_model"]:
    """The mean of the differences: what the edit adds on average."""
    return differences.mean(0)


def principal_difference(differences: Float[Tensor, "token d_model"]) -> Float[Tensor, "d_model"]:
    """The first principal component of the differences about zero: the direction along which the edit moves most."""
    _, vectors = torch.linalg.eigh(differences.double().T @ differences.double())
    return vectors[:, -1].to(differences.dtype)


def direction_ablation(
    model: Model,
    task: Task,
    *,
    original: Original | None = None,
    direction: Direction = mean_difference,
    outliers: float = 3.0,
    format: str | None = None,
    metric: Metric = candidate_probability,
    seed: int = 0,
) -> Result:
    """Accuracy on forgotten facts without the direction that the edit adds, learned from *other* forgotten facts.

    At each place of the residual stream (what enters each layer, and what leaves the last), `direction` is taken of the
    activations of the tested model minus those of the original, at every token of the attack's half. Tokens whose norm
    in the original lies more than `outliers` standard deviations above the mean are dropped: those at which attention
    rests are many times longer than the others. Points of the curve:

    - "0": the model as it is;
    - "after L3": the direction found behind layer 3 is projected out at every place (Arditi et al. 2024,
      https://arxiv.org/abs/2406.11717);
    - "each": the direction found at each place is projected out there (Lucki et al. 2024,
      https://arxiv.org/abs/2409.18025).

    Where both models agree, as below the lowest edited layer, there is no direction and no point. The control has the
    same questions about nobody. This attack knows the original model: it asks how shallow the edit is. `compare` passes
    `original`. `seed` draws the split and the control's subjects. Cost: 2 F of the attack's half, and a forward of the
    tested half for each point.
    """
    original = required(original, direction_ablation)
    trained, tested = halves(task, format=format, seed=seed)
    asked = Asked.of(model, task, tested, metric=metric, seed=seed)
    after = _residuals(model, trained)
    with original() as unedited:
        before = _residuals(unedited, trained)
    units = [_unit(b, a, direction, outliers) for b, a in zip(before, after, strict=True)]
    directions = torch.stack(units).to(device_of(model))
    ablations = {f"after L{i}": unit.expand_as(directions) for i, unit in enumerate(directions[1:])}
    runs = {"0": [asked.scores_of(model)]}
    for name, ablated in {**ablations, "each": directions}.items():
        if bool(ablated.any()):
            with without_directions(model, ablated):
                runs[name] = [asked.scores_of(model)]
    return worst_case(runs, asked, axis="direction projected out")


def _unit(
    before: Float[Tensor, "token d_model"], after: Float[Tensor, "token d_model"], direction: Direction, outliers: float
) -> Float[Tensor, "d_model"]:
    """The direction as a unit vector; zeros where the two models agree."""
    kept = is_usual(before, outliers)
    differences = (after - before)[kept]
    if float(differences.norm()) <= 1e-5 * float(before[kept].norm()):  # rounding errors have a direction too
        return torch.zeros_like(before[0])
    vector = direction(differences)
    return vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)


def is_usual(activations: Float[Tensor, "token d_model"], outliers: float) -> Tensor:
    """True at tokens whose norm is at most so many standard deviations above the mean norm."""
    norms = activations.norm(dim=1)
    return norms <= norms.mean() + outliers * norms.std(unbiased=False)


def _residuals(model: Model, prompts: Prompts) -> list[Float[Tensor, "token d_model"]]:
    """The residual stream at each place, for every real token of every prompt."""
    batches: list[list[Tensor]] = []
    with preserved(model):
        for batch in prompts.on(model).batches(64):
            run = base_run(model, batch.tokens, batch.attention_mask, batch.positions)
            batches.append([value[batch.attention_mask].float().cpu() for value in run.residuals])
    return [torch.cat(values) for values in zip(*batches, strict=True)]
