import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mechunlearn.files import read_json, read_tensors, write_json, write_tensors

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
    write_json(tmp_path / "x.json", "Thing", CONTENT)
    assert read_json(tmp_path / "x.json", "Thing") == CONTENT
    assert json.loads((tmp_path / "x.json").read_text())["kind"] == "Thing"


def test_json_with_number_keys_is_readable_with_string_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", "Thing", {"layers": {2: "a", 10: "b"}, "pair": (1, 2)})
    assert read_json(tmp_path / "x.json", "Thing") == {"layers": {"2": "a", "10": "b"}, "pair": [1, 2]}


def test_tensors_come_back_bit_identical(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", "Thing", TENSORS, CONTENT)
    tensors, content = read_tensors(tmp_path / "x.safetensors", "Thing")
    assert content == CONTENT
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_views_and_parameters_are_stored_by_value(tmp_path: Path) -> None:
    whole = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    write_tensors(tmp_path / "x.safetensors", "Thing", {"turned": whole.T, "part": whole[:, 1]}, {})
    tensors, _ = read_tensors(tmp_path / "x.safetensors", "Thing")
    assert tensors["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert tensors["part"].tolist() == [1, 4]


def test_tensors_that_share_memory_are_stored(tmp_path: Path) -> None:
    values = torch.arange(3.0)
    write_tensors(tmp_path / "x.safetensors", "Thing", {"values": values, "per_prompt": values[None]}, {})


@pytest.mark.parametrize("flaw", ["corrupted", "truncated"])
def test_json_with_a_flaw_is_refused(tmp_path: Path, flaw: str) -> None:
    path = tmp_path / "x.json"
    write_json(path, "Thing", {"a": [1.5, "b"]})
    raw = path.read_bytes()
    for damaged in corrupted(raw) if flaw == "corrupted" else [raw[:n] for n in range(len(raw) - 2)]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="expected"):
            read_json(path, "Thing")


@pytest.mark.parametrize("flaw", ["corrupted", "truncated"])
def test_safetensors_with_a_flaw_are_refused(tmp_path: Path, flaw: str) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, "Thing", {"t": torch.tensor([1.0, 2.0])}, {"a": 1})
    raw = path.read_bytes()
    for damaged in corrupted(raw) if flaw == "corrupted" else [raw[:n] for n in range(len(raw))]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="expected"):
            read_tensors(path, "Thing")


@pytest.mark.parametrize("renamed", [b'"sha256"', b'"content"'])
def test_a_header_without_its_entries_is_refused(tmp_path: Path, renamed: bytes) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, "Thing", {"t": torch.ones(1)}, {})
    path.write_bytes(path.read_bytes().replace(renamed, renamed.upper()))
    with pytest.raises(ValueError, match="intact file with a Thing"):
        read_tensors(path, "Thing")


def test_a_refusal_says_what_the_file_should_be_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, "Thing", {"a": 1})
    path.write_text(path.read_text().replace('"a": 1', '"a": 2'))
    message = r"expected an intact file with a Thing, got .*x.json \(its checksum .*restore it from a copy"
    with pytest.raises(ValueError, match=message):
        read_json(path, "Thing")


def test_swapped_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, "Thing", {"aa": torch.ones(1), "bb": torch.zeros(1)}, {})
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"aa"', b'"cc"').replace(b'"bb"', b'"aa"').replace(b'"cc"', b'"bb"'))
    with pytest.raises(ValueError, match="checksum"):
        read_tensors(path, "Thing")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", "Thing", {})
    write_tensors(tmp_path / "x.safetensors", "Thing", {"t": torch.ones(1)}, {})
    for name, read in (("x.json", read_json), ("x.safetensors", read_tensors)):
        with pytest.raises(ValueError, match=rf"expected a file with a Mask, got one with a?\s?Thing .*{name}"):
            read(tmp_path / name, "Mask")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1, 2]")
    save_file({"t": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="expected an intact file with a Thing"):
        read_json(tmp_path / "x.json", "Thing")
    with pytest.raises(ValueError, match="expected a file with a Thing"):
        read_tensors(tmp_path / "x.safetensors", "Thing")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_json, read_tensors):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read(tmp_path / "nowhere", "Thing")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x", "Thing", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x", "Thing", {"a": object()})
    assert read_json(tmp_path / "x", "Thing") == {"a": 1}


def test_writing_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    for value in (1, 2):
        write_json(tmp_path / "x", "Thing", {"a": value})
        write_tensors(tmp_path / "y", "Thing", {"t": torch.tensor([value])}, {})
    assert read_json(tmp_path / "x", "Thing") == {"a": 2}
    assert read_tensors(tmp_path / "y", "Thing")[0]["t"].tolist() == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]
