"""Every class with `save` keeps the same promises: what is loaded is what was saved, or it is refused."""

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_files import same

from mechunlearn.components import ComponentMask, ComponentScores, EdgeMask, EdgeScores, ModelShape, PositionScores
from mechunlearn.curve import Curve
from mechunlearn.edit import KeyCovariance, LearnedMask
from mechunlearn.evaluate import Cell, Report, Result
from mechunlearn.localize import (
    CausalTrace,
    FactLookup,
    Faithfulness,
    Incompleteness,
    LogitLens,
    ProbeResult,
    SetEffects,
)
from mechunlearn.weights import Edit

PACKAGE = Path(__file__).parent.parent / "mechunlearn"
SHAPE = ModelShape(n_layers=2, n_heads=2, n_kv_heads=1, d_model=8, d_head=4, d_mlp=16, gated=True)
SETTINGS = {"seed": 3, "sizes": (0.1, [1, (2,)]), "by layer": {10: "a", 9: None}, "b": {"z": float("nan"), "a": -0.0}}
MASK = ComponentMask(ComponentMask.of(["L1MLP", "L0H1", "L0H1.W_K", "L1N3"], SHAPE).components, SHAPE, SETTINGS)
EMPTY = MASK - MASK
CIRCUIT = EdgeMask(EdgeMask.of(["embed->L0MLP", "L0MLP->logits"], SHAPE).edges, SHAPE, SETTINGS)


def random(*sizes: int, dtype: torch.dtype = torch.float32) -> Any:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(dtype)


def scores(**more: Any) -> ComponentScores:
    made = ComponentScores.of({"L1MLP": 0.1, "L0H1": -1 / 3}, SHAPE, method="m", metric="nats", settings=SETTINGS)
    return replace(made, **more)


def edge_scores() -> EdgeScores:
    made = EdgeScores.of({"embed->L0MLP": 0.1, "L0H1->L1H0.W_Q": -2.0}, SHAPE, settings=SETTINGS)
    return replace(made, per_prompt=random(3, *made.tensor.shape, dtype=torch.float64))


