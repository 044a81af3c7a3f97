"""The training loop that editors (and relearning attacks) share: only the given entries move."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mechunlearn.model import Model
from mechunlearn.model.guard import undisturbed
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.training.checkpoints import Checkpoints
from mechunlearn.training.movers import Master, Moving, collecting
from mechunlearn.training.optimizers import MakesOptimizer, Schedule, Steering, adamw, cosine_schedule
from mechunlearn.training.options import Row
from mechunlearn.training.terms import Source, Term
from mechunlearn.training.trained_layers import Part
from mechunlearn.weights import Entries, Values, read

PATIENCE = 10
"""The number of steps for which a loss may be as high as that of a model that has diverged: some recover."""


def fit(
    model: Model,
    entries: Sequence[Entries],
    terms: Sequence[Term],
    *,
    moving: Sequence[Moving] | None = None,
    penalty: Callable[[], float] | None = None,
    original: Values | None = None,
    steps: int,
    learning_rate: float,
    schedule: Schedule = cosine_schedule,
    optimizer: MakesOptimizer = adamw,
    clip: float | None = 1.0,
    micro_batch_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[Row], None] | None = None,
    until: Callable[[Row], bool] | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[Row]:
    """Train the entries in place by the sum of the terms, inside `differentiable(model)`; one row of history per step.

    - `moving`: the tensors that the optimizer moves, in place of the weights themselves.
    - `penalty`: it is called after the terms, adds its gradient to theirs and gives its value.
    - `original`: the values of the entries, where they are known, which spares a copy.
    - `micro_batch_size` changes memory and speed, not the result: a batch is normalised by its own number of tokens
      (prompts, for a loss of prompts).
    - `seed` and the term's name fix the order of the prompts, each of which is used once per epoch.

    The other options are those of `RunOptions`. Frozen weights have no gradient or optimizer state. There is no graph
    below the lowest trained layer: its input is computed once per prompt, and so is what a loss asks of the unedited
    model. Logits are computed only at the answer tokens, and of a large vocabulary only some at a time. Weights below
    float32 have float32 masters.

    Raises FloatingPointError, naming the step, as soon as a loss or a gradient is not finite, or a term in nats has
    been more than log(d_vocab) / 2, half the loss of knowing nothing, above its first value for ten steps.
    """
    _check_positive(steps=steps, micro_batch_size=micro_batch_size)
    for prompts in (p for term in terms if term.coefficient for p in (term.prompts, term.alternative)):
        if isinstance(prompts, Prompts):
            prompts.check_length(model)
    part = Part(model, entries, read(list(entries)) if original is None else original, compute_dtype)
    movers: list[Moving] = [Master.of(e) for e in entries] if moving is None else list(moving)
    parameters = [mover.tensor for mover in movers]
    steering = Steering(optimizer, movers, learning_rate)
    sources = [Source(part, term, seed, micro_batch_size, steps) for term in terms if term.coefficient]
    history: list[Row] = [] if checkpoints is None else checkpoints.resume(movers, steering, partial(_skipped, sources))
    ends = [until is not None and until(row) for row in history]
    if any(ends[:-1]):
        raise ValueError(
            f"expected a checkpoint of at most {ends.index(True) + 1} steps, after which `until` ends the training, "
            f"got one of {len(ends)}: delete it or give another path."
        )
    ended = any(ends)
    for step in tqdm(range(len(history), steps), desc="training", disable=not progress, leave=False):
        if ended:
            break
        rate = learning_rate * schedule(step, steps)
        steering.set_rate(rate)
        with collecting(movers):
            row: dict[str, int | float] = {source.term.name: source.backward(step) for source in sources}
        if penalty is not None:
            row["penalty"] = penalty()
        row["gradient_norm"] = _clipped(parameters, clip, step)
        steering.step()
        torch.clear_autocast_cache()  # it may hold what the weights were, where `compute_dtype` is bfloat16
        history.append({"step": step, **row, "learning_rate": rate})
        _check_growth(history, sources, math.log(model.cfg.d_vocab) / 2)
        with undisturbed(model):
            if on_step is not None:
                on_step(history[-1])
            ended = until is not None and until(history[-1])
        if checkpoints is not None:
            checkpoints.save(movers, steering, history, _skipped(sources, 0))
    return history


def _skipped(sources: Sequence[Source], steps: int) -> dict[str, str]:
    """Pass over the batches of that many steps; by term, a digest of the text that has been read from its stream."""
    for source in sources:
        source.skip(steps)
    return {source.term.name: source.read for source in sources if source.read}


def _check_positive(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}.")


def _clipped(parameters: list[Tensor], clip: float | None, step: int) -> float:
    norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip))
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"expected a finite gradient, got norm {norm} at step {step}: stopped; lower the "
            f"learning rate, or compute in bfloat16 or float32 if this is float16."
        )
    return norm


def _check_growth(history: list[Row], sources: list[Source], limit: float) -> None:
    for name in [source.term.name for source in sources if "final" in source.wanted]:  # the others are not in nats
        first, lately = history[0][name], [row[name] for row in history[-PATIENCE:]]
        if len(lately) == PATIENCE and min(lately) - first > limit:
            raise FloatingPointError(
                f"expected the {name} loss not to diverge, got {lately[-1]:.3g} at step {history[-1]['step']}, after "
                f"{first:.3g} at the first: stopped; lower the learning rate."
            )
