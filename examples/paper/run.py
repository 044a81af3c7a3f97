"""Runs the pieces of work on any executor, with the time left; a run that was killed goes on."""

import json
from collections.abc import Sequence
from concurrent.futures import Executor, as_completed
from importlib.metadata import version
from pathlib import Path

from tqdm.auto import tqdm

import mechunlearn as mu
from paper.setup import Setup, load
from paper.work import Work, finish


def run(setup: Setup, out: Path, rounds: Sequence[Sequence[Work]], executor: Executor | None = None) -> dict[str, str]:
    """Do what is not finished yet; the work that failed, and why. Without an executor, here, one after the other.

    `executor`: any `concurrent.futures.Executor` whose workers see the folder, such as a `ProcessPoolExecutor` with the
    start method "spawn", or `dask.distributed.Client(...).get_executor()`.
    """
    check(setup, out)
    failed: dict[str, str] = {}
    todo = [[work for work in some if not (out / work.path).exists()] for some in rounds]
    total, left = sum(map(len, rounds)), sum(map(len, todo))
    with tqdm(total=total, initial=total - left, desc="reproduce", smoothing=0.05) as bar:
        for some in todo:
            for work, problem in _finished(setup, out, some, executor):
                if problem is not None:
                    failed[str(work)] = f"{type(problem).__name__}: {problem}"
                    bar.write(f"{work} failed: {failed[str(work)]}")
                bar.set_postfix_str(str(work), refresh=False)
                bar.update()
    return failed


def check(setup: Setup, out: Path) -> None:
    """Begin a folder, or ValueError if it was begun with another setup or model."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "setup.json"
    versions = {name: version(name) for name in ("mechunlearn", "torch", "transformer_lens", "transformers")}
    about = {**setup.identity(), "fingerprint": mu.fingerprint(load(setup.model)), "versions": versions}
    own = json.loads(json.dumps(about))
    if not path.exists():
        path.with_suffix(".part").write_text(json.dumps(own, indent=1) + "\n")
        path.with_suffix(".part").rename(path)
    begun = json.loads(path.read_text())
    other = [name for name in own if begun.get(name) != own[name]]
    if other:
        raise ValueError(
            f"expected the settings that {out} was begun with, got {other[0]}={own[other[0]]!r} in place of "
            f"{begun.get(other[0])!r}: take another folder, or pass the same options."
        )


def _finished(setup: Setup, out: Path, some: Sequence[Work], executor: Executor | None):
    """Each piece of work as it is finished, and what it raised."""
    if executor is None:
        for work in some:
            yield work, _problem(setup, out, work)
        return
    futures = {executor.submit(finish, setup, out, work): work for work in some}
    try:
        for future in as_completed(futures):
            yield futures[future], future.exception()
    finally:
        for future in futures:
            future.cancel()


def _problem(setup: Setup, out: Path, work: Work) -> Exception | None:
    try:
        finish(setup, out, work)
    except Exception as problem:
        return problem
    return None
