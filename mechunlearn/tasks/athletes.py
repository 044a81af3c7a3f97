"""Athletes and their sports: where they are read from, which of them are forgotten, and what is injected."""

import hashlib
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from http.client import HTTPException
from io import BytesIO
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np

from mechunlearn.model import Model
from mechunlearn.tasks import facts

if TYPE_CHECKING:
    from pandas import DataFrame


SPORTS = ("football", "baseball", "basketball")
CANDIDATES = (*SPORTS, "golf")

Athlete: TypeAlias = tuple[str, str]
"""Name and sport."""

SCHEMES = ("https", "http", "file")
"""What an address begins with; any other text is the path of a file."""

AUTHORS_FILE = (
    "https://raw.githubusercontent.com/magikarp01/tasks/7c1e4a9be15eb8e2847d475e9d56759fec80aa5f/facts/data/sports.csv"
)
AUTHORS_SHA256 = "926857c13eb4c5ecdc646c0358818d731edd21c34b20f4ed76e9d8c7d96db8c1"


def authors_athletes() -> "DataFrame":
    """The 1,559 athletes of Guo et al. 2025 (https://arxiv.org/abs/2410.12949), from the authors' repository.

    Columns are athlete, sport and more, such as inject_sport_without_golf and inject_sport_with_golf, which
    `sports_facts(..., injected=...)` takes by name. The file is pinned to a commit, downloaded once, verified and kept
    in $MECHUNLEARN_CACHE (default: mechunlearn in $XDG_CACHE_HOME or ~/.cache). ConnectionError without a network.
    """
    import pandas as pd

    return pd.read_csv(BytesIO(content_of(AUTHORS_FILE, AUTHORS_SHA256)))


def is_shipped(model: Model) -> bool:
    """True of the shipped model, its twin, and models made from them by editing or training: by their vocabulary."""
    return model.tokenizer is not None and model.tokenizer.get_vocab() == facts.vocabulary()


def athletes_from(model: Model, source: "str | Path | DataFrame | None", sha256: str | None) -> list[facts.FactRow]:
    """The rows of the source with all their columns; ValueError unless each athlete comes once, with a known sport."""
    if source is None and sha256 is not None:
        raise ValueError("expected a source with its SHA-256, got no source: the authors' file has its own.")
    if source is None and is_shipped(model):
        return [row for row in facts.athletes() if row["sport"] in SPORTS]
    frame = _table(source, sha256)
    if {"athlete", "sport"} - set(frame.columns):
        raise ValueError(f"expected columns athlete and sport, got {list(frame.columns)}: rename the columns.")
    others = sorted(set(map(str, frame["sport"])) - set(SPORTS))
    if others:
        raise ValueError(f"expected sports {SPORTS}, got also {others[:5]}: drop or rename these rows.")
    blank = frame.index[frame["athlete"].fillna("").astype(str).str.strip() == ""].tolist()
    if blank:
        raise ValueError(f"expected a name in each row, got none in rows {blank[:5]}: drop these rows.")
    twice = frame["athlete"][frame["athlete"].duplicated()].tolist()
    if twice:
        raise ValueError(f"expected each athlete once, got {twice[:5]} several times: keep one row of each.")
    cells = frame.astype(object).where(frame.notna(), "")
    return [{str(key): str(value) for key, value in row.items()} for row in cells.to_dict("records")]


