"""Task arithmetic: learn what is to be forgotten still better, and go the other way."""

from collections.abc import Callable
from functools import partial

from mechunlearn.components import ComponentMask
from mechunlearn.edit.arithmetic import scaled
from mechunlearn.edit.editor import repeatable
from mechunlearn.edit.finetune import finetune
from mechunlearn.losses import cross_entropy
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit

learned_further = partial(finetune, forget_loss=cross_entropy, retain_coefficient=0.0, text_coefficient=0.0)
"""`finetune` on the forget set alone, with cross-entropy to its true answers."""


@repeatable
def task_vector(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    strength: float = 1.0,
    learn: Callable[[Model, Task, ComponentMask], Edit] = learned_further,
) -> Edit:
    """original - strength * (learned - original): weights of `mask` negated in what learning the forget set changes.

    `learn` makes the edit that is negated. Its options are bound with `partial`, for example
    `learn=partial(learned_further, steps=100, learning_rate=1e-4)`, or its learning editor is another one (`lora`).
    `scaled` negates an edit that you have already, for instance with several strengths.

    Nothing in it keeps what should be retained: choose `strength` by what it costs there. Ilharco et al. 2023,
    https://arxiv.org/abs/2212.04089. Cost and errors: those of `learn`.
    """
    return scaled(model, learn(model, task, mask), -strength)
