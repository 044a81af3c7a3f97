"""What the documents show works: README and docs code blocks, and notebooks (`make documents`)."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_gemma

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.documents


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path):
    code = "\n".join(BLOCK.findall(page.read_text()))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)


@each_notebook
def test_a_notebook_runs(notebook: Path, tmp_path: Path):
    import nbformat
    from nbclient import NotebookClient

    content = nbformat.read(notebook, as_version=4)
    for cell in _parameter_cells(content.cells):  # the one of a notebook that would download a large model
        cell.source = tiny_gemma.parameters(tmp_path / "tiny")
    NotebookClient(content, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()


def test_the_notebook_about_gemma_runs_with_other_values_of_the_same_parameters():
    [notebook] = [path for path in NOTEBOOKS if "gemma" in path.name]
    [cell] = _parameter_cells(json.loads(notebook.read_text())["cells"])
    assert _constants("".join(cell["source"])) == _constants(tiny_gemma.PARAMETERS.format(folder=""))


@each_notebook
def test_a_notebook_is_stored_without_outputs_and_its_links_lead_somewhere(notebook: Path):
    content = json.loads(notebook.read_text())
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    linked = re.findall(r"\]\((?!http)([^)#]+)", "".join(line for cell in content["cells"] for line in cell["source"]))
    assert [link for link in linked if not (notebook.parent / link).is_file()] == []


def _parameter_cells(cells: list[Any]) -> list[Any]:
    return [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]


def _constants(source: str) -> set[str]:
    """Names in capitals that the code assigns."""
    names = {name.id for name in ast.walk(ast.parse(source)) if isinstance(name, ast.Name)}
    return {name for name in names if name.isupper()}
