"""Files that verify themselves: dataclasses in JSON or safetensors with a checksum, written atomically. No pickle."""

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 2
"""The format of the files that are written. Files of mechunlearn 0.1.0 state none, and are refused."""

T = TypeVar("T")


class FormatError(ValueError):
    """A file that is whole, but of another format than this version of mechunlearn reads."""


def save(value: Any, path: str | Path, *, text: bool = False) -> None:
    """Write a dataclass, as safetensors if it holds tensors, else as JSON; with `text` as JSON in any case.

    Its fields may hold what `packed` takes, and they come back exactly.
    """
    tensors: dict[str, Tensor] = {}
    (content,) = packed(value, None if text else tensors).values()
    _write(path, type(value).__name__, content, tensors)


def load(cls: type[T], path: str | Path) -> T:
    """The value in a file of `save`; `ValueError` if it is damaged, of another class or of another format."""
    return cls(**read(path, cls.__name__, cls))


class Saved:
    """Gives a dataclass its file: `value.save(path)`, and `Class.load(path)`."""

    def save(self, path: str | Path) -> None:
        """Write everything but the model to one file with a checksum: safetensors, or JSON without tensors."""
        save(self, path)

    @classmethod
    def load(cls: type[T], path: str | Path) -> T:
        """What `save` wrote; ValueError for a file that is damaged, of another class or of mechunlearn 0.1.0."""
        return load(cls, path)


