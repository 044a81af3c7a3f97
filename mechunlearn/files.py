"""Files that verify themselves: JSON and safetensors with a checksum, written atomically. No pickle."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_json(path: str | Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON with its kind and SHA-256."""
    body = json.dumps(json.loads(json.dumps(content)), sort_keys=True)  # as it will be read: keys are strings
    text = json.dumps({"kind": kind, "sha256": _digest(body.encode()), "content": content}, indent=1, sort_keys=True)
    _replace(Path(path), lambda temporary: temporary.write_text(text + "\n"))


def read_json(path: str | Path, kind: str) -> dict[str, Any]:
    """What `write_json` wrote; `ValueError` if the file is of another kind, cut short or altered."""
    try:
        record = json.loads(Path(path).read_text())
        found, content, digest = record["kind"], record["content"], record["sha256"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise _unreadable(path, kind, str(error)) from error
    if found != kind:
        raise ValueError(f"expected a file with a {kind}, got one with a {found} ({path}): load it with that class.")
    if _digest(json.dumps(content, sort_keys=True).encode()) != digest:
        raise _unreadable(path, kind, "its checksum does not match")
    return content


def write_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, with `content` and the SHA-256 of everything in the header."""
    stored = _without_sharing({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    body = json.dumps(content, sort_keys=True)
    header = {"kind": kind, "content": body, "sha256": _tensor_digest(stored, body)}
    _replace(Path(path), lambda temporary: save_file(stored, temporary, metadata=header))


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote; `ValueError` if the file is of another kind, cut short or altered."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a file with a {kind}, found none at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise _unreadable(path, kind, str(error)) from error
    if header.get("kind") != kind:
        raise ValueError(f"expected a file with a {kind}, got one with {header.get('kind')} ({path}).")
    if _tensor_digest(tensors, header.get("content", "")) != header.get("sha256"):
        raise _unreadable(path, kind, "its checksum does not match")
    return tensors, json.loads(header["content"])


def _without_sharing(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those that use the memory of an earlier one, which safetensors would refuse."""
    seen: set[int] = set()
    alone = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        alone[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return alone


def _tensor_digest(tensors: Mapping[str, Tensor], body: str) -> str:
    digest = hashlib.sha256(body.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _unreadable(path: str | Path, kind: str, reason: str) -> ValueError:
    return ValueError(
        f"expected an intact file with a {kind}, got a corrupted or truncated one at {path} ({reason}): "
        f"restore it from a copy or make it again; nothing was loaded."
    )


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".partial")
    write(temporary)
    os.replace(temporary, path)