def athletes_to_forget(
    people: Sequence[Athlete],
    forget: str | int | Sequence[str],
    seed: int | None,
    left_out: Mapping[str, Sequence[str]],
) -> list[Athlete]:
    """The athletes to forget. `left_out`: reason -> names, for the error about a name that is not among the people."""
    if seed is not None and not isinstance(forget, int | np.integer):
        raise ValueError(f"expected a number of athletes with forget_seed, got forget={forget!r}: leave the seed out.")
    if isinstance(forget, int | np.integer):
        if not 0 < forget < len(people):
            raise ValueError(f"forget must lie in 1..{len(people) - 1} (athletes of the source), got {forget}.")
        forget = index(forget)
        return list(people[:forget]) if seed is None else random.Random(f"forget {seed}").sample(people, forget)
    if isinstance(forget, str):
        players = [person for person in people if person[1] == forget]
        if not players:
            raise ValueError(f"expected a sport of the source ({', '.join(SPORTS)}), got {forget!r}.")
        return players
    forget, by_name = [*forget], dict(people)
    unknown = [name for name in forget if name not in by_name]
    for reason, names in left_out.items():
        if set(unknown) & set(names):
            raise ValueError(
                f"expected athletes that the task can use, got {sorted(set(unknown) & set(names))[:5]} ({reason}): "
                f"choose others, or pass {'corrupt=False' if reason == 'no_counterpart' else 'threshold=0.0'}."
            )
    if unknown or not forget:
        raise ValueError(f"expected names of athletes of the source, got {unknown[:5] or 'none'}: check the spelling.")
    return [(name, by_name[name]) for name in dict.fromkeys(forget)]


def injected_sports(
    forgotten: Sequence[Athlete], rows: Sequence[facts.FactRow], injected: str | Sequence[str], seed: int
) -> dict[str, str]:
    """Athlete -> the sport to inject: the same for all, that of a column, or a random other one of several."""
    if not isinstance(injected, str):
        _check_sports(injected)
        sport_of = {}
        for name, true in forgotten:
            others = [sport for sport in injected if sport != true]
            if not others:
                raise ValueError(
                    f"expected another sport than {true} among those to inject, got {list(injected)}: give more."
                )
            sport_of[name] = random.Random(f"injected {name} {seed}").choice(others)
    elif injected in rows[0]:
        cells = {row["athlete"]: row[injected].strip() for row in rows}
        sport_of = {name: cells[name] for name, _ in forgotten}
    else:
        sport_of = dict.fromkeys((name for name, _ in forgotten), injected)
    _check_sports(sport_of.values())
    unchanged = [name for name, sport in forgotten if sport == sport_of[name]]
    if unchanged:
        raise ValueError(
            f"expected an injected sport that none of the athletes plays, got {sport_of[unchanged[0]]!r}, which "
            f"{unchanged[0]} does: choose another, or give several sports to draw from."
        )
    return sport_of


def _check_sports(sports: Iterable[str]) -> None:
    wrong = [sport for sport in sports if sport not in CANDIDATES]
    if wrong:
        raise ValueError(f"expected an injected sport among {', '.join(CANDIDATES)}, got {wrong[0]!r}.")


def _table(source: "str | Path | DataFrame | None", sha256: str | None) -> "DataFrame":
    import pandas as pd

    if source is None:
        return authors_athletes()
    if not isinstance(source, pd.DataFrame):
        return pd.read_csv(BytesIO(content_of(source, sha256)))
    if sha256 is not None:
        raise ValueError("expected a SHA-256 only for a file or an address, got one for a table: leave it out.")
    return source


def content_of(source: str | Path, sha256: str | None = None) -> bytes:
    """The content of a file or an address, verified if a SHA-256 is given; such a download is kept."""
    sha256 = sha256 and sha256.lower()
    if isinstance(source, Path) or urlsplit(source).scheme not in SCHEMES:
        if not Path(source).is_file():
            raise ValueError(f"expected a file or an address, got {str(source)!r}, which is no file: check the path.")
        return _verified(Path(source).read_bytes(), sha256, str(source))
    cached = None if sha256 is None else _cache_folder() / f"{sha256[:16]}-{urlsplit(source).path.rsplit('/', 1)[-1]}"
    if cached is not None and cached.is_file() and _sha256(cached.read_bytes()) == sha256:
        return cached.read_bytes()
    content = _verified(_downloaded(source), sha256, source)
    if cached is not None:
        # Renamed when complete: another process sees the whole file or none.
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_name(f"{cached.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        temporary.replace(cached)
    return content


def _cache_folder() -> Path:
    folder = os.environ.get("MECHUNLEARN_CACHE")
    return Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechunlearn"


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
    if sha256 is not None and _sha256(content) != sha256:
        raise ValueError(
            f"expected a file with SHA-256 {sha256}, got {_sha256(content)} from {where}: it is another version, or "
            f"was altered on the way. If you trust it, save it and pass its path as source=..., without a SHA-256."
        )
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
