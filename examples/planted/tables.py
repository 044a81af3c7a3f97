"""From the files of the plantings to tables: tidy CSV, and one page of Markdown."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import spearmanr

from mechunlearn.intervals import bootstrap
from planted.cell import NEVER, path_of
from planted.figure import write_figure

ABOUT = """\
Means and 95 % bootstrap intervals over plantings (n of them). Those of one seed share their facts, so that intervals
are somewhat too narrow. A method that finds nothing in a planting, as a fact lookup may, is left out of its means
there. The random place is drawn outside the truth.

AUROC: over heads and MLPs, by the size of the score; chance is 0.5. Precision: of as many of the highest components as
are true. Truth covered: the share of the truth's weights among those
that score highest and together have at most as many weights; that is where an edit is made.

Accuracy is the mean probability over the candidates; chance is 0.25, but the twin, which never knew, prefers other
answers. Forget: the trained prompt. Other formats: mean of one in which the facts were planted and two in which they
were not. Relearned: half of the facts after training on the other half; less nobody: less what is then said of
made-up names. Probes: right about held-out facts, at the best layer. Text loss in nats per token.
"""

CONTROL = "random place"

OTHER = ("question", "aside (not planted)", "instruction (not planted)")
"""Whose mean is "other formats"."""

AGREEMENT = {
    "auroc": "AUROC",
    "auroc_of_weights": "AUROC, by weights",
    "precision": "precision",
    "chance": "its chance",
    "covered": "truth covered",
}
ROBUSTNESS = (
    "covered",
    "forget",
    "other formats",
    "multiple choice",
    "relearned",
    "relearned, less nobody",
    "probes",
    "probes, less never knew",
    "retain",
    "retain, other formats",
    "retain, multiple choice",
    "text loss",
)

OUTCOMES = dict.fromkeys(ROBUSTNESS[1:])


def write(raw: Path, out: Path, kinds: Sequence[str], seeds: int) -> list[Path]:
    """Tables and figure of what is finished; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [path_of(raw, kind, seed) for kind in kinds for seed in range(seeds)]
    cells = [json.loads(path.read_text()) for path in paths if path.exists()]
    done = [cell for cell in cells if "failed" not in cell]
    frames = {
        "plantings": pd.DataFrame([planting(cell) for cell in cells]),
        "localizations": pd.DataFrame([row for cell in done for row in localizations(cell)]),
        "tests": pd.DataFrame([row for cell in done for row in tests(cell)]),
        "robustness": pd.DataFrame([row for cell in done for row in robustness(cell)]),
    }
    written = []
    for name, frame in frames.items():
        written.append(out / f"{name}.csv")
        frame.to_csv(written[-1], index=False, float_format="%.6g")
    written.append(out / "planted.md")
    written[-1].write_text(page(frames, cells))
    written.append(out / "provenance.json")
    written[-1].write_text(json.dumps(provenance(cells), indent=1) + "\n")
    return [*written, *write_figure(frames["robustness"], out)] if done else written


def planting(cell: dict[str, Any]) -> dict[str, Any]:
    """One row: what was planted, how well, at what cost in CPU seconds."""
    start = {"kind": cell["kind"], "seed": cell["seed"], "truth": " ".join(cell["truth"]), "weights": cell["weights"]}
    if "failed" in cell:
        return {**start, "failed": cell["failed"]}
    after = cell["planted"]["after"]
    return {
        **start,
        "facts": cell["planted"]["facts"],
        "steps": cell["planted"]["steps"],
        "known, worst format": min(found["forget"] for found in after.values()),
        "kept, worst format": min(found["retain"] for found in after.values()),
        "said of strangers": cell["strangers"]["vocabulary"],
        "said of strangers before": cell["strangers"]["before"],
        **{f"seconds, {name}": value for name, value in cell["seconds"].items()},
    }


def localizations(cell: dict[str, Any]) -> list[dict[str, Any]]:
    start = {"kind": cell["kind"], "seed": cell["seed"]}
    return [{**start, "method": name, **found} for name, found in cell["localizations"].items()]


