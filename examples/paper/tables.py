"""The numbers of a run as CSV files: every table and figure is made from these."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

import mechunlearn as mu
from mechunlearn.evaluate import Cell, Report
from paper.derived import with_derived
from paper.facts import TASKS
from paper.setup import LOCALIZATIONS

TABLES = {
    "table 1": ("sport", "erase"),
    "table 2": ("athletes-16", "erase"),
    "table 3": ("sport", "inject"),
    "table 4": ("athletes-16", "inject"),
}
"""Of the workshop version of the paper."""

COLUMNS = {
    "forget": "forget, trained prompt",
    "retain": "retain, trained prompt",
    "forget, multiple choice": "forget, multiple choice",
    "retain, multiple choice": "retain, multiple choice",
    "other knowledge": "other knowledge",
}
"""Of those tables."""


def write_tables(out: Path) -> list[Path]:
    """A CSV file in the folder for each kind of number, and for Tables 1 to 4."""
    about = provenance_of(out)
    reports = reports_of(out, about)
    frames = {
        "results": _stacked(reports, results_frame),
        "differences": _stacked(reports, differences_frame),
        "curves": _stacked(reports, curves_frame),
        "sizes": sizes_frame(out),
        "masks": masks_frame(out),
        "edits": edits_frame(out),
        "search": search_frame(out),
        "costs": costs_frame(out),
    }
    for name, (task, mode) in TABLES.items():
        if (task, mode) in reports:
            frames[f"{name}, {task}, {mode}"] = paper_table(frames["results"], task, mode)
    (out / "tables").mkdir(exist_ok=True)
    return [write_csv(frame, out / "tables" / f"{name}.csv", about) for name, frame in frames.items() if len(frame)]


def write_csv(frame: pd.DataFrame, path: Path, about: Mapping[str, Any]) -> Path:
    """The first line is a comment with where the numbers are from; `pandas.read_csv(path, comment="#")` skips it."""
    text = f"# {json.dumps(about, sort_keys=True)}\n{frame.round(5).to_csv(index=False)}"
    path.with_suffix(".part").write_text(text, encoding="utf-8")
    return path.with_suffix(".part").replace(path)


def reports_of(out: Path, about: Mapping[str, Any]) -> dict[tuple[str, str], Report]:
    """Task and mode -> what is finished: the original model, the twin, every localization, all seeds."""
    found = {}
    for name in TASKS:
        originals = _reports(out, name, "original")
        for mode in ("erase", "inject"):
            own = _reports(out, name, mode)
            if own:
                merged = _merged([*originals, *own], {**about, "task": {"name": name}})
                found[name, mode] = with_derived(merged)
    return found


def provenance_of(out: Path) -> dict[str, Any]:
    """Setup, model, versions and how many seeds are finished; ValueError for reports of different versions."""
    setup = json.loads((out / "setup.json").read_text())
    every = [report.provenance for name in TASKS for mode in _modes(out, name) for report in _reports(out, name, mode)]
    versions = {json.dumps(each["versions"], sort_keys=True) for each in every if "versions" in each}
    if len(versions) != 1:
        raise ValueError(f"expected finished work of one set of versions, got {len(versions)} in {out}: {versions}.")
    seeds = sorted({seed for each in every for seed in each.get("seeds", ())})
    return {"setup": setup, "versions": json.loads(versions.pop()), "seeds": seeds, "mechunlearn": mu.__version__}


def results_frame(report: Report) -> pd.DataFrame:
    """A line for each row and test; `control`: the same test where there is nothing to find."""
    frame = report.intervals.reset_index().drop(columns=["sense"])
    results = report.results
    controls = [results[row].get(test) for row, test in zip(frame["row"], frame["test"], strict=True)]
    values = [None if each is None or each.control is None else each.control.value for each in controls]
    return frame.assign(control=values)


def differences_frame(report: Report) -> pd.DataFrame:
    """Each localization minus fact lookup on the same facts, with the seeds that both have."""
    frames = []
    rows = [row for row in report.weights if row in LOCALIZATIONS and row != "fact lookup"]
    for row in rows if "fact lookup" in report.weights else ():
        both = [cell for cell in report.cells if cell.row in (row, "fact lookup") and cell.result is not None]
        seeds = {cell.row: {(one.test, one.seed) for one in both if one.row == cell.row} for cell in both}
        shared = seeds.get(row, set()) & seeds.get("fact lookup", set())
        paired = replace(report, cells=tuple(cell for cell in both if (cell.test, cell.seed) in shared))
        frame = paired.against("fact lookup")
        frames.append(frame.assign(seeds=len({seed for _, seed in shared})).reset_index())
    return pd.concat(frames) if frames else pd.DataFrame()


def curves_frame(report: Report) -> pd.DataFrame:
    """Relearning by step and probes by layer: means and intervals over facts and seeds."""
    frame = report.curve_intervals
    return frame[["point", "value", "low", "high", "row", "test", "axis", "chance", "control"]]


def sizes_frame(out: Path) -> pd.DataFrame:
    """What is left after setting so many weights to zero: those that a weight mask chose, and as many at random."""
    found = _reports(out, "sport", "weight masks")
    if not found:
        return pd.DataFrame()
    frame = _merged(found, {}).intervals.reset_index().drop(columns=["sense"])
    parts = frame["row"].str.extract(r"^(?P<localization>.+), (?P<weights>\d+) weights(?P<how> at random)?$")
    parts["how"] = parts["how"].fillna("chosen").str.strip()
    return pd.concat([parts, frame.drop(columns=["row"])], axis=1)


def masks_frame(out: Path) -> pd.DataFrame:
    """Which components each localization chose; random ones, which are drawn anew for each seed, are in edits.csv."""
    rows = []
    for path in sorted((out / "masks").glob("*/*/*.json")):
        mask = mu.ComponentMask.load(path)
        lookup = mu.ComponentMask.load(path.parent / "fact lookup.json")
        about = {"task": path.parts[-3], "part": path.parts[-2], "localization": path.stem}
        shared = len(mask.components & lookup.components)
        chosen = " ".join(str(component) for component in mask)
        numbers = {"weights": mask.n_parameters, "shared with fact lookup": shared, "components": chosen}
        rows.append({**about, **numbers})
    return pd.DataFrame(rows)


def edits_frame(out: Path) -> pd.DataFrame:
    """Where each edit was made and with which rate; of a sequence, the places of all parts together."""
    rows = []
    for path in sorted((out / "reports").glob("*/*/*/seed-*.json")):
        task, mode, localization = path.parts[-4:-1]
        if localization in LOCALIZATIONS and mode in ("erase", "inject"):
            about = Report.load(path).provenance["rows"]
            own = next(iter([about[row] for row in about if row not in ("original", "never knew")]))
            made = {"task": task, "mode": mode, "localization": localization, "seed": int(path.stem[5:])}
            rate = next((each["learning_rate"] for each in own["provenance"] if "learning_rate" in each), None)
            rows.append({**made, "learning rate": rate, "components": " ".join(own["components"][0])})
    return _with_shared(pd.DataFrame(rows)) if rows else pd.DataFrame()


def search_frame(out: Path) -> pd.DataFrame:
    """Every trial of every search; of random places, each draw's, told apart by their components."""
    frames = []
    for folder in sorted((out / "search").glob("*")):
        task, mode, localization = folder.name.split(", ")
        frames.append(mu.edit.trials(folder).assign(task=task, mode=mode, localization=localization))
    if not frames:
        return pd.DataFrame()
    frame, last = pd.concat(frames, ignore_index=True), ["score", "failure", "components"]
    first = ["task", "mode", "localization"]
    return frame[[*first, *(column for column in frame if column not in (*first, *last)), *last]]


