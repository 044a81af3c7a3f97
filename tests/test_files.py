import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mechunlearn import files
from mechunlearn.files import read, write

CONTENT = {"a": [1, 2.5, None, True], "text": "é ☃", "nested": {"b": {}}}
TENSORS = {
    "float": torch.tensor([[0.1, -2.0], [3.0, float("inf")]]),
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}


def corrupted(raw: bytes) -> list[bytes]:
    """One byte altered, at every place."""
    return [raw[:i] + bytes([raw[i] ^ flip]) + raw[i + 1 :] for i in range(len(raw)) for flip in (1, 0x80)]


def test_json_comes_back_as_it_went(tmp_path: Path) -> None:
    write(tmp_path / "x.json", "Thing", CONTENT)
    assert read(tmp_path / "x.json", "Thing") == CONTENT
    assert json.loads((tmp_path / "x.json").read_text())["kind"] == "Thing"


@dataclass(frozen=True)
class Label:
    n: int

    def __str__(self) -> str:
        return f"n{self.n}"

    def __lt__(self, other: "Label") -> bool:
        return self.n < other.n

    @classmethod
    def parse(cls, label: str) -> "Label":
        return cls(int(label[1:]))


@dataclass(frozen=True)
class Part:
    label: Label | str
    more: "Part | None" = None


@dataclass(frozen=True)
class Thing:
    parts: tuple[Part, ...]
    rest: Any = None
    labels: frozenset[Label] = frozenset()


