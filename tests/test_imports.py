"""Imports go down only, and importing the package does nothing else."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mechunlearn"
LAYERS = (
    {"files", "identity", "intervals"},
    {"curve", "options"},
    {"components"},
    {"model"},
    {"tasks"},
    {"metrics"},
    {"arguments", "probing"},
    {"losses", "weights"},
    {"training"},
    {"localize", "edit", "evaluate"},
    {"auditing", "testbed"},
    {"__init__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "mechunlearn" else [f"mechunlearn.{a.name}" for a in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("mechunlearn.")}
    return found


def test_every_part_of_the_package_has_a_level():
    assert {part(path) for path in PACKAGE.rglob("*.py")} == set(LEVEL)


def test_imports_go_down_only():
    for path in PACKAGE.rglob("*.py"):
        for other in imported(path) - {part(path)}:
            assert LEVEL[other] < LEVEL[part(path)], f"{path} imports {other}"


def test_nothing_outside_model_depends_on_transformer_lens_or_tests_for_attributes():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if part(path) not in ("model", "testbed"):
            assert "transformer_lens import" not in text, path
        assert "hasattr(" not in text or part(path) == "model", path
        assert "pickle" not in text or path.name == "files.py", path
        # torch's files are pickles: reading foreign ones admits tensors only, and none are written but for MIB's tools.
        assert "torch.save(" not in text or path == PACKAGE / "localize" / "circuits" / "files.py", path
        assert text.count("torch.load(") == text.count("weights_only=True"), path


def test_importing_the_package_does_not_load_transformer_lens():
    code = "import sys, mechunlearn; print([m for m in ('transformer_lens', 'plotly', 'pandas') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_module_is_hidden_by_what_it_holds():
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        module, (parent, _, last) = importlib.import_module(name), name.rpartition(".")
        assert not parent or getattr(sys.modules[parent], last) is module, name


def test_no_folder_of_the_package_has_more_than_twenty_entries():
    for folder in (PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__")):
        entries = [path.name for path in folder.iterdir() if path.name not in ("__init__.py", "__pycache__")]
        assert len(entries) <= 20, (folder, len(entries))


MOST_FILES = 150


def test_the_package_stays_small():
    assert len([*PACKAGE.rglob("*.py")]) <= MOST_FILES


REMEMBERS = {"WeakSet", "WeakKeyDictionary", "WeakValueDictionary", "local", "ContextVar", "set", "dict", "defaultdict"}
CACHES = {"cache", "lru_cache"}


def last_word(node: ast.AST) -> str:
    """Of `threading.local()`, `local`."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def remembered(path: Path) -> set[str]:
    """Containers that a module starts empty, functions with a cache, and names that a function sets for the module."""
    tree, found = ast.parse(path.read_text()), set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            is_empty = isinstance(node.value, ast.Dict | ast.List) and not ast.unparse(node.value).strip("{}[]")
            if is_empty or (isinstance(node.value, ast.Call) and last_word(node.value) in REMEMBERS):
                found.add(ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and {last_word(each) for each in node.decorator_list} & CACHES:
            found.add(node.name)
        found |= {*node.names} if isinstance(node, ast.Global) else set()
    return found


def test_contributing_lists_all_that_a_module_remembers():
    table = re.findall(r"^\| (`.+`) \| `(.+\.py)` \|", (PACKAGE.parent / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    listed = {(name, home) for names, home in table for name in re.findall(r"`(\w+)`", names)}
    modules = {path.relative_to(PACKAGE).as_posix(): remembered(path) for path in PACKAGE.rglob("*.py")}
    assert listed == {(name, home) for home, names in modules.items() for name in names}


@pytest.mark.parametrize("verb", ["localize", "edit", "evaluate"])
def test_the_readme_has_a_caption_for_each_file_of_a_verb(verb: str):
    tree = (PACKAGE.parent / "README.md").read_text().split("## Files")[1].split("```")[1]
    part = tree.split(f"\n  {verb}/")[1].split("\n  auditing/")[0]
    captions = dict(re.findall(r"(\w+\.py) +(\S.*)", part))
    files = {path.name for path in (PACKAGE / verb).rglob("*.py") if path.stem != "__init__"}
    assert files - set(captions) == set()
    named = set(re.findall(r"\w+\.py", tree))
    assert named - {path.name for path in PACKAGE.rglob("*.py")} == set()
