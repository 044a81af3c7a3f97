"""Localized fine-tuning, and what all editors that train on a task share: the terms, the run, how it was made."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.edit.inject.facts import asked_and_answered, each, injected
from mechunlearn.identity import described, digest
from mechunlearn.losses import Loss, cross_entropy, log_one_minus_probability, needs
from mechunlearn.model import Model, differentiable, fingerprint
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task
from mechunlearn.tasks.text import as_prompts, rows_of
from mechunlearn.training import Checkpoints, MakesOptimizer, Master, Moving, Term, adamw, fit
from mechunlearn.weights import Edit, Entries, exclusively, read, select, write


def finetune(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    inject: bool = False,
    forget_loss: Loss | None = None,
    retain_loss: Loss = cross_entropy,
    text_loss: Loss = cross_entropy,
    forget_coefficient: float = 1.0,
    retain_coefficient: float = 1.0,
    text_coefficient: float = 1.0,
    steps: int = 50,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    text: Iterable[str | Sequence[int]] | None = None,
    text_length: int = 64,
    text_batch_size: int = 8,
    micro_batch_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
    clip: float | None = 1.0,
    optimizer: MakesOptimizer = adamw,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[Mapping[str, int | float]], None] | None = None,
    until: Callable[[Mapping[str, int | float]], bool] | None = None,
    checkpoint: str | Path | None = None,
    every: int = 10,
) -> Edit:
    """Train the weights of `mask` and nothing else; the model is left as it was, the change is returned.

        loss =   forget_coefficient * forget_loss(task.forget)
               + retain_coefficient * retain_loss(task.retain)
               + text_coefficient   * text_loss(task.text)

    each term a mean over answer tokens (or prompts: `mu.losses`), in nats. Erasure by log(1 - p) is the default. With
    `inject` the first term is instead the cross-entropy to the answers of `task.injection` (or a `forget_loss` that you
    give: then one that learns).
    Options of a loss are bound with `partial`, e.g. the cut-off of erasure:
    `forget_loss=partial(log_one_minus_probability, cutoff=-10)`. A loss that compares with the unedited model is given
    what that model says, computed on the same weights: there is no second model.

    `text`: strings or tokens that take the place of `task.text`, read as they are needed and packed to rows of
    `text_length` tokens, each used once; for example a `datasets` stream of the Pile.
    `optimizer`: a torch optimizer class, `mu.edit.adamw_8bit`, or any function of parameters and `lr`.
    `micro_batch_size`: how many prompts go through at once; the gradients of a batch are accumulated.
    `compute_dtype`: `torch.bfloat16` for a float32 model; weights below float32 have float32 masters in any case.
    `on_step` is called with each row of the history (`wandb.log` will do); `until`, called with it too, may end the
    training by returning True.
    `checkpoint`: a file to continue from, written every `every` steps. A run that was killed and is called
    again with the same arguments gives the same edit, bit for bit; a stream of text must then begin anew, too.

    The defaults follow Guo et al. 2025 (https://arxiv.org/abs/2410.12949): 50 steps, 64 examples a term,
    AdamW without weight decay, cosine schedule, clipping at 1; but the learning rate suits the shipped
    model. Theirs for 7B-9B models are 2e-6 to 1e-4. Learning rates that fit one localization need not
    fit another: give each the same search before comparing them.

    Cost per step: one forward and one backward of each batch from the lowest localized layer up, weight
    gradients for the localized matrices alone. The same seed gives the same edit, bit for bit, on CPU.
    ValueError for a mask that is empty or of another model, processed or quantised weights, text that ends early, a
    damaged checkpoint or one of another run; FloatingPointError when a loss is not finite or diverges.
    """
    terms = task_terms(
        model,
        task,
        inject=inject,
        losses=(forget_loss, retain_loss, text_loss),
        coefficients=(forget_coefficient, retain_coefficient, text_coefficient),
        batch_sizes=(batch_size, text_batch_size),
        text=text,
        text_length=text_length,
    )
    found = trained(
        model,
        task,
        mask,
        terms,
        about={"editor": "finetune", "text_length": None if text is None else text_length},
        optimizer=optimizer,
        compute_dtype=compute_dtype,
        checkpoint=checkpoint,
        every=every,
        progress=progress,
        on_step=on_step,
        until=until,
        steps=steps,
        learning_rate=learning_rate,
        micro_batch_size=micro_batch_size,
        clip=clip,
        seed=seed,
    )
    return Edit(mask, found.values, found.fingerprint, found.provenance, found.history)


M = TypeVar("M", bound=Moving)


@dataclass(frozen=True, eq=False)
class Trained:
    """What a run gave."""

    values: dict[str, Tensor]
    original: dict[str, Tensor]
    fingerprint: str
    provenance: Mapping[str, Any]
    history: tuple[Mapping[str, int | float], ...]


def masters(entries: Entries, original: Tensor) -> list[Master]:
    """The weights themselves."""
    return [Master.of(entries)]


def weights(movers: Sequence[Moving]) -> Tensor:
    """The trained weights, as the model has them."""
    entries = movers[0].entries
    return entries.read(entries.slot.parameter.detach())


def trained(
    model: Model,
    task: Task,
    mask: ComponentMask,
    terms: Sequence[Term],
    *,
    about: Mapping[str, Any],
    entries: list[Entries] | None = None,
    moving: Callable[[Entries, Tensor], Sequence[M]] = masters,
    taken: Callable[[Sequence[M]], Tensor] = weights,
    penalty: Callable[[M], float] | None = None,
    optimizer: MakesOptimizer,
    compute_dtype: torch.dtype | None,
    checkpoint: str | Path | None,
    every: int,
    progress: bool,
    on_step: Callable[[Mapping[str, int | float]], None] | None,
    until: Callable[[Mapping[str, int | float]], bool] | None,
    **settings: Any,
) -> Trained:
    """`fit` on the entries (default: all) of a mask; the model is left as it was.

    `moving` makes what the optimizer moves from entries and their original values, `taken` reads the result off it.
    `about` begins the provenance; a checkpoint is of this run if all of the provenance, the data, the mask and the
    model are. `settings` are the plain options of `fit`.
    """
    entries = select(model, mask) if entries is None else entries
    found, original = fingerprint(model), read(select(model, mask))  # in this order: a fingerprint takes memory
    provenance = {
        **about,
        "task": task.name,
        "terms": _shown(terms),
        "optimizer": described(optimizer),
        "compute_dtype": None if compute_dtype is None else str(compute_dtype),
        **settings,
        "versions": {name: version(name) for name in ("mechunlearn", "torch", "transformer_lens")},
    }
    identity = {"model": found, "mask_and_prompts": digest(_data(mask, terms)), **provenance}
    try:
        with exclusively(model), differentiable(model):
            made = {e.label: moving(e, original[e.label]) for e in entries}
            movers = [mover for some in made.values() for mover in some]
            history = fit(
                model,
                entries,
                terms,
                moving=movers,
                penalty=None if penalty is None else lambda: sum(penalty(mover) for mover in movers),
                original=original,
                optimizer=optimizer,
                compute_dtype=compute_dtype,
                progress=progress,
                on_step=on_step,
                until=until,
                checkpoints=None if checkpoint is None else Checkpoints(checkpoint, every, identity),
                **settings,
            )
            values = {label: taken(some) for label, some in made.items()}
    finally:
        write(entries, original)
    return Trained(values, original, found, provenance, tuple(history))


def task_terms(
    model: Model,
    task: Task,
    *,
    inject: bool,
    losses: tuple[Loss | None, Loss, Loss],
    coefficients: tuple[float, float, float],
    batch_sizes: tuple[int, int],
    text: Iterable[str | Sequence[int]] | None,
    text_length: int,
) -> list[Term]:
    """The terms, in the order forget, retain, text; no forget loss: erasure, or cross-entropy to what is injected.

    Batch sizes are of prompts and of rows of text; `text`, packed to rows of `text_length`, takes the place of the
    task's. ValueError for an injection that the task does not have, or one of the true answer.
    """
    forget_loss = losses[0] or (cross_entropy if inject else log_one_minus_probability)
    if inject:
        forget = Term("inject", injected(task), forget_loss, coefficients[0], batch_sizes[0])
    else:
        forget = Term(
            "forget", task.forget, forget_loss, coefficients[0], batch_sizes[0], _preferred(task, forget_loss)
        )
    rows = as_prompts(task.text) if text is None else rows_of(model, text, length=text_length)
    return [
        forget,
        Term("retain", task.retain, losses[1], coefficients[1], batch_sizes[0]),
        Term("text", rows, losses[2], coefficients[2], batch_sizes[1]),
    ]


def _shown(terms: Sequence[Term]) -> dict[str, list[float | str | int]]:
    """For the provenance of an edit: name -> coefficient, loss, batch size; and "stream" where text is one."""
    return {
        term.name: [
            term.coefficient,
            described(term.loss),
            term.batch_size,
            *([] if isinstance(term.prompts, Prompts) else ["stream"]),
        ]
        for term in terms
    }


def _data(mask: ComponentMask, terms: Sequence[Term]) -> Any:
    """What is trained on what; a stream of text is not read for it."""
    prompts = [(t.name, t.prompts if isinstance(t.prompts, Prompts) else None, t.alternative) for t in terms]
    return [str(component) for component in mask], prompts


def _preferred(task: Task, loss: Loss) -> Prompts | None:
    """The answers that a loss such as `dpo` prefers; ValueError unless they are others, to the same prompts."""
    if task.injection is None or not any("alternative" in name for name in needs(loss)):
        return None
    preferred = injected(task)
    pairs = zip(each(task.forget), each(preferred), strict=False)
    other = [row for row, pair in enumerate(pairs) if len({asked_and_answered(fact)[0] for fact in pair}) > 1]
    if other:
        raise ValueError(
            f"expected task.injection to answer the prompts of task.forget, row by row, got another prompt at row "
            f"{other[0]}: make it with tasks.answered(model, task.forget, answers)."
        )
    return preferred
