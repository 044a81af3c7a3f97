"""The inputs of a loss, which it asks for by the names of its parameters.

For the answer tokens of a batch, one answer after the other:

    logits            [token, d_vocab]   at the positions that predict the answers
    targets           [token]            the answers' tokens
    residual          [token, d_model]   residual stream after the highest localized layer, at the same positions

For each prompt's whole answer:

    log_probability              [row]   sum over its tokens of log p, in nats
    alternative_log_probability  [row]   the same of the answer preferred instead: the injected one, or "I don't know"
    length                       [row]   its number of tokens; in a loss per token one for each: that of its own answer

Those that begin with `original_` (`original_logits`, ...) are of the unedited model, without gradient. A loss takes
some of these, each without a default. Every other parameter has a default, or is bound with `functools.partial`.
"""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import TypeAlias

from torch import Tensor

from mechunlearn.identity import name_of

Loss: TypeAlias = Callable[..., Tensor]
"""Any function whose parameters without default are names of this module: one value per token, or one per row."""

PER_TOKEN = ("logits", "targets", "original_logits", "residual", "original_residual")
_OF_ANSWERS = ("log_probability", "alternative_log_probability")
PER_ROW = (*_OF_ANSWERS, *(f"original_{name}" for name in _OF_ANSWERS))
EITHER = ("length",)
TRAINED = ("logits", "log_probability", "alternative_log_probability", "residual")
"""The inputs that depend on the weights that are trained."""


def needs(loss: Loss) -> tuple[str, ...]:
    """The names of the inputs that `loss` needs, in the order of its signature; pass them by keyword.

    Parameters with a default, or bound with `functools.partial`, are not among them. `loss` may be a function, a
    lambda, a partial or an object with `__call__`. ValueError for what is no loss, as this module describes it.
    """
    required = [p for p in _parameters(loss) if p.default is p.empty]
    required = [p for p in required if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = tuple(parameter.name for parameter in required)
    known = PER_TOKEN + PER_ROW + EITHER
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"expected the parameters of {name_of(loss)} to be among {_listed(known)}, got {_listed(unknown)}: rename "
            f"them, give options a default, or bind them with functools.partial."
        )
    if any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in required):
        raise ValueError(
            f"expected {name_of(loss)} to take {_listed(names)} by keyword, got parameters that are positional only: "
            f"remove the '/' of its signature."
        )
    if not set(names) & set(TRAINED):
        raise ValueError(
            f"expected {name_of(loss)} to take at least one of {_listed(TRAINED)}, got {_listed(names)}: without one "
            f"it has no gradient. *args, **kwargs and parameters with a default are given nothing; if it is an "
            f"nn.Module, wrap it: lambda logits, targets: loss(logits, targets)."
        )
    _check_unit(loss, names)
    return names


def is_per_row(loss: Loss) -> bool:
    """Whether `loss` gives one value per whole answer rather than one per token. ValueError as in `needs`."""
    return bool(set(needs(loss)) & set(PER_ROW))


def _parameters(loss: Loss) -> list[Parameter]:
    try:
        return list(signature(loss).parameters.values())
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected a loss, a function whose parameters can be read, got {loss!r} ({error}): pass one such as "
            f"losses.npo, mind the names of options, or wrap it: lambda logits, targets: ..."
        ) from error


def _check_unit(loss: Loss, names: tuple[str, ...]) -> None:
    tokens, rows = ([name for name in names if name in group] for group in (PER_TOKEN, PER_ROW))
    if tokens and rows:
        raise ValueError(
            f"expected {name_of(loss)} to be of tokens or of whole answers, got {_listed(tokens)} (one per token) "
            f"with {_listed(rows)} (one per row): make it two losses, each a term of its own."
        )


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names) or "none of them"
