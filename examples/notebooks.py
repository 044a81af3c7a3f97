"""Run the notebooks and keep what they show, each figure as a picture too: `make notebooks`, about seven minutes."""

import base64
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from pictures import write_pngs
from plotly.io import from_json

FOLDER = Path(__file__).parent
SHOWN = sorted(FOLDER.glob("0[1-46]_*.ipynb"))
"""The notebooks that are stored with outputs; that about Gemma-2-9B has to be run where the model fits."""

PLOTLY = "application/vnd.plotly.v1+json"


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or SHOWN:
        content = nbformat.read(path, as_version=4)
        executed(content)
        add_pictures(content)
        content.metadata["code"] = code_digest(content)
        nbformat.write(content, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def executed(content: Any) -> None:
    """Run the cells; keep results and printed text, not progress bars."""
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # figures as numbers, without a copy of plotly's own code
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(content, timeout=1200, resources={"metadata": {"path": folder}}).execute()
    for cell in code_cells(content):
        cell.metadata.pop("execution", None)  # when it ran
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr" and not _is_widget(output)]


def add_pictures(content: Any) -> None:
    """Give each figure a PNG, which is what pages without scripts show; RuntimeError without a browser."""
    outputs = [output for cell in code_cells(content) for output in cell.outputs]
    bundles = [output.data for output in outputs if PLOTLY in output.get("data", {})]
    with tempfile.TemporaryDirectory() as folder:
        files = {Path(folder) / f"{number}.png": bundle for number, bundle in enumerate(bundles)}
        figures = {path: from_json(json.dumps(bundle[PLOTLY]), skip_invalid=True) for path, bundle in files.items()}
        problem = write_pngs(figures)
        if problem:
            raise RuntimeError(f"no pictures could be drawn: {problem}")
        for path, bundle in files.items():
            bundle["image/png"] = base64.b64encode(path.read_bytes()).decode()


def code_cells(content: Any) -> list[Any]:
    return [cell for cell in content.cells if cell.cell_type == "code"]


def code_digest(content: Any) -> str:
    """Of all code: outputs of other code are stale."""
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(content)).encode()).hexdigest()


def _is_widget(output: Any) -> bool:
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


if __name__ == "__main__":
    main()
