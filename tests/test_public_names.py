"""What is public is shown in code of the README, a how-to, a method page, an example or a benchmark, and suffices."""

import ast
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


SCRIPTS = [
    path
    for folder in ("examples", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if "testbed" not in path.relative_to(ROOT).parts  # what trains the shipped models is part of the package
]


def cells(path: Path) -> str:
    found = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in found if cell["cell_type"] == "code")


def blocks(path: Path) -> str:
    return "\n".join(re.findall(r"^```(?:python|py)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE))


SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in SCRIPTS}
SOURCES |= {path.relative_to(ROOT).as_posix(): cells(path) for path in (ROOT / "examples").glob("*.ipynb")}
SOURCES |= {
    path.relative_to(ROOT).as_posix(): blocks(path) for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
}


@pytest.mark.parametrize("name", SOURCES)
def test_scripts_and_documents_use_public_names_alone(name: str):
    """Imports of the package's namespaces and from them, and `mu.namespace.name`: no module below, no other name."""
    tree, namespaces = ast.parse(SOURCES[name]), {*NAMESPACES, "intervals"}
    for node in ast.walk(tree):
        for module in [alias.name for alias in node.names] if isinstance(node, ast.Import) else []:
            assert module.partition(".")[0] != "mechunlearn" or module == "mechunlearn", module
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mechunlearn":
            assert node.module == "mechunlearn" or node.module.removeprefix("mechunlearn.") in namespaces, node.module
            public = {*importlib.import_module(node.module).__all__}
            assert {alias.name for alias in node.names} <= public | {*namespaces}, node.module
        match node:
            case ast.Attribute(ast.Attribute(ast.Name("mu"), space), used) if space in namespaces:
                assert used in importlib.import_module(f"mechunlearn.{space}").__all__, f"mu.{space}.{used}"


def exists(dotted: str) -> bool:
    """Whether `mu.a.b` or `mechunlearn.a.b` leads to something: an attribute, or a module."""
    rest = dotted.split(".")[1:]
    there: object = mu
    for place, part in enumerate(rest, 1):
        if not hasattr(there, part):
            try:
                there = importlib.import_module(".".join(["mechunlearn", *rest[:place]]))
            except ImportError:
                return False
        else:
            there = getattr(there, part)
    return True


TEXTS = [
    *ROOT.glob("*.md"),
    *(p for folder in ("docs", "mechunlearn", "examples", "benchmarks") for p in (ROOT / folder).rglob("*")),
]


def test_every_name_and_file_that_a_text_mentions_is_there():
    gone = set()
    for path in TEXTS:
        if path.suffix in (".py", ".md", ".ipynb"):
            text = path.read_text()
            names = set(re.findall(r"\b(?:mechunlearn|mu)(?:\.\w+)+", text))
            files = set(re.findall(r"\b(?:mechunlearn|examples|tests|benchmarks)/[\w/]+\.(?:py|md|json)\b", text))
            gone |= {(path.name, name) for name in names if not exists(name)}
            gone |= {(path.name, file) for file in files if not (ROOT / file).exists()}
    assert gone == set()
