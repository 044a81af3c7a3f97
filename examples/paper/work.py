"""The pieces of work of a run: each writes one file when it is finished, and is never done again."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mechunlearn as mu
from mechunlearn.evaluate import Cell, Report, Result, compare
from paper import places
from paper.edits import edit_of, learned_mask, sequence_of
from paper.facts import MODES, PARTS, divided, is_sports
from paper.measures import formats_of, tests_of
from paper.setup import FOUND, Setup, load, load_never_knew

STAGES = (
    "forget, trained prompt",
    "retain, trained prompt",
    "forget, multiple choice",
    "retain, multiple choice",
    "forget, paraphrases",
)
"""What is asked after each part of a sequence."""


@dataclass(frozen=True)
class Work:
    """Travels to a worker."""

    do: Callable[..., Report]
    name: str
    """Of the task."""
    mode: str
    localization: str
    seed: int

    @property
    def path(self) -> Path:
        """Of the report, in the folder of the run."""
        return Path("reports") / self.name / self.mode / self.localization / f"seed-{self.seed}.json"

    def __str__(self) -> str:
        return f"{self.name}, {self.mode}: {self.localization}, seed {self.seed}"


def rounds(
    setup: Setup, names: list[str], localizations: list[str], seeds: int, modes: tuple[str, ...] = MODES
) -> list[list[Work]]:
    """Work that must be finished before the next may begin: places, then for each seed originals, edits, sequences.

    Seed 0 of everything comes first, since the other seeds take its options; and a run that ends early has all tasks.
    """
    asked = list(dict.fromkeys([*names, *(name.replace("sequential", "64") for name in names)]))
    found = [[Work(located, name, "localize", "all", 0) for name in asked]]
    for seed in range(seeds):
        found.append([Work(original, name, "original", "original", seed) for name in names])
        edits = [
            Work(sequential if name.endswith("sequential") else edited, name, mode, localization, seed)
            for localization in localizations  # first, so that those that chose the same place find it finished
            for name in names
            for mode in modes
            if not (setup.paper is not None and mode == "erase" and not is_sports(name))
        ]
        if "sport" in names and "erase" in modes and seed < setup.masked_seeds:
            edits += [Work(masked, "sport", "weight masks", each, seed) for each in localizations]
        # A sequence takes the options of all facts at once: their search must not have two writers.
        found += [[work for work in edits if work.do is not sequential], [w for w in edits if w.do is sequential]]
    return found


def finish(setup: Setup, out: Path, work: Work) -> None:
    """Do a piece of work in this process, unless its file is there."""
    path = out / work.path
    if path.exists():
        return
    torch.set_num_threads(setup.threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    report = _of_the_same_place(setup, out, work) or work.do(setup, out, work)
    wrong = [f"{cell.row}, {cell.test}: {cell.error}" for cell in report.cells if cell.result is None]
    if wrong:  # what is finished stays in the file of cells
        raise RuntimeError(f"{len(wrong)} of {len(report.cells)} cells failed, the first: {wrong[0]}")
    spent = round(time.process_time() - started, 2)
    replace(report, provenance={**report.provenance, "CPU seconds": spent}).save(path)
    path.with_suffix(".jsonl").unlink(missing_ok=True)


def located(setup: Setup, out: Path, work: Work) -> Report:
    """The masks of a task, in files of their own; the report says how large they are."""
    places.localize(setup, out, work.name)
    masks = places.masks_of(setup, out, work.name, 0)
    sizes = {f"part {i + 1}, {name}": mask.n_parameters for i, each in enumerate(masks) for name, mask in each.items()}
    return Report((), sizes, {"model": mu.fingerprint(load(setup.model))})


def original(setup: Setup, out: Path, work: Work) -> Report:
    """The original model, and the twin that never knew the sport."""
    twin = load_never_knew(setup.model) if work.name == "sport" else None
    return _compared(setup, work, {}, _cells_of_original(out, work), {} if twin is None else {"never knew": twin})


def edited(setup: Setup, out: Path, work: Work) -> Report:
    """A localization's edit, in every test."""
    edit = edit_of(setup, out, work.name, work.mode, work.localization, work.seed)
    report = _compared(setup, work, {work.localization: edit}, _own_cells(out, work))
    return report.select(rows=[work.localization])


