"""Options that several functions share: the type, the default and the sentence of each are written once, here.

A function takes them by `**options: Unpack[...]` and `with_options`, which shows every one of them in its signature.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, ParamSpec, TypedDict, TypeVar, get_args

import torch

from mechunlearn.identity import described
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


Given = ParamSpec("Given")
Returned = TypeVar("Returned")


def with_options(**defaults: Any) -> Callable[[Callable[Given, Returned]], Callable[Given, Returned]]:
    """A decorator for functions that end in `**options: Unpack[...]`, of a table such as `TrainingOptions`.

    The function is called with every option of the table, given or by default; `defaults` are its own, where they
    differ from the table's. Its signature shows all options with their real defaults, and its docstring ends in a list
    of them. TypeError, before any work, for an option that does not exist; the message names the nearest one.
    """

    def decorate(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
        own = inspect.signature(function)
        table = _table(function)
        assert set(defaults) <= set(table), f"{function.__name__} departs from options that it does not have"
        shared = [_parameter(name, entry, defaults) for name, entry in table.items()]
        explicit = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        complete = own.replace(parameters=[*explicit, *shared])
        left_out = {parameter.name: parameter.default for parameter in shared}

        @wraps(function)
        def completed(*arguments: Given.args, **options: Given.kwargs) -> Returned:
            for name in options:
                if name not in complete.parameters:
                    raise TypeError(_unknown(name, function, complete))
            for name, default in left_out.items():
                options.setdefault(name, default)
            return function(*arguments, **options)

        vars(completed)["__signature__"] = complete
        lines = [_line(parameter, table[parameter.name]) for parameter in shared]
        completed.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", "", *lines])
        return completed

    return decorate


def default_options(**departures: Any) -> RunOptions:
    """The defaults of `RunOptions` but for these, for a function that offers only some of them."""
    return {**{name: entry.__metadata__[0] for name, entry in RunOptions.__annotations__.items()}, **departures}  # type: ignore[return-value]  # keys from the table


def _table(function: Callable[..., Any]) -> dict[str, Any]:
    """Name -> `Annotated[type, default, sentence]`: the TypedDict that the function unpacks."""
    (unpacked,) = (p for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD)
    (options,) = get_args(unpacked.annotation)
    return options.__annotations__


def _parameter(name: str, entry: Any, defaults: Mapping[str, Any]) -> inspect.Parameter:
    default = defaults.get(name, entry.__metadata__[0])
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=entry.__origin__)


def _line(parameter: inspect.Parameter, entry: Any) -> str:
    """An item of the list in the docstring; a function is shown by its name."""
    default = described(parameter.default) if callable(parameter.default) else repr(parameter.default)
    return fill(f"- `{parameter.name}` = {default}: {entry.__metadata__[1]}", 116, subsequent_indent="  ")


def _unknown(name: str, function: Callable[..., Any], signature: inspect.Signature) -> str:
    known = [parameter.name for parameter in signature.parameters.values() if parameter.kind is parameter.KEYWORD_ONLY]
    nearest = get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"its options are {', '.join(known)}."
    return f"{function.__name__} has no option {name}: {hint}"
