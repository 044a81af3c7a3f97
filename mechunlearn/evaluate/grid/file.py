"""Cells in a file: a line for each, written as they come, so that what was interrupted can go on."""

import base64
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechunlearn.curve import Curve
from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.results import Result

Identity = Mapping[str, Any]
"""What must be equal for a cell to be the same one. JSON values."""


@dataclass(frozen=True)
class CellsFile:
    """JSON lines, each with its SHA-256. Cells of other identities may be in it; they stay and are not used."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.absolute().parent.is_dir():
            raise ValueError(f"expected results in a folder that exists, got {self.path}: make the folder first.")

    def finished(self) -> dict[str, Cell]:
        """Key (of an identity) -> the cell with a result. Damaged lines are left out with a warning."""
        if not self.path.exists():
            return {}
        found: dict[str, Cell] = {}
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            record = _record(line)
            if record is None:
                warnings.warn(
                    f"line {number} of {self.path} is torn or damaged: that cell is computed again.", stacklevel=2
                )
            elif record["cell"]["result"] is not None:
                found[record["key"]] = decoded(record["cell"])
        return found

    def append(self, identity: Identity, cell: Cell) -> None:
        """One more line, which is on the disk when this returns."""
        body = {"key": key_of(identity), "identity": dict(identity), "cell": encoded(cell)}
        line = json.dumps({**body, "sha256": _digest(body)}).encode() + b"\n"
        with self.path.open("ab+") as file:
            file.write(line if _ends_a_line(file) else b"\n" + line)
            file.flush()
            os.fsync(file.fileno())


def key_of(identity: Identity) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def encoded(cell: Cell) -> dict[str, Any]:
    """The cell in JSON values, every bit of its numbers included."""
    return {**vars(cell), "result": None if cell.result is None else _result(cell.result)}


def decoded(content: Mapping[str, Any]) -> Cell:
    """What `encoded` gave."""
    return Cell(**{**content, "result": None if content["result"] is None else _read_result(content["result"])})


def _result(result: Result) -> dict[str, Any]:
    return {
        **vars(result),
        "per_example": _numbers(result.per_example),
        "names": list(result.names),
        "curve": None if result.curve is None else _curve(result.curve),
        "control": None if result.control is None else _result(result.control),
    }


def _read_result(content: Mapping[str, Any]) -> Result:
    return Result(
        **{
            **content,
            "per_example": _read_numbers(content["per_example"]),
            "names": tuple(content["names"]),
            "curve": None if content["curve"] is None else _read_curve(content["curve"]),
            "control": None if content["control"] is None else _read_result(content["control"]),
        }
    )


def _curve(curve: Curve) -> dict[str, Any]:
    return {**vars(curve), "points": list(curve.points), "per_prompt": _numbers(curve.per_prompt)}


def _read_curve(content: Mapping[str, Any]) -> Curve:
    points, numbers = tuple(content["points"]), _read_numbers(content["per_prompt"])
    return Curve(**{**content, "points": points, "per_prompt": numbers})


def _numbers(tensor: Tensor) -> dict[str, Any]:
    own = tensor.detach().cpu().contiguous()
    raw = own.flatten().view(torch.uint8).numpy().tobytes()
    return {"dtype": str(own.dtype), "shape": list(own.shape), "base64": base64.b64encode(raw).decode()}


def _read_numbers(content: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, content["dtype"].removeprefix("torch."))
    raw = bytearray(base64.b64decode(content["base64"]))
    if prod(content["shape"]) == 0:
        return torch.zeros(content["shape"], dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).reshape(content["shape"])


def _record(line: bytes) -> dict[str, Any] | None:
    """None for a line that is not whole."""
    try:
        record = json.loads(line)
        stated = record.pop("sha256")
        return record if _digest(record) == stated else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _ends_a_line(file: Any) -> bool:
    """Whether what was written before is whole; a torn line gets its end, so that the next one is readable."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
