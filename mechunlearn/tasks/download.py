"""Public files: downloaded once, and verified."""

import hashlib
import os
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

SCHEMES = ("https", "http", "file")


def content_of(source: str | Path, sha256: str | None = None) -> bytes:
    """What is in a file, or at an address; of a SHA-256, if one is given.

    What an address has is kept if its SHA-256 is known, in $MECHUNLEARN_CACHE, or else in the folder mechunlearn of
    $XDG_CACHE_HOME (default: ~/.cache), and read from there the next time. ValueError for another SHA-256 and for a
    file that is not there; ConnectionError if nothing can be downloaded.
    """
    sha256 = sha256 and sha256.lower()
    if isinstance(source, Path) or urlsplit(source).scheme not in SCHEMES:
        if not Path(source).is_file():
            raise ValueError(f"expected a file or an address, got {str(source)!r}, which is no file: check the path.")
        return _verified(Path(source).read_bytes(), sha256, str(source))
    kept = None if sha256 is None else _folder() / f"{sha256[:16]}-{urlsplit(source).path.rsplit('/', 1)[-1]}"
    if kept is not None and kept.is_file() and _digest(kept.read_bytes()) == sha256:
        return kept.read_bytes()
    content = _verified(_downloaded(source), sha256, source)
    if kept is not None:
        _write(kept, content)
    return content


def _folder() -> Path:
    given = os.environ.get("MECHUNLEARN_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechunlearn"


def _downloaded(address: str) -> bytes:
    try:
        with urlopen(address, timeout=60) as answer:
            return answer.read()
    except (OSError, HTTPException) as error:
        raise ConnectionError(
            f"expected a file at {address}, got none ({error}): check the address and the network, or download the "
            f"file elsewhere and pass its path."
        ) from error


def _verified(content: bytes, sha256: str | None, where: str) -> bytes:
    if sha256 is not None and _digest(content) != sha256:
        raise ValueError(
            f"expected a file with SHA-256 {sha256}, got {_digest(content)} from {where}: it is another version, or "
            f"was altered on the way. If you trust it, save it and pass its path as source=..., without a SHA-256."
        )
    return content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Another process sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
