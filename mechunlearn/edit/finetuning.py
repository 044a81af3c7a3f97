"""Localized fine-tuning, free or within a bound, and the run that all editors share that train on a task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.edit.inject.facts import asked_and_answered, injected
from mechunlearn.identity import described, digest, identified
from mechunlearn.losses import Loss, cross_entropy, log_one_minus_probability, needs
from mechunlearn.model import Model, differentiable, fingerprint
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task, text_of
from mechunlearn.tasks.text import as_prompts, rows_of
from mechunlearn.training import Checkpoints, Master, Moving, Term, fit
from mechunlearn.training.movers import collect_gradient
from mechunlearn.training.options import Row, RunOptions, TrainingOptions
from mechunlearn.weights import Edit, Entries, exclusively, read, select, write


@with_options()
def finetune(model: Model, task: Task, mask: ComponentMask, **options: Unpack[TrainingOptions]) -> Edit:
    """Train the weights of `mask` and nothing else; the model is left as it was, the change is returned.

        loss =   forget_coefficient * forget_loss(task.forget)
               + retain_coefficient * retain_loss(task.retain)
               + text_coefficient   * text_loss(task.text)

    Each term is a mean over answer tokens (or prompts: `mu.losses`), in nats. Erasure by log(1 - p) is the default.
    Options of a loss are bound with `partial`, e.g. the cut-off of erasure:
    `forget_loss=partial(log_one_minus_probability, cutoff=-10)`. What the unedited model says, for a loss that compares
    with it, is computed on the same weights: there is no second model.

    The defaults follow Guo et al. 2025 (https://arxiv.org/abs/2410.12949), but the learning rate suits the shipped
    model; theirs for 7B-9B models are 2e-6 to 1e-4. A learning rate that fits one localization need not fit another:
    give each the same search (`search`) before comparing them.

    Cost per step: one forward and one backward of each batch from the lowest localized layer up, weight
    gradients for the localized matrices alone.
    ValueError for a mask that is empty or of another model, processed or quantised weights, text that ends early, a
    damaged checkpoint or one of another run; FloatingPointError when a loss is not finite or diverges.
    """
    return task_run(model, task, mask, options, about={"editor": "finetune"}).edit


adam = partial(torch.optim.Adam, weight_decay=0.0)
"""Adam, as in the paper of FT-L."""


@with_options(steps=25, learning_rate=5e-4, clip=None, optimizer=adam)
def ft_l(model: Model, task: Task, mask: ComponentMask, *, bound: float = 5e-4, **options: Unpack[RunOptions]) -> Edit:
    """Train the weights of `mask` on `task.injection`; no weight may move further than `bound`.

        loss = -log p(injected answer),    |weight - original| <= bound for each weight, after each step

    Nothing is rehearsed: the bound alone limits what else changes. It is a baseline for `rome` and `memit`, and works
    on any mask: heads, matrices, MLPs, neurons. Weights below float32 are rounded after bounding.

    FT-L (FT with an L-infinity norm constraint) in Meng et al. 2022, https://arxiv.org/abs/2202.05262, after
    Zhu et al. 2020, https://arxiv.org/abs/2012.00363. Defaults are those for GPT-2 XL, where one W_out was trained. A
    small model needs a larger bound. Cost per step: as for `finetune`, with one term in place of three. ValueError for
    a bound that is not above 0, an injected answer that is the true one, and as for `finetune`.
    """
    if bound <= 0:
        raise ValueError(f"bound must be above 0, got {bound}.")
    facts = injected(task)
    return training_run(
        model,
        task,
        mask,
        [Term("inject", facts, cross_entropy, 1.0, options["batch_size"])],
        options,
        about={"editor": "ft_l", "facts": len(facts), "bound": bound},
        moving=lambda entries, original: [_Bounded.of(entries, original, bound)],
    ).edit


@dataclass(frozen=True, eq=False)
class _Bounded:
    """The optimizer moves the distance of each weight from its original value, in float32 or above."""

    entries: Entries
    original: Tensor
    tensor: Tensor
    bound: float

    @classmethod
    def of(cls, entries: Entries, original: Tensor, bound: float) -> "_Bounded":
        entries.slot.parameter.requires_grad_(True)
        moved = torch.zeros_like(original, dtype=torch.promote_types(original.dtype, torch.float32))
        return cls(entries, original, moved, bound)

    def collect(self) -> None:
        collect_gradient(self)

    def publish(self) -> None:
        self.tensor.clamp_(-self.bound, self.bound)
        self.entries.write(self.original.to(self.tensor.dtype) + self.tensor)
        self.tensor.grad = None


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """Trained entries of a mask, with what is needed to make a value of them."""

    mask: ComponentMask
    values: dict[str, Tensor]
    """Matrix label -> the trained weights, or the trained numbers of a weight mask."""
    original: dict[str, Tensor]
    """Matrix label -> the weights before."""
    fingerprint: str
    """That of the model before the training."""
    provenance: Mapping[str, Any]
    history: tuple[Row, ...]

    @property
    def edit(self) -> Edit:
        """The trained weights."""
        return Edit(self.mask, self.values, self.fingerprint, self.provenance, self.history)


M = TypeVar("M", bound=Moving)


def training_run(
    model: Model,
    task: Task,
    mask: ComponentMask,
    terms: Sequence[Term],
    options: RunOptions,
    *,
    about: Mapping[str, Any],
    entries: list[Entries] | None = None,
    moving: Callable[[Entries, Tensor], Sequence[M]] = lambda entries, original: [Master.of(entries)],
    result: Callable[[M], Tensor] = lambda mover: mover.entries.read(mover.entries.slot.parameter.detach()),
    penalty: Callable[[M], float] | None = None,
) -> TrainingRun:
    """`fit` on the entries (default: all) of a mask; the model is left as it was.

    Editors differ in `moving`, which makes the tensors that the optimizer moves (default: the weights themselves) from
    entries and their original values. `result` reads the trained tensor of a mover (default: the weights as the model
    has them); `penalty` adds a gradient to it and gives the penalty's value. `about` begins the provenance.
    A checkpoint belongs to this run if provenance, data, mask and model are the same.
    """
    entries = select(model, mask) if entries is None else entries
    weights, original = fingerprint(model), read(select(model, mask))  # in this order: a fingerprint takes memory
    provenance = _provenance(about, task, terms, options)
    own = ("batch_size", "checkpoint", "every")
    of_fit: dict[str, Any] = {name: options[name] for name in RunOptions.__annotations__ if name not in own}
    # By name in the provenance, for readers. Two functions of one name are told apart by their digests.
    functions = {term.name: term.loss for term in terms} | {"optimizer": options["optimizer"]}
    functions |= {"schedule": options["schedule"], "penalty": penalty}
    checkpoints = _checkpoints(weights, mask, terms, options, provenance, functions)
    try:
        with exclusively(model), differentiable(model):
            movers = {e.label: moving(e, original[e.label]) for e in entries}
            all_movers = [mover for of_matrix in movers.values() for mover in of_matrix]
            history = fit(
                model,
                entries,
                terms,
                moving=all_movers,
                penalty=None if penalty is None else lambda: sum(penalty(mover) for mover in all_movers),
                original=original,
                checkpoints=checkpoints,
                **of_fit,
            )
            values = {}
            for label, of_matrix in movers.items():
                # Where units are not neighbours, a matrix has a mover for each run of them, in their order.
                parts = [result(mover) for mover in of_matrix]
                values[label] = parts[0] if len(parts) == 1 else torch.cat(parts)
    finally:
        write(entries, original)
    return TrainingRun(mask, values, original, weights, provenance, tuple(history))


def task_run(
    model: Model, task: Task, mask: ComponentMask, options: TrainingOptions, *, about: Mapping[str, Any], **how: Any
) -> TrainingRun:
    """`training_run` on forget (or inject), retain and text; ValueError for an injection that is lacking, or true."""
    inject, size, text = options["inject"], options["batch_size"], options["text"]
    forget_loss = options["forget_loss"] or (cross_entropy if inject else log_one_minus_probability)
    first = injected(task) if inject else task.forget
    preferred = None if inject else _preferred(task, forget_loss)
    length = None if text is None else options["text_length"]
    if text is not None:
        rows = rows_of(model, text, length=options["text_length"])
    elif task.text is None and not options["text_coefficient"]:
        rows = None
    else:
        rows = as_prompts(text_of(task))
    terms = [
        Term("inject" if inject else "forget", first, forget_loss, options["forget_coefficient"], size, preferred),
        Term("retain", task.retain, options["retain_loss"], options["retain_coefficient"], size),
        Term("text", rows, options["text_loss"], options["text_coefficient"], options["text_batch_size"]),
    ]
    return training_run(model, task, mask, terms, options, about={**about, "text_length": length}, **how)


def _provenance(about: Mapping[str, Any], task: Task, terms: Sequence[Term], options: RunOptions) -> dict[str, Any]:
    """What decides the result, in values that a file can hold; `about` comes first."""
    settings = {term.name: [term.coefficient, described(term.loss), term.batch_size] for term in terms}
    for term in terms:
        settings[term.name] += [] if term.prompts is None or isinstance(term.prompts, Prompts) else ["stream"]
    return {
        **about,
        "task": task.name,
        "special_tokens": task.special_tokens,
        "terms": settings,
        "optimizer": described(options["optimizer"]),
        "compute_dtype": None if options["compute_dtype"] is None else str(options["compute_dtype"]),
        "steps": options["steps"],
        "learning_rate": options["learning_rate"],
        "schedule": described(options["schedule"]),
        "micro_batch_size": options["micro_batch_size"],
        "clip": options["clip"],
        "seed": options["seed"],
        "versions": {name: version(name) for name in ("mechunlearn", "torch", "transformer_lens")},
    }


def _checkpoints(
    weights: str,
    mask: ComponentMask,
    terms: Sequence[Term],
    options: RunOptions,
    provenance: Mapping[str, Any],
    functions: Mapping[str, object],
) -> Checkpoints | None:
    """The file that the run continues from, if there is one; `weights` is the model's fingerprint."""
    if options["checkpoint"] is None:
        return None
    # A stream of text is not read for the digest: that would use it up.
    prompts = [(t.name, t.prompts if isinstance(t.prompts, Prompts) else None, t.alternative) for t in terms]
    data = digest(([str(component) for component in mask], prompts))
    identity = {"model": weights, "mask_and_prompts": data, **provenance}
    identity |= {f"function of {name}": identified(function) for name, function in functions.items()}
    return Checkpoints(options["checkpoint"], options["every"], identity)


def _preferred(task: Task, loss: Loss) -> Prompts | None:
    """The answers that a loss such as `dpo` prefers; ValueError unless they are others, to the same prompts."""
    if task.injection is None or not any("alternative" in name for name in needs(loss)):
        return None
    preferred = injected(task)
    pairs = zip(task.forget.batches(1), preferred.batches(1), strict=False)
    other = [row for row, pair in enumerate(pairs) if len({asked_and_answered(fact)[0] for fact in pair}) > 1]
    if other:
        raise ValueError(
            f"expected task.injection to answer the prompts of task.forget, row by row, got another prompt at row "
            f"{other[0]}: make it with tasks.answered(model, task.forget, answers)."
        )
    return preferred