def edit(mask: ComponentMask = MASK) -> Edit:
    values = {f"L{layer}.{matrix}": units for (layer, matrix), units in SHAPE.entries(mask).items()}
    width = {label: SHAPE.unit_parameters(label[3:]) // SHAPE.d_model for label in values}
    tensors = {k: random(int(u.sum()), width[k], 8, dtype=torch.bfloat16) for k, u in values.items()}
    history = ({"step": 0, "loss": 0.1, "norm": float("inf")}, {"step": 1, "loss": 1 / 3, "norm": 1e-320})
    return Edit(mask, tensors, "0123456789abcdef", SETTINGS, history)


def learned() -> LearnedMask:
    made = edit()
    numbers = {label: random(*value.shape).sigmoid() for label, value in made.values.items()}
    return LearnedMask(MASK, numbers, made.values, made.fingerprint, SETTINGS, made.history)


def lookup() -> FactLookup:
    curve = Curve(("0", "1"), random(3, 2), "accuracy", 0.5)
    findings = {"chance": 0.25, "layers": (1, 2), "borderline": {"rise": {"L1MLP": 0.1}}}
    per_prompt = scores(per_prompt=random(3, 2, dtype=torch.float64))
    return FactLookup(MASK, "m", findings, {"b": curve, "a": curve}, {"heads": per_prompt, "mlps": scores()})


def report() -> Report:
    curve = Curve(("0", "8"), torch.tensor([[0.1, float("nan")], [1 / 3, -0.0]]), "x", 1 / 3, "steps")
    control = Result(torch.tensor([1e-40, 0.1], dtype=torch.float64), "nobody", names=("a", "b"))
    result = Result(random(2, dtype=torch.bfloat16), "x", 0.1 + 0.2, "share", ("Zoë", 'a "b"\n'), curve, control)
    cells = (Cell("original", "t", 0, result, "", 0.8), Cell("e", "t", 1, None, "ValueError: x"))
    return Report(cells, {"original": 0, "e": 12}, SETTINGS)


def faithfulness(*circuits: ComponentMask | EdgeMask) -> Faithfulness:
    return Faithfulness(
        ("a", "a"), circuits, torch.tensor([0.0, 1.0]), random(3, 2), random(3, 2), random(3), random(3) - 1, "nats"
    )


EXAMPLES: dict[str, Callable[[], Any]] = {
    "ComponentScores": lambda: scores(per_prompt=random(3, 2, dtype=torch.float16)),
    "ComponentScores without prompts": scores,
    "PositionScores": lambda: PositionScores(
        scores().components, ("subject", "last"), random(3, 2, 2), SHAPE, "m", "nats", SETTINGS
    ),
    "PositionScores of no prompts": lambda: PositionScores((), (), random(0, 0, 0), SHAPE, "m"),
    "ComponentMask": lambda: MASK,
    "ComponentMask of nothing": lambda: EMPTY,
    "EdgeScores": edge_scores,
    "EdgeMask": lambda: CIRCUIT,
    "Edit": edit,
    "Edit of nothing": lambda: edit(EMPTY),
    "LearnedMask": learned,
    "KeyCovariance": lambda: KeyCovariance({10: random(4, 4), 9: random(4, 4)}, {10: 0.1, 9: 0.0}, 7, "words", "0f"),
    "CausalTrace": lambda: CausalTrace(
        random(3), random(3), random(3, 1, 2, 4), torch.zeros(3, 4).long(), ("MLP",), SHAPE, "nats", SETTINGS
    ),
    "SetEffects": lambda: SetEffects({"b": MASK, "a": EMPTY}, random(3, 2), "m", "nats", SETTINGS),
    "Faithfulness": lambda: faithfulness(EMPTY, MASK),
    "Faithfulness of edges": lambda: faithfulness(CIRCUIT - CIRCUIT, CIRCUIT),
    "Incompleteness": lambda: Incompleteness(
        CIRCUIT, (CIRCUIT - CIRCUIT, CIRCUIT, CIRCUIT), random(3, 3), random(3, 3), "nats", SETTINGS
    ),
    "FactLookup": lookup,
    "LogitLens": lambda: LogitLens(("0", "1"), random(3, 2, dtype=torch.float64), random(3, 2)),
    "ProbeResult": lambda: ProbeResult(
        ("0", "1"), random(3, 2), random(3, 2), random(2), random(5, 2), 1 / 3, ("a", "b"), SETTINGS
    ),
    "Report": report,
}
"""An example by the name of its class, and what is special about it."""


def test_every_class_with_save_and_load_has_an_example() -> None:
    classes = {
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and (
            {"save", "load"} <= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            or "Saved" in {base.id for base in node.bases if isinstance(base, ast.Name)}
        )
        and node.name != "Saved"
    }
    assert classes == {name.split()[0] for name in EXAMPLES}


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_loaded_equals_what_was_saved_in_every_field(tmp_path: Path, name: str) -> None:
    value = EXAMPLES[name]()
    value.save(tmp_path / "file")
    assert same(value, type(value).load(str(tmp_path / "file")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_file_of_another_class_is_refused(tmp_path: Path, name: str) -> None:
    value = EXAMPLES[name]()
    other = scores() if name.startswith("ComponentMask") else MASK
    other.save(tmp_path / "file")
    with pytest.raises(ValueError, match=rf"expected a file with a {type(value).__name__}, got one with a Component"):
        type(value).load(tmp_path / "file")


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_file_that_is_altered_or_cut_is_refused(tmp_path: Path, name: str) -> None:
    value, path = EXAMPLES[name](), tmp_path / "file"
    value.save(path)
    whole = path.read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, len(whole), len(whole) // 12)]
    for damaged in (*flipped, whole[: len(whole) // 2], whole[:-3], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"expected an? (intact )?file with a {type(value).__name__}"):
            type(value).load(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"expected a file with a {type(value).__name__}, found none at"):
        type(value).load(path)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_file_of_mechunlearn_0_1_0_is_refused(tmp_path: Path, name: str) -> None:
    cls = type(EXAMPLES[name]())
    old = {"kind": cls.__name__, "content": "{}", "sha256": "0" * 64}
    (tmp_path / "json").write_text(json.dumps(old))
    save_file({"t": torch.ones(1)}, tmp_path / "safetensors", metadata=old)
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=r"of format 2 .*got one of mechunlearn 0.1.0 .*make it again, or load it"):
            cls.load(path)