def costs_frame(out: Path) -> pd.DataFrame:
    """What each kind of work took, for each task: pieces, and CPU seconds of the workers."""
    rows = []
    for path in sorted((out / "reports").glob("*/*/*/seed-*.json")):
        task, mode = path.parts[-4:-2]
        rows.append({"task": task, "work": mode, "CPU seconds": Report.load(path).provenance["CPU seconds"]})
    found = pd.DataFrame(rows).groupby(["task", "work"], sort=False)["CPU seconds"].agg(["count", "sum"]).reset_index()
    return found.rename(columns={"count": "pieces", "sum": "CPU seconds"})


def paper_table(results: pd.DataFrame, task: str, mode: str) -> pd.DataFrame:
    """A line for each localization, a column for each number and each end of its interval."""
    chosen = results[(results["task"] == task) & (results["mode"] == mode)]
    lines = []
    for row in dict.fromkeys(chosen["row"]):
        line: dict[str, Any] = {"row": row}
        for column, test in COLUMNS.items():
            for each in chosen[(chosen["row"] == row) & (chosen["test"] == test)].to_dict("records"):
                line |= {column: each["value"], f"{column}, low": each["low"], f"{column}, high": each["high"]}
        lines.append(line)
    return pd.DataFrame(lines)


def _with_shared(edits: pd.DataFrame) -> pd.DataFrame:
    """And how many of the components are fact lookup's, in the same task."""
    lookups = edits[edits["localization"] == "fact lookup"].drop_duplicates("task").set_index("task")["components"]
    if not len(lookups):
        return edits
    own = edits["components"].str.split()
    theirs = edits["task"].map(lookups).fillna("").str.split()
    return edits.assign(shared=[len({*some} & {*others}) for some, others in zip(own, theirs, strict=True)])


def _modes(out: Path, name: str) -> list[str]:
    return [path.name for path in sorted((out / "reports" / name).glob("*")) if path.name != "localize"]


def _reports(out: Path, name: str, mode: str) -> list[Report]:
    """In the order of localizations and seeds."""
    paths = sorted((out / "reports" / name / mode).glob("*/seed-*.json"), key=lambda path: int(path.stem[5:]))
    order = ["original", *LOCALIZATIONS]
    return [Report.load(path) for path in sorted(paths, key=lambda path: order.index(path.parent.name))]


def _merged(reports: list[Report], about: Mapping[str, Any]) -> Report:
    weights: dict[str, int] = {}
    for report in reports:
        weights |= report.weights
    cells: tuple[Cell, ...] = tuple(cell for report in reports for cell in report.cells)
    return Report(cells, weights, about)


def _stacked(reports: Mapping[tuple[str, str], Report], made: Any) -> pd.DataFrame:
    frames = [made(report).assign(task=task, mode=mode) for (task, mode), report in reports.items()]
    frames = [frame[["task", "mode", *frame.columns.drop(["task", "mode"])]] for frame in frames if len(frame)]
    return pd.concat(frames) if frames else pd.DataFrame()
