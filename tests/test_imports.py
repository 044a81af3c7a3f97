"""Imports go down only, and importing the package does nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mechunlearn"
LAYERS = (
    {"files", "identity", "intervals"},
    {"curve"},
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
