"""Localized fine-tuning: forget, retain and keep the language, by moving only the localized weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from mechunlearn.components import ComponentMask
from mechunlearn.edit.editor import repeatable
from mechunlearn.edit.terms import task_terms
from mechunlearn.edit.trained import trained
from mechunlearn.losses import Loss, cross_entropy
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.training import MakesOptimizer, adamw
from mechunlearn.weights import Edit


@repeatable
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
