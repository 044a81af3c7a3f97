"""Linear probes on the residual stream: states at a token, a logistic regression, and the control task."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mechunlearn.identity import name_of
from mechunlearn.model import Hook, Model, base_run, preserved
from mechunlearn.tasks.positions import Where, subject_last
from mechunlearn.tasks.prompts import Prompts


def states_at(
    model: Model, prompts: Prompts, at: Where, *, hooks: Sequence[Hook] = (), batch_size: int = 64
) -> Float[np.ndarray, "point prompt d_model"]:
    """The residual stream at one token of each prompt, in double precision; ValueError unless `at` gives one token."""
    residuals = residuals_at(model, prompts, lambda p: place_of(p, at)[:, None], hooks=hooks, batch_size=batch_size)
    return residuals[:, :, 0].double().numpy()


def residuals_at(
    model: Model,
    prompts: Prompts,
    places: Callable[[Prompts], Int[Tensor, "batch _"]],
    *,
    hooks: Sequence[Hook] = (),
    batch_size: int = 64,
) -> Float[Tensor, "point prompt place d_model"]:
    """The inputs of each layer and, last, of the final norm, at the places of each batch; on the CPU. Cost: 1F."""
    rows = []
    with preserved(model):
        for batch in prompts.on(model).batches(batch_size):
            chosen = places(batch)
            run = base_run(model, batch.tokens, batch.attention_mask, batch.positions, hooks=hooks)
            index = torch.arange(len(batch), device=chosen.device)[:, None]
            rows.append(torch.stack([residual[index, chosen].cpu() for residual in run.residuals]))
    return torch.cat(rows, 1)


def place_of(prompts: Prompts, at: Where) -> Int[Tensor, "batch"]:
    """The column of the one token that `at` gives; ValueError for another number of tokens."""
    where = at(prompts) & prompts.attention_mask
    wrong = (where.sum(1) != 1).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"expected one real token of each prompt to probe, got {int(where[wrong[0]].sum())} for prompt {wrong[0]} "
            f"from {name_of(at)}: use subject_last or answer."
        )
    return where.int().argmax(1)


def guesses(
    features: Float[np.ndarray, "prompt d_model"],
    labels: Shaped[np.ndarray, "prompt"],
    fit: Bool[np.ndarray, "prompt"],
    penalty: float,
) -> Shaped[np.ndarray, "prompt"]:
    """Labels that a probe fitted on the rows `fit` gives all rows.

    Features are standardised by the fitted rows; L-BFGS minimises multinomial cross-entropy plus penalty / 2 times the
    squared weights. If the fitted rows have one label only, all rows get it.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    if len(np.unique(labels[fit])) < 2:
        return np.full(len(labels), labels[fit][0])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=1000))
    with threadpool_limits(1):  # for products this small, threads wait for each other longer than they compute
        return probe.fit(features[fit], labels[fit]).predict(features)


def subject_tokens(prompts: Prompts, at: Where) -> Int[np.ndarray, "prompt"]:
    """The token that decides the control task's label: the subject's last, or without subjects the one at `at`."""
    places = place_of(prompts, at if prompts.subject is None else subject_last)
    return prompts.tokens.gather(1, places[:, None])[:, 0].cpu().numpy()


def labels_by_token(
    tokens: Int[np.ndarray, "prompt"], labels: Shaped[np.ndarray, "prompt"], rng: np.random.Generator
) -> Shaped[np.ndarray, "prompt"]:
    """A random label for each different token, with the labels' frequencies: learnable only by remembering tokens."""
    different, index = np.unique(tokens, return_inverse=True)
    return np.sort(labels)[rng.integers(len(labels), size=len(different))][index]
