"""Can the answer be read off hidden layers by the model's own unembedding, with a few guesses?"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.arguments import check_batch_size, check_functions
from mechunlearn.curve import Curve
from mechunlearn.evaluate.attacks.exam import formatted
from mechunlearn.evaluate.results import Result
from mechunlearn.model import Model, device_of, preserved, shape
from mechunlearn.model.running import unembedded
from mechunlearn.probing import residuals_at
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task

Rankings: TypeAlias = Callable[[Float[Tensor, "batch point d_vocab"]], Float[Tensor, "batch ranking d_vocab"]]
"""From what each layer would say (log-probabilities) to scores of tokens; of several rankings the last goes first."""


def by_probability(found: Float[Tensor, "batch point d_vocab"]) -> Float[Tensor, "batch point d_vocab"]:
    """The likeliest tokens of each layer."""
    return found


def by_both_ends(found: Float[Tensor, "batch point d_vocab"]) -> Float[Tensor, "batch _ d_vocab"]:
    """The likeliest and the unlikeliest of each layer: an edit that only pushes an answer down leaves it at the end."""
    return torch.stack([-found, found], 2).flatten(1, 2)


def by_change(found: Float[Tensor, "batch point d_vocab"]) -> Float[Tensor, "batch _ d_vocab"]:
    """The tokens whose probability rises or falls most from each layer to the next one read."""
    if found.shape[1] < 2:
        raise ValueError("expected at least two layers for by_change, got one: pass more in layers=....")
    rise = found.exp().diff(dim=1)
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
    each of `layers` (default: all, 0 to n_layers, whose last is the model's own output). `rankings` makes lists of
    tokens of that: `by_probability` (default), `by_both_ends`, `by_change`, or your own. Candidates are the first of
    each list, from the last list to the first, then the second of each, and so on, without repetition, until there
    are `budget` of them. An attack succeeds if the first token of the answer is one; `curve`: with each budget 1, 2,
    4, ... up to `budget`.

    `control`: the same for the wrong candidate answers of the prompts, the mean over them. A lens that proposes every
    sport in the first few tokens shows that the model knows it is asked for a sport: then the control is as high, and
    a smaller budget must tell. Chance: `budget` / vocabulary, of as many different tokens drawn at random. What a
    lens does not find may still be known: early layers need not write in the basis of the unembedding, and an edit
    of the unembedding blinds every layer (probes read these).

    Cost: 1 forward and one unembedding per prompt and layer. Patil et al. 2023, https://arxiv.org/abs/2309.17410:
    the head projection attack (`by_probability`, `by_both_ends`) and the probability delta attack (`by_change`),
    there with k tokens of each of a few layers chosen per model, and budget k x layers. ValueError for a format or
    layers that do not exist and a budget outside 1..vocabulary.
    """
    tested = formatted(task, format)
    chosen = _checked(model, budget, rankings, layers, batch_size)
    ranks = _ranks(model, tested, budget, rankings, chosen, batch_size)
    budgets = [*(2**power for power in range(operator.index(budget).bit_length()) if 2**power < budget), budget]
    hits = (ranks[..., None] < torch.tensor(budgets)).double()
    sense, chance = f"answer among {budget} tokens of the logit lens", budget / model.cfg.d_vocab
    right = _result(hits[:, 0], budgets, sense, chance, tested.names)
    if tested.candidates is None:
        return right
    return replace(
        right, control=_result(hits[:, 1:].mean(1), budgets, f"{sense}, wrong candidates", chance, tested.names)
    )


def _result(
    hits: Float[Tensor, "prompt budget"], budgets: list[int], sense: str, chance: float, names: tuple[str, ...]
) -> Result:
    curve = Curve(tuple(map(str, budgets)), hits, "share extracted", axis="candidates")
    return Result(hits[:, -1], sense, chance, "share", names, curve)


def _checked(model: Model, budget: int, rankings: Rankings, layers: Iterable[int] | None, batch_size: int) -> list[int]:
    """The points that are read, in order."""
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
    return chosen


def _ranks(
    model: Model, prompts: Prompts, budget: int, rankings: Rankings, layers: list[int], batch_size: int
) -> Int[Tensor, "prompt wanted"]:
    """How many candidates come before the answer and, where there are some, before the others of its candidates."""
    states = residuals_at(model, prompts, lambda batch: batch.positions[:, :1], batch_size=batch_size)[layers, :, 0]
    wanted = prompts.answers[:, :1] if prompts.candidates is None else prompts.candidates
    found = []
    with preserved(model), torch.no_grad():
        for rows in torch.arange(len(prompts)).split(operator.index(batch_size)):
            read = [unembedded(model, points.to(device_of(model))) for points in states[:, rows]]
            scores = rankings(torch.stack([logits.float().log_softmax(-1) for logits in read], 1))
            found.append(_places(_interleaved(scores, budget), wanted[rows].to(scores.device)).cpu())
    return torch.cat(found)


def _interleaved(scores: Float[Tensor, "batch ranking d_vocab"], budget: int) -> Int[Tensor, "batch token"]:
    """The first of each ranking, from the last ranking to the first; then the second of each, ..."""
    return scores.flip(1).topk(budget, dim=-1).indices.transpose(1, 2).flatten(1)


def _places(tokens: Int[Tensor, "batch token"], wanted: Int[Tensor, "batch wanted"]) -> Int[Tensor, "batch wanted"]:
    """How many different tokens come before each that is wanted; more than any budget where it does not come."""
    ordered, index = tokens.sort(dim=1, stable=True)
    repeated = torch.zeros_like(tokens, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    first = torch.zeros_like(repeated).scatter(1, index, ~repeated)
    before = first.long().cumsum(1) - 1
    equal = tokens[:, None] == wanted[..., None]
    place = before.gather(1, equal.int().argmax(2))
    return place.masked_fill(~equal.any(2), tokens.shape[1])
