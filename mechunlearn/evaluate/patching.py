"""Patching audit: which layers of the tested model carry the knowledge, once patched into the original model?"""

import operator
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.arguments import check_batch_size, check_functions
from mechunlearn.curve import Curve
from mechunlearn.evaluate.asking import Original, per_token, required
from mechunlearn.evaluate.results import Result
from mechunlearn.evaluate.scoring import side_of
from mechunlearn.identity import name_of
from mechunlearn.model import Model, Run, base_run, continued, device_of, preserved, shape
from mechunlearn.probing import residuals_at
from mechunlearn.tasks.positions import Where, answers
from mechunlearn.tasks.prompts import Prompts, joined
from mechunlearn.tasks.task import Task

States = Float[Tensor, "point prompt place d_model"]


def patching_audit(
    model: Model,
    task: Task,
    *,
    original: Original | None = None,
    never_knew: Model | None = None,
    where: Where = answers,
    threshold: float = 0.05,
    format: str | None = None,
    batch_size: int = 64,
) -> Result:
    r"""Share of the knowledge that the tested model's layers still carry when patched into the original: 1 - UDS.

    At each point l of the residual stream, a run of the original model gets the states of another model at the tokens
    that predict the answer. With s the log-probability of the answer per token,

        gap(l)  = s(original) - s(patched from a model that never knew)
        loss(l) = s(original) - s(patched from the tested model)
        UDS     = sum over l of clip(loss(l), 0, gap(l)) / sum over l of gap(l),   over the l with gap(l) > threshold

    1: every layer serves the original as well as its own, whatever the output says. 0, the floor: as badly as those of
    a model that never knew. Facts without a gap are left out. `curve`: gap(l) - clip(loss(l), 0, gap(l)), in nats.

    - `never_knew`: a model with the shape **and the basis** of the original, such as one fine-tuned from the same
      checkpoint without these facts. Default, which is not the paper's: the original's mean state over both sides.
    - `where`: the patched tokens. `answers` (the paper's) predict the answer, but later layers may read the subject
      again; `mu.localize.from_subject` patches all from the subject's last token on.

    Cost: 1 forward of the tested model, 2 of the original, and twice the part of a forward above each layer. Lee et al.
    2026, https://arxiv.org/abs/2605.24614 (points 1 to n_layers there). ValueError where no layer has a gap.
    """
    check_batch_size(batch_size)
    original = required(original, patching_audit)
    check_functions(where=where)
    tested = side_of(task, format=format)
    carried = _states(model, tested, where, batch_size)
    with original() as knowing:
        ignorant = _ignorant_states(knowing, never_knew, task, tested, where, batch_size)
        gap, loss = _losses(knowing, tested, where, (ignorant, carried), batch_size)
    return _knowledge_left(gap, loss, threshold, tested.names)


def _states(model: Model, prompts: Prompts, where: Where, batch_size: int) -> States:
    """The residual stream at the tokens meant, from the first on; prompts with fewer of them are filled up."""
    width = int((where(prompts) & prompts.attention_mask).sum(1).max())
    if width == 0:
        raise ValueError(f"expected tokens to patch in every prompt, got none from {name_of(where)}.")
    return residuals_at(model, prompts, lambda batch: _places(batch, where, width)[0], batch_size=batch_size)


def _places(
    prompts: Prompts, where: Where, width: int
) -> tuple[Int[Tensor, "batch place"], Bool[Tensor, "batch place"]]:
    """The columns of the tokens meant, filled up by repeating the last one, and which of them are not filling."""
    chosen = where(prompts) & prompts.attention_mask
    order, count = torch.arange(chosen.shape[1], device=chosen.device), chosen.sum(1, keepdim=True)
    last = torch.where(chosen, order, 0).amax(1, keepdim=True)
    places = torch.where(chosen, order, last).sort(1).values
    places = torch.cat([places, last.expand(-1, width)], 1)[:, :width]
    return places, torch.arange(width, device=chosen.device) < count


def _ignorant_states(
    knowing: Model, never_knew: Model | None, task: Task, tested: Prompts, where: Where, batch_size: int
) -> States:
    """The states of a model that never knew, or the original's mean state at each of the tokens meant."""
    if never_knew is None:
        both = joined(tested, next(f.retain for f in task.formats.values() if f.forget is tested))
        states = _states(knowing, both, where, batch_size)
        real = _places(both, where, states.shape[2])[1].cpu()[None, ..., None]
        means = (states * real).sum(1) / real.sum(1)
        return means[:, None].expand(-1, len(tested), -1, -1)
    if (shape(never_knew), never_knew.cfg.d_vocab) != (shape(knowing), knowing.cfg.d_vocab):
        raise ValueError(
            f"expected never_knew of the shape of the original, {shape(knowing)}, got {shape(never_knew)}: its states "
            f"are patched into the original; leave it out to use the original's mean state."
        )
    return _states(never_knew, tested, where, batch_size)


@torch.no_grad()
def _losses(
    knowing: Model, prompts: Prompts, where: Where, sources: tuple[States, ...], batch_size: int
) -> Float[Tensor, "source prompt point"]:
    """How much less likely the answer becomes, in nats per token, with the states of each source at each point."""
    losses, prompts = [], prompts.to(device_of(knowing))
    with preserved(knowing):
        for rows in torch.arange(len(prompts)).split(operator.index(batch_size)):
            batch = prompts.rows(rows)
            run = base_run(knowing, batch.tokens, batch.attention_mask, batch.positions)
            own = per_token(run.logits, batch)
            patched = partial(_patched, knowing, run, batch, where)
            values = [[patched(at, point[rows]) for at, point in enumerate(states)] for states in sources]
            losses.append(own[:, None] - torch.stack([torch.stack(points, 1) for points in values]))
    return torch.cat(losses, 1).cpu().double()


def _patched(
    model: Model, run: Run, prompts: Prompts, where: Where, point: int, states: Float[Tensor, "batch place d_model"]
) -> Float[Tensor, "batch"]:
    """The answer's log-probability per token with the states at one point replaced at the tokens meant."""
    places, real = _places(prompts, where, states.shape[1])
    residual, row = run.residuals[point].clone(), real.nonzero()[:, 0]
    residual[row, places[real]] = states.to(residual)[real]
    every = torch.arange(len(residual), device=residual.device)
    return per_token(continued(model, run, every, point, residual=residual), prompts)


def _knowledge_left(
    gap: Float[Tensor, "prompt point"], loss: Float[Tensor, "prompt point"], threshold: float, names: tuple[str, ...]
) -> Result:
    """1 - UDS of the facts that have a gap anywhere."""
    gap = gap.where(gap > threshold, 0.0)
    left = gap - loss.clamp(min=0).minimum(gap)
    kept = gap.sum(1) > 0
    if not bool(kept.any()):
        raise ValueError(
            f"expected an original that knows some of the facts better than a model that never knew, by {threshold} "
            f"nats per token at some layer, got none: test facts that it knew, or lower the threshold."
        )
    chosen = tuple(name for name, keep in zip(names, kept.tolist(), strict=True) if keep) if names else ()
    points = tuple(str(layer) for layer in range(gap.shape[1]))
    curve = Curve(points, left[kept], "knowledge left, nats per token")
    share = left[kept].sum(1) / gap[kept].sum(1)
    return Result(share, "share of the layers' knowledge left at the answer (1 - UDS)", 0.0, "share", chosen, curve)
