"""Which function, option or value is this? Names for readers, and digests that are the same in another process."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor


def name_of(function: Callable[..., object]) -> str:
    """The function's name, through `functools.partial`."""
    inner = getattr(function, "func", function)
    return getattr(inner, "__name__", type(inner).__name__)


def name_in_full(function: Callable[..., Any]) -> str:
    """Module and name, through `functools.partial`."""
    inner = function.func if isinstance(function, partial) else function
    return f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"


def described(function: Callable[..., object]) -> str:
    """The function's name with the plain options bound to it by `functools.partial`, for readers.

    It does not tell apart functions of one name, such as lambdas, nor tensors that are bound: `identified` does.
    """
    bound: dict[str, object] = getattr(function, "keywords", {})
    options = {key: _option(value) for key, value in bound.items()}
    shown = ", ".join(f"{key}={value}" for key, value in options.items() if value)
    return name_of(function).lstrip("_") + (f"({shown})" if shown else "")


def identified(value: Any) -> Any:
    """Numbers and strings as they are; for anything else, a description and a digest that tells two values apart."""
    if value is None or isinstance(value, int | float | str):
        return value
    return f"{_option(value) or type(value).__name__} {digest(value)}"


def digest(value: Any) -> str:
    """16 hex digits of a value, the same in another process.

    Of a function its code and the values bound to it count, not the code of functions that it calls; of a dataclass its
    fields, of a tensor its numbers; of other objects the type and, if it tells more than an address, the repr.
    """
    return hashlib.sha256(_text_of(value, ()).encode()).hexdigest()[:16]


def key_of(identity: Mapping[str, Any]) -> str:
    """32 hex digits of JSON values, whatever their order: the name under which a result is kept."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _option(value: object) -> str:
    """The value in a few words; an empty string where that is impossible."""
    if value is None or isinstance(value, int | float | str | bool):
        return str(value)
    if isinstance(value, tuple | list):
        return str(tuple(value)) if all(isinstance(member, int | float | str | bool) for member in value) else ""
    return described(value) if callable(value) and not isinstance(value, Tensor) else ""


def _text_of(value: Any, above: tuple[int, ...]) -> str:
    """`above`: the objects that this one is a part of; one that contains itself is not followed."""
    if value is None or isinstance(value, int | float | complex | str | bytes | Path | torch.dtype | torch.device):
        return f"{type(value).__name__} {value!r}"
    if id(value) in above:
        return "itself"
    inside = (*above, id(value))
    if isinstance(value, Tensor):
        return _numbers(value)
    if isinstance(value, torch.nn.Module):
        return _text_of(dict(value.named_parameters()), inside)
    parts = _parts(value)
    if parts is None:
        shown = repr(value)
        return type(value).__qualname__ if " at 0x" in shown else f"{type(value).__qualname__} {shown}"
    return f"{type(value).__qualname__}({'; '.join(_text_of(part, inside) for part in parts)})"


def _parts(value: Any) -> list[Any] | None:
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, AbstractSet):
        return sorted(digest(part) for part in value)
    if isinstance(value, tuple | list):
        return list(value)
    if isinstance(value, partial):
        return [value.func, value.args, dict(sorted(value.keywords.items()))]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        return _function(inspect.unwrap(value, stop=lambda f: "__signature__" in vars(f)))  # it holds defaults
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_varnames, value.co_consts]
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__qualname__, *(getattr(value, field.name) for field in fields(value))]
    return None


def _function(function: Callable[..., Any]) -> list[Any] | None:
    if not isinstance(function, FunctionType):
        return [name_in_full(function)]
    bound = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return [name_in_full(function), function.__code__, function.__defaults__, function.__kwdefaults__, bound]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # of a name that has no value yet
        return False


def _numbers(tensor: Tensor) -> str:
    own = tensor.detach().cpu().contiguous()
    numbers = hashlib.sha256(own.flatten().view(torch.uint8).numpy().data).hexdigest()
    return f"Tensor {own.dtype} {tuple(own.shape)} {numbers}"