def write(path: str | Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a mapping as `save` writes a dataclass; `kind` says what it is."""
    tensors: dict[str, Tensor] = {}
    _write(path, kind, packed(content, tensors), tensors)


def read(path: str | Path, kind: str, *classes: type) -> dict[str, Any]:
    """The mapping in a file of `write`; `ValueError` if it is damaged, of another kind or of another format.

    `classes`: the dataclasses that occur in it, but for those that their fields name.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a file with a {kind}, found none at {path}.")
    with Path(path).open("rb") as file:
        is_text = file.read(1) == b"{"  # safetensors start with a length, which is a multiple of 8
    if is_text:
        return from_text(Path(path).read_bytes(), kind, *classes, path=path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise _unreadable(path, kind, str(error)) from error
    return unpacked(_checked(header, tensors, kind, path), *classes, tensors=tensors)


def to_text(kind: str, content: Mapping[str, Any]) -> str:
    """One line of JSON that holds what a file with this content would, tensors included."""
    return _record(kind, packed(content))


def from_text(line: bytes, kind: str, *classes: type, path: str | Path) -> dict[str, Any]:
    """The inverse of `to_text`; `ValueError` as for `read`. `path` is the file that the line is from."""
    try:
        record = json.loads(line)
        header = {name: json.dumps(part) if name == "content" else part for name, part in record.items()}
    except (ValueError, AttributeError) as error:
        raise _unreadable(path, kind, str(error)) from error
    return unpacked(_checked(header, {}, kind, path), *classes)


def packed(value: Any, tensors: dict[str, Tensor] | None = None) -> Any:
    """The value as JSON values; `unpacked` is the exact inverse.

    It may consist of None, numbers, strings, lists, tuples, frozensets, mappings, tensors, dataclasses of all these,
    and labels: dataclasses with a method `parse`, which is the inverse of `str`. A value that JSON cannot express is
    `{"$type": content}`. Tensors are put into `tensors`, under the names of their fields; without `tensors` they become
    bytes in place. TypeError for any other value, and for a dataclass that no type hint of the dataclass around it
    names, because a reader could not know it.
    """
    return _packed(value, "", tensors, None)


def _packed(value: Any, name: str, tensors: dict[str, Tensor] | None, known: Mapping[str, type] | None) -> Any:
    """`name`: where the value is. `known`: the dataclasses that may occur here; None for all."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return _packed(value.item(), name, tensors, known)
    if isinstance(value, Tensor):
        if tensors is not None:
            return {"$tensor": _put(value, name, tensors)}
        own = value.detach().cpu().contiguous()
        return {"$tensor": {"dtype": str(own.dtype), "shape": list(own.shape), "bytes": _raw(own)}}
    cls = type(value)
    if is_dataclass(cls) and (known is None or known.get(cls.__name__) is cls):
        if _is_label(cls):
            return {f"${cls.__name__}": str(value)}
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        inside = _reachable(cls) if known is None else known
        return {f"${cls.__name__}": {key: _packed(p, f"{name}.{key}", tensors, inside) for key, p in parts.items()}}
    if isinstance(value, Mapping) and not is_dataclass(cls):
        content = [(_packed(k, name, None, known), _packed(v, f"{name}.{k}", tensors, known)) for k, v in value.items()]
        is_plain = all(isinstance(key, str) for key in value) and [key[:1] for key in value] != ["$"]
        return dict(content) if is_plain else {"$mapping": [list(pair) for pair in content]}
    if isinstance(value, list | tuple | frozenset):
        return _sequence(value, name, tensors, known)
    raise TypeError(
        f"expected numbers, strings, tensors, and lists, tuples and mappings of them, got {cls.__name__} at "
        f"{name.lstrip('.') or 'the top'}: it cannot be written to a file; give its name instead."
    )


def _sequence(value: Any, name: str, tensors: dict[str, Tensor] | None, known: Mapping[str, type] | None) -> Any:
    """Labels of one class are written as strings; members of a set in sorted order."""
    classes = {type(member) for member in value}
    label = next((cls for cls in classes if _is_label(cls)), None) if len(classes) == 1 else None
    ordered = value if not isinstance(value, frozenset) else sorted(value, key=repr if label is None else None)
    members = [_packed(member, f"{name}.{place}", tensors, known) for place, member in enumerate(ordered)]
    if isinstance(value, list):
        return members
    what = "$tuple" if isinstance(value, tuple) else "$frozenset"
    return {what: members} if label is None else {f"{what} of {label.__name__}": [str(member) for member in ordered]}


def unpacked(content: Any, *classes: type, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """The inverse of `packed`. `classes`: the dataclasses that occur, but for those that their fields name."""
    return _unpacked(content, _reachable(*classes), tensors or {})


def _unpacked(content: Any, classes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(content, list):
        return [_unpacked(member, classes, tensors) for member in content]
    if not isinstance(content, dict):
        return content
    tag, inner = next(iter(content.items()), ("", {}))
    if len(content) > 1 or not tag.startswith("$"):
        return {key: _unpacked(member, classes, tensors) for key, member in content.items()}
    what, _, label = tag[1:].partition(" of ")
    if what == "tensor":
        return tensors[inner] if isinstance(inner, str) else _tensor(inner)
    if what == "mapping":
        return {_unpacked(key, classes, tensors): _unpacked(member, classes, tensors) for key, member in inner}
    if what in ("tuple", "frozenset"):
        members = map(classes[label].parse, inner) if label else _unpacked(inner, classes, tensors)
        return tuple(members) if what == "tuple" else frozenset(members)
    cls = classes[what]
    return cls.parse(inner) if isinstance(inner, str) else cls(**_unpacked(inner, classes, tensors))


@cache
def _reachable(*classes: type) -> dict[str, type]:
    """Name -> class, of these dataclasses and of those in their fields."""
    return {cls.__name__: cls for cls in _named(classes, set())}


def _named(hints: Any, seen: set[type]) -> Iterator[type]:
    """The dataclasses that type hints name, and those that their fields' hints name."""
    for hint in hints:
        if isinstance(hint, type) and is_dataclass(hint) and hint not in seen:
            seen.add(hint)
            yield hint
            if not _is_label(hint):
                yield from _named(get_type_hints(hint).values(), seen)
        yield from _named(get_args(hint), seen)


def _is_label(cls: type) -> bool:
    return is_dataclass(cls) and callable(getattr(cls, "parse", None))


def _put(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> str:
    name = name.lstrip(".")
    while name in tensors:  # keys with dots in them
        name += "'"
    tensors[name] = tensor
    return name


def _tensor(content: Mapping[str, Any]) -> Tensor:
    """The tensor of these bytes, which come in base64 from JSON."""
    raw, dtype = content["bytes"], getattr(torch, content["dtype"].removeprefix("torch."))
    raw = bytearray(base64.b64decode(raw) if isinstance(raw, str) else raw)
    if not raw:
        return torch.zeros(content["shape"], dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).reshape(content["shape"])


def _raw(tensor: Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


def _write(path: str | Path, kind: str, content: Any, tensors: Mapping[str, Tensor]) -> None:
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    if tensors:
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        seen: set[int] = set()
        for name, tensor in stored.items():  # safetensors refuses tensors that share memory
            memory = tensor.untyped_storage().data_ptr()
            stored[name] = tensor.clone() if memory in seen else tensor
            seen.add(memory)
        save_file(stored, temporary, metadata=_header(kind, json.dumps(content), stored))
    else:
        temporary.write_text(_record(kind, content, indent=1) + "\n")
    os.replace(temporary, path)


def _record(kind: str, content: Any, indent: int | None = None) -> str:
    body = json.dumps(content, default=lambda raw: base64.b64encode(raw).decode())
    return json.dumps({**_header(kind, body, {}), "content": json.loads(body)}, indent=indent)


def _header(kind: str, body: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    header = {"format": str(FORMAT), "kind": kind, "sha256": "", "content": body}
    return {**header, "sha256": _digest(header, tensors)}


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{header['format']} {header['kind']} {header['content']}".encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(_raw(tensors[name]))
    return digest.hexdigest()


_HEADERS_OF_0_1_0 = ({"kind", "content", "sha256"}, {"key", "identity", "cell", "sha256"})


def _checked(header: Mapping[str, str], tensors: Mapping[str, Tensor], kind: str, path: str | Path) -> Any:
    """The content of a file that is whole and of this kind and format."""
    if set(header) in _HEADERS_OF_0_1_0:
        raise FormatError(
            f"expected a file of format {FORMAT} with a {kind}, got one of mechunlearn 0.1.0 at {path}: make it again, "
            f"or load it with mechunlearn 0.1.0."
        )
    missing = [name for name in ("format", "kind", "sha256", "content") if name not in header]
    if missing:
        raise _unreadable(path, kind, f"it has no {missing[0]}")
    if header["kind"] != kind:
        other = header["kind"]
        raise ValueError(f"expected a file with a {kind}, got one with a {other} ({path}): load it with that class.")
    if _digest(header, tensors) != header["sha256"]:
        raise _unreadable(path, kind, "its checksum does not match")
    if header["format"] != str(FORMAT):
        raise FormatError(
            f"expected a file of format {FORMAT} with a {kind}, got one of format {header['format']} at {path}: load "
            f"it with the version of mechunlearn that wrote it."
        )
    return json.loads(header["content"])


def _unreadable(path: str | Path, kind: str, reason: str) -> ValueError:
    return ValueError(
        f"expected an intact file with a {kind}, got a corrupted or truncated one at {path} ({reason}): "
        f"restore it from a copy or make it again; nothing was loaded."
    )
