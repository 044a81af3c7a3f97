"""A report as one JSON file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechunlearn.evaluate.cell import Cell
from mechunlearn.evaluate.cells_file import decoded, encoded
from mechunlearn.files import read_json, write_json


def write_report(
    path: str | Path, cells: Sequence[Cell], weights: Mapping[str, int], provenance: Mapping[str, Any]
) -> None:
    content = {
        "cells": [encoded(cell) for cell in cells],
        "rows": [{"row": row, "weights": count} for row, count in weights.items()],  # a list keeps its order
        "provenance": dict(provenance),
    }
    write_json(path, "Report", content)


def read_report(path: str | Path) -> tuple[tuple[Cell, ...], dict[str, int], dict[str, Any]]:
    """Cells, weights and provenance."""
    content = read_json(path, "Report")
    weights = {each["row"]: each["weights"] for each in content["rows"]}
    return tuple(decoded(cell) for cell in content["cells"]), weights, content["provenance"]
