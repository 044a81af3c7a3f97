"""A table of options that several functions share: type, default and sentence of each are written once.

A table is a `TypedDict` whose entries are `Annotated[type, default, sentence]`. A function takes its options by
`**options: Unpack[...]` and `with_options`, which shows every one of them in its signature.
"""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import wraps
from textwrap import fill
from typing import Any, ParamSpec, TypeVar, get_args

from mechunlearn.identity import described

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