def tests(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Every test of every row of the report."""
    start = {"kind": cell["kind"], "planting seed": cell["seed"]}
    return [{**start, **row} for row in cell["tests"]]


def robustness(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each place that was edited, and for the planted model and the twin."""
    values = {(row["row"], row["test"]): _number(row["value"]) for row in cell["tests"]}
    nobody = {row["row"]: _number(row["control"]) for row in cell["tests"] if row["test"] == "relearned"}
    rows = []
    for name, said_of_nobody in nobody.items():
        found = {test: value for (row, test), value in values.items() if row == name}
        place = cell["places"].get(name, {})
        about = {
            "kind": cell["kind"],
            "seed": cell["seed"],
            "place": "planted, not edited" if name == "original" else name,
            "auroc": cell["localizations"].get(name, place).get("auroc"),
            "covered": place.get("covered"),
            "weights": place.get("weights", 0),
            "learning rate": cell["learning_rates"].get(name),
        }
        differences = {
            "relearned, less nobody": found["relearned"] - said_of_nobody,
            "probes, less never knew": found["probes"] - values[NEVER, "probes"],
        }
        rows.append(about | asked(found) | differences)
    return rows


def asked(found: Mapping[str, float]) -> dict[str, float]:
    """The columns that are tests, or means of some."""
    return {
        "forget": found["forget, trained prompt"],
        "other formats": _mean(found[f"forget, {other}"] for other in OTHER),
        "multiple choice": found["forget, multiple choice"],
        "relearned": found["relearned"],
        "probes": found["probes"],
        "retain": found["retain, trained prompt"],
        "retain, other formats": _mean(found[f"retain, {other}"] for other in OTHER),
        "retain, multiple choice": found["retain, multiple choice"],
        "text loss": found["text loss"],
    }


def page(frames: dict[str, pd.DataFrame], cells: Sequence[dict[str, Any]]) -> str:
    """The Markdown page."""
    failed = [cell for cell in cells if "failed" in cell]
    lines = [f"{len(cells) - len(failed)} plantings; the components could not take the facts up in {len(failed)}."]
    lines += [f"- {cell['kind']}, seed {cell['seed']}, {' '.join(cell['truth'])}: {cell['failed']}" for cell in failed]
    if len(failed) == len(cells):
        return "\n".join(lines) + "\n"
    places, robust = frames["localizations"], frames["robustness"]
    by_kind = places.pivot_table(index="method", columns="kind", values="auroc", sort=False)
    lines += [
        "",
        about(frames["plantings"]),
        "",
        verdict(robust),
        "",
        ABOUT,
        "### Agreement with the truth",
        "",
        *grouped(places, "method", AGREEMENT),
    ]
    lines += ["", "### AUROC by kind of place", "", *_table(["method", *by_kind.columns], _rows(by_kind))]
    lines += ["", "### Robustness of unlearning", "", *grouped(robust, "place", dict.fromkeys(ROBUSTNESS))]
    lines += ["", f"### Less what is left in the {CONTROL}", "", *grouped(less_control(robust), "place", OUTCOMES)]
    lines += ["", "### Better located, better unlearned?", "", *correlations(robust)]
    return "\n".join(lines) + "\n"


def about(plantings: pd.DataFrame) -> str:
    """What was planted."""
    done = plantings[plantings["facts"].notna()]
    return (
        f"Each planting trains {int(done['facts'].iloc[0])} basketball players, in several formats, into the "
        "components of one place in a model that never knew a basketball player (`mu.testbed.plant`), and no other "
        "weight changes. The answer needs the rest of the model too, so that a method may find more than the truth and "
        "be right. Of other players, whom nobody planted, "
        f"{_interval(done['said of strangers'].tolist())} are said to play basketball afterwards, and "
        f"{_interval(done['said of strangers before'].tolist())} before: what is planted is not only facts about names."
    )


def verdict(frame: pd.DataFrame) -> str:
    """Does it help to edit where the facts are? In sentences, from the paired differences alone."""
    less = less_control(frame)
    truth, lines = less[less["place"] == "truth"], []
    for outcome in ("forget", "other formats", "multiple choice", "relearned, less nobody", "probes, less never knew"):
        low, high = (float(end) for end in bootstrap(torch.tensor(truth[outcome].tolist(), dtype=torch.float64)))
        found = "less" if high < 0 else "more" if low > 0 else "about as much (the interval contains 0)"
        lines.append(f"- {outcome}: {found}, by {_interval(truth[outcome].tolist())}")
    start = "Erased in the true place, what is left, compared with erasing in a random place of the same planting:"
    end = "The other places that were edited are compared with the same random ones below, and all numbers are there."
    return "\n".join([start, "", *lines, "", end])


def grouped(frame: pd.DataFrame, by: str, columns: Mapping[str, str | None]) -> list[str]:
    rows = [
        [str(name), str(_count(group, columns)), *(_interval(group[column].tolist()) for column in columns)]
        for name, group in frame.groupby(by, sort=False)
    ]
    return _table([by, "n", *(shown or column for column, shown in columns.items())], rows)


def _count(group: pd.DataFrame, columns: Iterable[str]) -> int:
    """Plantings in which at least one of the columns has a number."""
    return int(group[[*columns]].notna().any(axis=1).sum())


def less_control(frame: pd.DataFrame) -> pd.DataFrame:
    """Every outcome of an edit less that of the edit in the random place of the same planting."""
    edited = frame[frame["covered"].notna()].set_index(["kind", "seed"])
    control = edited[edited["place"] == CONTROL][[*OUTCOMES]]
    parts = [
        group[[*OUTCOMES]].sub(control).assign(place=place)
        for place, group in edited.groupby("place", sort=False)
        if place != CONTROL
    ]
    return pd.concat(parts)


def correlations(frame: pd.DataFrame) -> list[str]:
    """Spearman's rank correlation over the edited places of each planting, its mean over plantings."""
    edited = [group for _, group in frame[frame["covered"].notna()].groupby(["kind", "seed"])]
    rows = []
    for quality in ("auroc", "covered"):
        for outcome in OUTCOMES:
            each = [_rank_correlation(group[quality].tolist(), group[outcome].tolist()) for group in edited]
            rows.append([quality, outcome, _interval(each)])
    return _table(["quality of the place", "outcome", "Spearman, mean over plantings"], rows)


def provenance(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    keys = ("settings", "versions", "truth", "places", "learning_rates")
    return {f"{cell['kind']}, seed {cell['seed']}": {key: cell.get(key) for key in keys} for cell in cells}


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """None where either does not vary."""
    return None if min(len(set(a)), len(set(b))) < 2 else float(spearmanr(a, b).statistic)


def _number(value: float | None) -> float:
    """NaN where a test failed."""
    return math.nan if value is None else value


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _interval(values: Sequence[float | None]) -> str:
    """Mean and interval over plantings."""
    found = torch.tensor([value for value in values if value is not None and value == value], dtype=torch.float64)
    if len(found) == 0:
        return ""
    low, high = bootstrap(found)
    return f"{float(found.mean()):.2f} [{float(low):.2f}, {float(high):.2f}]"


def _rows(frame: pd.DataFrame) -> list[list[str]]:
    return [
        [str(name), *(f"{value:.2f}" for value in row)] for name, row in zip(frame.index, frame.to_numpy(), strict=True)
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows)]
