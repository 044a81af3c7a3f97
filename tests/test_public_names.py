"""What is public is shown in code of the README, a how-to, a method page, an example or a benchmark, and suffices."""

import importlib
import json
import re
from itertools import chain
from pathlib import Path

import pytest

import mechunlearn as mu

ROOT = Path(__file__).parent.parent
NAMESPACES = sorted({n for n in mu.__all__ if (ROOT / "mechunlearn" / n).is_dir()} | {"metrics", "training", "weights"})
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def shown() -> set[str]:
    """Every word of code, but for the reference, which has all names by itself."""
    docs = ROOT / "docs"
    pages = [ROOT / "README.md", *docs.glob("*.md"), *docs.glob("howto/*.md"), *docs.glob("methods/*.md")]
    code = list(chain.from_iterable(CODE.findall(page.read_text()) for page in pages))
    for notebook in (ROOT / "examples").glob("*.ipynb"):
        for cell in json.loads(notebook.read_text())["cells"]:
            source = "".join(cell["source"])
            code += [source] if cell["cell_type"] == "code" else CODE.findall(source)
    code += [path.read_text() for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    return set(re.findall(r"\w+", "\n".join(code)))


SHOWN = shown()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_public_name_is_shown_somewhere(namespace: str):
    module = importlib.import_module(f"mechunlearn.{namespace}")
    assert [name for name in module.__all__ if name not in SHOWN] == []
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