def sequential(setup: Setup, out: Path, work: Work) -> Report:
    """A localization's edits of one part after the other: the formats after each, every test after the last."""
    task = divided(setup, work.name).final
    tests = {test: ask for test, ask in formats_of(work.name, task).items() if test in STAGES}

    known = Report.load(out / replace(work, mode="original", localization="original").path).results["original"]
    before = iter([{test: known[test] for test in tests}])  # the first time, nothing is edited yet

    def after(model: Any) -> dict[str, Result]:
        return next(before, None) or {test: ask(model, task) for test, ask in tests.items()}

    found = sequence_of(setup, out, work.name, work.mode, work.localization, work.seed, after)
    report = _compared(setup, work, {work.localization: found.combined}, _own_cells(out, work))
    last = report.select(rows=[work.localization])
    return _with_stages(last, work, found.evaluations)


def _of_the_same_place(setup: Setup, out: Path, work: Work) -> Report | None:
    """What is finished for another localization that chose the same components, under this one's name: where both get
    the same search, that gives the same edit, bit for bit."""
    if work.do is not edited or setup.paper is not None or work.localization not in FOUND:
        return None
    masks = places.masks_of(setup, out, work.name, work.seed)[0]
    for other in FOUND[: FOUND.index(work.localization)]:
        path = out / replace(work, localization=other).path
        if path.exists() and masks[other] == masks[work.localization]:
            return renamed(Report.load(path), other, work.localization)
    return None


def renamed(report: Report, old: str, new: str) -> Report:
    """The same rows under another localization's name."""
    cells = tuple(replace(cell, row=new + cell.row.removeprefix(old)) for cell in report.cells)
    weights = {new + row.removeprefix(old): n for row, n in report.weights.items()}
    return Report(cells, weights, {**report.provenance, "same edit as": old})


def masked(setup: Setup, out: Path, work: Work) -> Report:
    """Edits of all sizes from a localization's weight mask, and as many of its weights at random."""
    learned = learned_mask(setup, out, work.name, work.localization, work.seed)
    edits: dict[str, mu.Edit] = {}
    for k in (k for k in setup.sizes if k <= learned.n_moved):
        edits[f"{work.localization}, {k} weights"] = learned.discretize(k=k)
        edits[f"{work.localization}, {k} weights at random"] = learned.zeroed_at_random(k=k, seed=work.seed)
    model, task = load(setup.model), divided(setup, work.name).final
    tests = formats_of(work.name, task)
    chosen = {test: tests[test] for test in list(tests)[:4]}
    report = compare(model, task, edits, metrics=chosen, seeds=[work.seed], progress=False)
    return report.select(rows=list(edits))


def _compared(
    setup: Setup, work: Work, edits: Mapping[str, mu.Edit], cells: Path, controls: Mapping[str, Any] | None = None
) -> Report:
    model, task = load(setup.model), divided(setup, work.name).final
    tests, options = tests_of(setup, work.name, task), {"controls": controls or {}, "progress": False}
    return compare(model, task, edits, metrics=tests, seeds=[work.seed], results=cells, **options)


def _cells_of_original(out: Path, work: Work) -> Path:
    return (out / work.path).parents[2] / "original" / f"cells-{work.seed}.jsonl"


def _own_cells(out: Path, work: Work) -> Path:
    """Begins as a copy of the original model's cells, which are so not computed again."""
    path = (out / work.path).with_suffix(".jsonl")
    if not path.exists() and not (out / work.path).exists():
        shutil.copy(_cells_of_original(out, work), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return path


def _with_stages(last: Report, work: Work, stages: tuple[Mapping[str, Result], ...]) -> Report:
    cells, weights = list(last.cells), dict(last.weights)
    for place, found in enumerate(stages):
        row = f"{work.localization}, after {place} of {PARTS}"
        weights[row] = last.weights[work.localization] if place else 0
        cells += [Cell(row, test, work.seed, result) for test, result in found.items()]
    return Report(tuple(cells), weights, last.provenance)
