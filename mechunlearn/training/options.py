"""The options of editors and of attacks that train, in tables for `with_options`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch

from mechunlearn.losses import Loss, cross_entropy
from mechunlearn.training.optimizers import MakesOptimizer, Schedule, adamw, cosine_schedule

Row = Mapping[str, int | float]
"""One step in the history of a training run."""


class TermOptions(TypedDict, total=False):
    """What an editor trains on. Of each option: type, default, sentence."""

    inject: Annotated[
        bool, False, "The first term is the cross-entropy to the answers of `task.injection`; nothing is erased."
    ]
    forget_loss: Annotated[
        Loss | None,
        None,
        "The loss on the facts to forget. None is erasure by log(1 - p). With `inject` it must be one that learns; "
        "None is cross-entropy.",
    ]
    retain_loss: Annotated[Loss, cross_entropy, "The loss on the facts to retain."]
    text_loss: Annotated[Loss, cross_entropy, "The loss on text."]
    forget_coefficient: Annotated[float, 1.0, "The forget term (or the injection) is multiplied by it."]
    retain_coefficient: Annotated[float, 1.0, "The retain term is multiplied by it."]
    text_coefficient: Annotated[float, 1.0, "The text term is multiplied by it."]
    text: Annotated[
        Iterable[str | Sequence[int]] | None,
        None,
        "Strings or tokens that take the place of `task.text`; they are read as they are needed and each is used once, "
        "so that a `datasets` stream of the Pile will do.",
    ]
    text_length: Annotated[int, 64, "`text` is packed to rows of this many tokens."]
    text_batch_size: Annotated[int, 8, "A batch of the text term has this many rows."]


class RunOptions(TypedDict, total=False):
    """How an editor trains, whatever its terms are. Of each option: type, default, sentence."""

    steps: Annotated[int, 50, "The optimizer takes this many steps."]
    learning_rate: Annotated[float, 1e-3, "The learning rate, which `schedule` changes."]
    schedule: Annotated[
        Schedule,
        cosine_schedule,
        "In each step the learning rate is multiplied by schedule(step, steps): `mu.edit.constant_schedule`, "
        "`mu.edit.warmup_schedule`, or a function of yours. The history shows the product.",
    ]
    batch_size: Annotated[int, 64, "A batch of each term but text has this many prompts."]
    micro_batch_size: Annotated[
        int | None,
        None,
        "This many prompts go through the model at once (None: the whole batch); their gradients are accumulated.",
    ]
    compute_dtype: Annotated[
        torch.dtype | None,
        None,
        "`torch.bfloat16` computes a float32 model's matrix products in bfloat16. Weights below float32 have float32 "
        "masters in any case.",
    ]
    clip: Annotated[float | None, 1.0, "Gradients are clipped at this norm; None leaves them as they are."]
    optimizer: Annotated[
        MakesOptimizer,
        adamw,
        "A torch optimizer class, `mu.edit.adamw_8bit`, or any function of parameters and `lr`.",
    ]
    seed: Annotated[
        int, 0, "It decides the order of the batches. The same seed gives the same edit, bit for bit, on CPU."
    ]
    progress: Annotated[bool, True, "Whether a progress bar is shown."]
    on_step: Annotated[
        Callable[[Row], None] | None, None, "It is called with each row of the history (`wandb.log` will do)."
    ]
    until: Annotated[
        Callable[[Row], bool] | None, None, "It is called with each row, too; the training ends where it returns True."
    ]
    checkpoint: Annotated[
        str | Path | None,
        None,
        "A file to continue from. A run that was killed and is called again with the same arguments gives the same "
        "edit, bit for bit; a stream of text must then begin anew, too.",
    ]
    every: Annotated[int, 10, "The checkpoint is written each time after this many steps."]


class TrainingOptions(TermOptions, RunOptions, total=False):
    """The options of every editor that trains on a task."""


def default_options(**departures: Any) -> RunOptions:
    """The defaults of `RunOptions` but for these, for a function that offers only some of them."""
    return {**{name: entry.__metadata__[0] for name, entry in RunOptions.__annotations__.items()}, **departures}  # type: ignore[return-value]  # keys from the table
