"""Logit lens: can the model's own unembedding read the answer off hidden layers, in a few guesses?"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.arguments import check_batch_size, check_functions
from mechunlearn.curve import Curve
from mechunlearn.evaluate.results import Result
from mechunlearn.evaluate.scoring import side_of
from mechunlearn.model import Model, device_of, preserved, shape
from mechunlearn.model.running import unembedded
from mechunlearn.probing import residuals_at
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task

Rankings: TypeAlias = Callable[[Float[Tensor, "batch point d_vocab"]], Float[Tensor, "batch ranking d_vocab"]]
"""A function from each layer's log-probabilities to rankings of tokens by score; the last ranking goes first."""


def by_probability(log_probabilities: Float[Tensor, "batch point d_vocab"]) -> Float[Tensor, "batch point d_vocab"]:
    """Ranks the likeliest tokens of each layer first."""
    return log_probabilities


def by_both_ends(log_probabilities: Float[Tensor, "batch point d_vocab"]) -> Float[Tensor, "batch _ d_vocab"]:
    """Ranks the likeliest and the unlikeliest tokens of each layer: an edit may push an answer down to the end."""
    return torch.stack([-log_probabilities, log_probabilities], 2).flatten(1, 2)


def by_change(log_probabilities: Float[Tensor, "batch point d_vocab"]) -> Float[Tensor, "batch _ d_vocab"]:
    """Ranks the tokens whose probability rises or falls most from each layer to the next."""
    if log_probabilities.shape[1] < 2:
        raise ValueError("expected at least two layers for by_change, got one: pass more in layers=....")
    rise = log_probabilities.exp().diff(dim=1)
    return torch.stack([-rise, rise], 2).flatten(1, 2)


def lens_extraction(
    model: Model,
    task: Task,
    *,
    budget: int = 4,
    rankings: Rankings = by_probability,
    layers: Iterable[int] | None = None,
    format: str | None = None,
    batch_size: int = 64,
) -> Result:
    """Share of forgotten facts whose answer is among `budget` tokens that the logit lens proposes.

    The final norm and the unembedding are applied, at the last token of the prompt, to the residual stream that enters
    each of `layers` (default: all, 0 to n_layers; the last is the model's own output). `rankings` turns that into lists
    of tokens: `by_probability`, `by_both_ends`, `by_change`, or your own function. The proposals are the first token of
    each list, from the last list to the first, then the second of each, and so on, until there are `budget` different
    ones. The attack succeeds if the first token of the answer is among them. `curve`: with budgets 1, 2, 4, ... up to
    `budget`.

    `control`: the same for the wrong candidate answers, averaged. Where it is as high, the lens shows only that the
    model is asked for a sport; try a smaller budget. Chance is `budget` / vocabulary. What a lens does not find may
    still be known: early layers need not write in the basis of the unembedding, and an edit of the unembedding blinds
    all layers. Probes read these.

    Cost: 1 forward, and one unembedding per prompt and layer. Patil et al. 2023, https://arxiv.org/abs/2309.17410: the
    head projection attack (`by_probability`, `by_both_ends`) and the probability delta attack (`by_change`), there with
    k tokens of each of a few chosen layers.
    """
    tested = side_of(task, format=format)
    check_batch_size(batch_size)
    check_functions(rankings=rankings)
    count, last = model.cfg.d_vocab, shape(model).n_layers
    if not 1 <= budget <= count:
        raise ValueError(f"budget must lie in 1..{count} (tokens of the vocabulary), got {budget}.")
    chosen = list(range(last + 1)) if layers is None else sorted(set(layers))
    wrong = [layer for layer in chosen if not 0 <= layer <= last]
    if wrong or not chosen:
        raise ValueError(
            f"expected layers in 0..{last} (what enters them; {last} is the final residual stream), got "
            f"{wrong or 'none'}."
        )
    ranks = _ranks(model, tested, budget, rankings, chosen, batch_size)
    budgets = [*(2**power for power in range(operator.index(budget).bit_length()) if 2**power < budget), budget]
    hits = (ranks[..., None] < torch.tensor(budgets)).double()
    sense, chance = f"answer among {budget} tokens of the logit lens", budget / count
    shares = [hits[:, 0], *([] if tested.candidates is None else [hits[:, 1:].mean(1)])]
    curve_of = partial(Curve, tuple(map(str, budgets)), unit="share extracted", axis="candidates", limits=(0.0, 1.0))
    curves = [curve_of(share) for share in shares]
    right, *control = (
        Result(curve.per_prompt[:, -1], meaning, chance, "share", tested.names, curve)
        for curve, meaning in zip(curves, (sense, f"{sense}, wrong candidates"), strict=False)
    )
    return replace(right, control=control[0] if control else None)


def _ranks(
    model: Model, prompts: Prompts, budget: int, rankings: Rankings, layers: list[int], batch_size: int
) -> Int[Tensor, "prompt wanted"]:
    """How many proposals come before the answer, in column 0, and before each wrong candidate."""
    states = residuals_at(model, prompts, lambda batch: batch.positions[:, :1], batch_size=batch_size)[layers, :, 0]
    wanted = prompts.answers[:, :1] if prompts.candidates is None else prompts.candidates
    ranks = []
    with preserved(model), torch.no_grad():
        for rows in torch.arange(len(prompts)).split(operator.index(batch_size)):
            read = [unembedded(model, points.to(device_of(model))) for points in states[:, rows]]
            scores = rankings(torch.stack([logits.float().log_softmax(-1) for logits in read], 1))
            ranks.append(_places_of(_proposals(scores, budget), wanted[rows].to(scores.device)).cpu())
    return torch.cat(ranks)


def _proposals(scores: Float[Tensor, "batch ranking d_vocab"], budget: int) -> Int[Tensor, "batch token"]:
    """The first token of each ranking, from the last ranking to the first; then the second of each, and so on."""
    return scores.flip(1).topk(budget, dim=-1).indices.transpose(1, 2).flatten(1)


def _places_of(tokens: Int[Tensor, "batch token"], wanted: Int[Tensor, "batch wanted"]) -> Int[Tensor, "batch wanted"]:
    """How many different tokens come before each wanted one; more than any budget if it is not proposed."""
    # A stable sort puts equal tokens side by side in their order: the first of each proposes it, the others repeat it.
    ordered, index = tokens.sort(dim=1, stable=True)
    repeated = torch.zeros_like(tokens, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    first = torch.zeros_like(repeated).scatter(1, index, ~repeated)
    before = first.long().cumsum(1) - 1
    equal = tokens[:, None] == wanted[..., None]
    place = before.gather(1, equal.int().argmax(2))
    return place.masked_fill(~equal.any(2), tokens.shape[1])