VALUES: dict[str, Any] = {
    "scalars": [None, True, 1, 1.5, float("inf"), 1e-320, 10**30, "é ☃", ""],
    "tuples": ((), (1,), ((), [(2, 3)])),
    "sets": (frozenset(), frozenset({1, "a", (2, 3)})),
    "number keys": {2: "a", 10: ("b",), None: {}, (1, 2): 3, "2": 4},
    "order of keys": {"b": 1, "a": {"z": 1, "y": 2}},
    "keys that look like tags": {"$tuple": [1]},
    "tags with company": {"$tuple": [1], "$tensor": 2},
    "names that meet": {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
    "labels": (Label(3), Label(1)),
    "a label among others": (Label(3), "n3", [Label(2)]),
    "a dataclass": Thing((Part(Label(1)), Part("n1", Part(Label(2)))), {"a": (1,)}, frozenset({Label(10), Label(9)})),
    "numbers of numpy": (np.float64(0.1), np.float32(0.1), np.int64(3), np.bool_(True)),
}


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, in type and in order."""
    if isinstance(one, torch.Tensor):
        one, other = (t.detach() for t in (one, other))
        bits = [t.contiguous().flatten().view(torch.uint8).tolist() for t in (one, other)]
        return (one.dtype, one.shape, bits[0]) == (other.dtype, other.shape, bits[1])
    if isinstance(one, np.generic):
        return one.item() == other
    if isinstance(one, Mapping) and not is_dataclass(one):
        return same(list(one.items()), list(other.items()))
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return one == other or one != one


@pytest.mark.parametrize("name", VALUES)
def test_what_is_written_comes_back_in_type_and_order(tmp_path: Path, name: str) -> None:
    content = {"value": VALUES[name], "beside": [VALUES[name]]}
    write(tmp_path / "x", "Thing", content)
    assert same(content, read(tmp_path / "x", "Thing", Thing, Label))
    assert same(content, files.from_text(files.to_text("Thing", content).encode(), "Thing", Thing, path="x"))
    assert same(content, files.unpacked(pickle.loads(pickle.dumps(files.packed(content))), Thing))


@pytest.mark.parametrize("text", [False, True], ids=["safetensors", "text"])
def test_a_saved_dataclass_is_equal_in_every_field(tmp_path: Path, text: bool) -> None:
    for value in (VALUES["a dataclass"], Thing((), {"tensors": TENSORS})):
        files.save(value, tmp_path / "x", text=text)
        assert same(value, files.load(Thing, tmp_path / "x"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Thing((), {"a": [torch.float32]}), "got dtype at rest.a.0: it cannot be written"),
        (Thing((), Path("x")), "got PosixPath at rest"),
        (Part("x", Thing(())), "got Thing at more"),  # type: ignore[arg-type]  (no type hint of Part says so)
    ],
)
def test_what_would_not_come_back_is_refused_with_its_place(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        files.save(value, tmp_path / "x")


@pytest.mark.parametrize("tensors", [False, True])
def test_files_of_another_format_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: bool) -> None:
    monkeypatch.setattr(files, "FORMAT", 3)
    write(tmp_path / "x", "Thing", {"t": torch.ones(1) if tensors else 1})
    monkeypatch.undo()
    with pytest.raises(files.FormatError, match="expected a file of format 2 with a Thing, got one of format 3 at"):
        read(tmp_path / "x", "Thing")


def test_files_of_mechunlearn_0_1_0_are_refused(tmp_path: Path) -> None:
    old = {"kind": "Thing", "content": "{}", "sha256": "0"}
    (tmp_path / "x.json").write_text(json.dumps(old))
    save_file({"t": torch.ones(1)}, tmp_path / "x.safetensors", metadata=old)
    for name in ("x.json", "x.safetensors"):
        with pytest.raises(
            files.FormatError, match=r"got one of mechunlearn 0.1.0 at .*x.*: make it again, or load it"
        ):
            read(tmp_path / name, "Thing")


def test_tensors_come_back_bit_identical(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", "Thing", {**CONTENT, "tensors": TENSORS})
    content = read(tmp_path / "x.safetensors", "Thing")
    tensors = content.pop("tensors")
    assert content == CONTENT
    assert list(tensors) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_views_and_parameters_are_stored_by_value(tmp_path: Path) -> None:
    whole = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    write(tmp_path / "x.safetensors", "Thing", {"turned": whole.T, "part": whole[:, 1]})
    tensors = read(tmp_path / "x.safetensors", "Thing")
    assert tensors["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert tensors["part"].tolist() == [1, 4]


def test_tensors_that_share_memory_are_stored(tmp_path: Path) -> None:
    values = torch.arange(3.0)
    write(tmp_path / "x.safetensors", "Thing", {"values": values, "per_prompt": values[None]})


@pytest.mark.parametrize("flaw", ["corrupted", "truncated"])
def test_json_with_a_flaw_is_refused(tmp_path: Path, flaw: str) -> None:
    path = tmp_path / "x.json"
    write(path, "Thing", {"a": [1.5, "b"]})
    raw = path.read_bytes()
    for damaged in corrupted(raw) if flaw == "corrupted" else [raw[:n] for n in range(len(raw) - 2)]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="expected"):
            read(path, "Thing")


@pytest.mark.parametrize("flaw", ["corrupted", "truncated"])
def test_safetensors_with_a_flaw_are_refused(tmp_path: Path, flaw: str) -> None:
    path = tmp_path / "x.safetensors"
    write(path, "Thing", {"t": torch.tensor([1.0, 2.0]), "a": 1})
    raw = path.read_bytes()
    for damaged in corrupted(raw) if flaw == "corrupted" else [raw[:n] for n in range(len(raw))]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="expected"):
            read(path, "Thing")


@pytest.mark.parametrize("renamed", [b'"sha256"', b'"content"'])
def test_a_header_without_its_entries_is_refused(tmp_path: Path, renamed: bytes) -> None:
    path = tmp_path / "x.safetensors"
    write(path, "Thing", {"t": torch.ones(1)})
    path.write_bytes(path.read_bytes().replace(renamed, renamed.upper()))
    with pytest.raises(ValueError, match="intact file with a Thing"):
        read(path, "Thing")


def test_a_refusal_says_what_the_file_should_be_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write(path, "Thing", {"a": 1})
    path.write_text(path.read_text().replace('"a": 1', '"a": 2'))
    message = r"expected an intact file with a Thing, got .*x.json \(its checksum .*restore it from a copy"
    with pytest.raises(ValueError, match=message):
        read(path, "Thing")


def test_swapped_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, "Thing", {"aa": torch.ones(1), "bb": torch.zeros(1)})
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"aa"', b'"cc"').replace(b'"bb"', b'"aa"').replace(b'"cc"', b'"bb"'))
    with pytest.raises(ValueError, match="checksum"):
        read(path, "Thing")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.json", "Thing", {})
    write(tmp_path / "x.safetensors", "Thing", {"t": torch.ones(1)})
    for name in ("x.json", "x.safetensors"):
        with pytest.raises(ValueError, match=rf"expected a file with a Mask, got one with a Thing .*{name}"):
            read(tmp_path / name, "Mask")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1, 2]")
    save_file({"t": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="expected an intact file with a Thing"):
        read(tmp_path / "x.json", "Thing")
    with pytest.raises(ValueError, match="expected an intact file with a Thing"):
        read(tmp_path / "x.safetensors", "Thing")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a file with a Thing, found none at .*nowhere"):
        read(tmp_path / "nowhere", "Thing")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write(tmp_path / "x", "Thing", {"a": 1})
    with pytest.raises(TypeError):
        write(tmp_path / "x", "Thing", {"a": object()})
    assert read(tmp_path / "x", "Thing") == {"a": 1}


def test_writing_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    for value in (1, 2):
        write(tmp_path / "x", "Thing", {"a": value})
        write(tmp_path / "y", "Thing", {"t": torch.tensor([value])})
    assert read(tmp_path / "x", "Thing") == {"a": 2}
    assert read(tmp_path / "y", "Thing")["t"].tolist() == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]
