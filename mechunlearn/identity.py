"""Which function, option or value is this? Names for readers, and digests that are the same in another process."""

import copyreg
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
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
    """16 hex digits of a value, the same in another process; ValueError where nothing tells it from others of its type.

    Of a function count its code, the values bound to it and the global numbers and strings that it names, not the code
    of functions that it calls; of a class its name, and its methods if it cannot be imported; of a dataclass its
    fields, of a tensor its numbers; of a module of torch parameters, buffers and plain attributes; of any other object
    what a copy of it would be made from. An iterator, a lock and a bare `object()` have nothing of the kind.
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
    name = type(value).__qualname__
    return f"{name}({'; '.join(_text_of(part, inside) for part in _parts(value))})"


def _parts(value: Any) -> list[Any]:
    """What tells a value from others of its type."""
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
        if value.__globals__.get("__name__", "").startswith("jaxtyping."):
            # The wrapper checks shapes and has a memory for it. `with_options` puts defaults into a signature.
            return [vars(value)["__wrapped__"], vars(value).get("__signature__")]
        bound = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [name_in_full(value), value.__code__, value.__defaults__, value.__kwdefaults__, bound, _globals(value)]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_varnames, value.co_consts]
    if isinstance(value, ModuleType):
        return [value.__name__]
    if isinstance(value, BuiltinFunctionType):  # of a module, of a class, or of an object
        return [value.__qualname__, value.__self__]
    if isinstance(value, type):
        return _class(value)
    if isinstance(value, torch.nn.Module):
        return _module(value)
    if is_dataclass(value):
        return [type(value), *(getattr(value, field.name) for field in fields(value))]
    wrapped = getattr(value, "__wrapped__", None)  # by functools.cache
    if wrapped is not None:
        return [wrapped]
    return _reduced(value)


def _globals(function: FunctionType) -> dict[str, Any]:
    """The global numbers and strings that a function names, such as a setting in a cell of a notebook."""
    named, known = sorted(_names(function.__code__)), function.__globals__
    return {n: known[n] for n in named if n[:2] != "__" and isinstance(known.get(n), int | float | str)}


def _names(code: CodeType) -> set[str]:
    return {*code.co_names}.union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _class(cls: type) -> list[Any]:
    name = f"{cls.__module__}.{cls.__qualname__}"
    is_local = "<locals>" in name or cls.__module__ in ("__main__", "__mp_main__")
    own = (int, float, str, FunctionType, classmethod, staticmethod, property)
    # Names with underscores that hold no function (__module__, __firstlineno__) say where it was written.
    members = {n: v for n, v in vars(cls).items() if isinstance(v, own) and (callable(v) or n[:2] != "__")}
    kept = {n: [v.fget, v.fset] if isinstance(v, property) else v for n, v in members.items()}
    return [cls.__qualname__ if is_local else name, *((kept, cls.__bases__) if is_local else ())]


def _module(module: torch.nn.Module) -> list[Any]:
    plain = (int, float, str, torch.dtype)
    settings = {
        f"{at}.{name}": value
        for at, inner in module.named_modules()
        for name, value in vars(inner).items()
        if name[0] != "_" and isinstance(value, plain)
    }
    kinds = [type(inner) for inner in module.modules()]
    return [kinds, settings, dict(module.named_parameters()), dict(module.named_buffers())]


def _reduced(value: Any) -> list[Any]:
    """What the module `copy` would make the object again from."""
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        made = value.__reduce_ex__(4) if reduce is None else reduce(value)
    except Exception as error:
        raise _unidentified(value) from error
    if isinstance(made, str):  # the name of something global
        return [getattr(value, "__module__", ""), made]
    state, items = made[2:3], made[3:5]
    if type(value) is object or isinstance(value, Iterator):  # it is itself and no other; it changes as it is used
        raise _unidentified(value)
    return [*made[:2], *state, *(list(part) for part in items if part is not None)]


def _unidentified(value: object) -> ValueError:
    return ValueError(
        f"expected values that a file can be recognised by, got a {type(value).__qualname__}, which nothing tells from "
        f"another one: bind numbers, strings, tensors or functions instead, or leave out the file."
    )


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # of a name that has no value yet
        return False


def _numbers(tensor: Tensor) -> str:
    own = tensor.detach().cpu().contiguous()
    numbers = hashlib.sha256(own.flatten().view(torch.uint8).numpy().data).hexdigest()
    return f"Tensor {own.dtype} {tuple(own.shape)} {numbers}"
