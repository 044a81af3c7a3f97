"""Localized fine-tuning: forget, retain and keep the language, by moving only the localized weights."""

from collections.abc import Callable, Mapping
from importlib.metadata import version

from mechunlearn.components import ComponentMask
from mechunlearn.edit.terms import described, task_terms
from mechunlearn.losses import Loss, cross_entropy
from mechunlearn.metrics import name_of
from mechunlearn.model import Model, differentiable, fingerprint
from mechunlearn.tasks.task import Task
from mechunlearn.training import MakesOptimizer, adamw, fit
from mechunlearn.weights import Edit, exclusively, read, select, write


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
    text_batch_size: int = 8,
    micro_batch_size: int | None = None,
    clip: float | None = 1.0,
    optimizer: MakesOptimizer = adamw,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[Mapping[str, int | float]], None] | None = None,
) -> Edit:
    """Train the weights of `mask` and nothing else; the model is left as it was, the change is returned.

        loss =   forget_coefficient * forget_loss(task.forget)
               + retain_coefficient * retain_loss(task.retain)
               + text_coefficient   * text_loss(task.text)

    each term a mean over answer tokens, in nats. Erasure by log(1 - p) is the default. With `inject` the
    first term is instead the cross-entropy to the answers of `task.injection`.
    Options of a loss are bound with `partial`, e.g. the cut-off of erasure:
    `forget_loss=partial(log_one_minus_probability, cutoff=-10)`.

    The defaults follow Guo et al. 2025 (https://arxiv.org/abs/2410.12949): 50 steps, 64 examples a term,
    AdamW without weight decay, cosine schedule, clipping at 1; but the learning rate suits the shipped
    model. Theirs for 7B-9B models are 2e-6 to 1e-4. Learning rates that fit one localization need not
    fit another: give each the same search before comparing them.

    Cost per step: one forward and one backward of each batch from the lowest localized layer up, weight
    gradients for the localized matrices alone. The same seed gives the same edit, bit for bit, on CPU.
    ValueError for a mask that is empty or of another model, processed or quantised weights;
    FloatingPointError when a loss is not finite.
    """
    entries, original = select(model, mask), fingerprint(model)
    terms = task_terms(
        task,
        inject=inject,
        losses=(forget_loss, retain_loss, text_loss),
        coefficients=(forget_coefficient, retain_coefficient, text_coefficient),
        batch_sizes=(batch_size, text_batch_size),
    )
    settings = {
        "steps": steps,
        "learning_rate": learning_rate,
        "micro_batch_size": micro_batch_size,
        "clip": clip,
        "seed": seed,
    }
    provenance = {
        "editor": "finetune",
        "task": task.name,
        "terms": described(terms),
        "optimizer": name_of(optimizer),
        **settings,
        "versions": {name: version(name) for name in ("mechunlearn", "torch", "transformer_lens")},
    }
    before = read(entries)
    try:
        with exclusively(model), differentiable(model):
            history = fit(model, entries, terms, optimizer=optimizer, progress=progress, on_step=on_step, **settings)
        values = read(entries)
    finally:
        write(entries, before)
    return Edit(mask, values, original, provenance, tuple(history))
