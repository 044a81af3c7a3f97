"""What came out, in two small tables: whether the paper's ordering holds, and the means over tasks."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from reproduction.setup import LOCALIZATIONS

LESS = {
    "forget, multiple choice": "multiple choice",
    "forget, paraphrases": "paraphrases",
    "relearning, less nobody": "relearning, less nobody",
    "relearning, multiple choice, less nobody": "relearning, asked by multiple choice, less nobody",
    "probe": "probe, best layer",
}
"""Test -> its name: what should be low after forgetting, and lowest, says the paper, after fact lookup."""

SHOWN = {
    "forget, trained prompt": "trained prompt",
    "retain, trained prompt": "retained",
    "forget, multiple choice": "multiple choice",
    "retain, multiple choice": "retained, multiple choice",
    "forget, paraphrases": "paraphrases",
    "relearning, multiple choice, less nobody": "relearning, asked by multiple choice, less nobody",
    "other knowledge": "other knowledge",
}
"""Columns of the means."""

TWO = {"erase": "erasure", "inject": "injection"}

KINDS = {
    "other MLPs": ("attribution patching mlps", "causal tracing mlps", "random mlps", "all mlps"),
    "attention too": ("attribution patching", "causal tracing", "random", "nonlocalized"),
}
"""What localizations may choose from: fact lookup chooses MLPs."""

LEAST = 0.01
"""A smaller difference says nothing, whatever its interval."""

VERDICTS = ["holds", "cannot say", "reversed"]


def compared(differences: pd.DataFrame, masks: pd.DataFrame) -> tuple[pd.DataFrame, set[tuple[str, str]]]:
    """Every comparison with fact lookup and its verdict; and the (task, localization) that are left out of them, since
    they chose the same components."""
    every = differences.assign(verdict=[_verdict(one) for one in differences.itertuples()])
    same = {(m.task, m.localization) for m in masks.itertuples() if m.weights and _same(masks, m)}
    kept = [(task, row) not in same for task, row in zip(every["task"], every["row"], strict=True)]
    return every[kept], same


def counted(found: pd.DataFrame, by: str | list[str]) -> pd.DataFrame:
    """How many of the comparisons hold, and how many are reversed, for each value of a column."""
    counts = found.groupby([*([by] if isinstance(by, str) else by), "verdict"], sort=False).size()
    return counts.unstack(fill_value=0).reindex(columns=VERDICTS, fill_value=0)


def in_short(results: pd.DataFrame, every: pd.DataFrame) -> Iterator[str | pd.DataFrame]:
    """Text and tables."""
    found = every[every["test"].isin(LESS)]
    kinds = {name: kind for kind, names in KINDS.items() for name in names}
    found = found.assign(kind=found["row"].map(kinds))
    yield (
        "Does less knowledge remain after edits at fact lookup than after edits elsewhere, as the paper says? Counted "
        "are comparisons of one localization with fact lookup, in one task, by one test (other formats, relearning, "
        "probes). *Holds* and *reversed*: the 95 % interval of the difference excludes 0, on the side of the paper or "
        "on the other; one in forty on each side would do so by chance."
    )
    lines = []
    for (mode, kind), some in found.groupby(["mode", "kind"], sort=False):
        choice = some[some["test"] == "forget, multiple choice"]["verdict"].value_counts()
        n = some["verdict"].value_counts()
        line: dict[str, Any] = {"": TWO[str(mode)], "compared with": kind}
        lines.append(line | {v: int(n.get(v, 0)) for v in VERDICTS} | {"multiple choice alone": _numbers(choice)})
    yield pd.DataFrame(lines)
    yield "*Multiple choice alone*: holds / cannot say / reversed. Means over the tasks, each localization:"
    for mode, some in results.groupby("mode", sort=False):
        yield f"### {TWO[str(mode)].capitalize()}, means over {some['task'].nunique()} tasks"
        yield _means(some)


def _means(results: pd.DataFrame) -> pd.DataFrame:
    """Of tests that every task has."""
    rows = ["original", *LOCALIZATIONS]
    chosen = results[results["row"].isin(rows) & results["test"].isin(SHOWN)]
    means = chosen.pivot_table(index="row", columns="test", values="value").reindex(index=rows, columns=list(SHOWN))
    shown = means.dropna(how="all").dropna(axis=1, how="all").map("{:.2f}".format)
    return shown.rename(columns=SHOWN).reset_index().rename(columns={"row": ""})


def _numbers(counts: Any) -> str:
    return " / ".join(str(counts.get(verdict, 0)) for verdict in VERDICTS)


def _verdict(one: Any) -> str:
    if one.low <= 0 <= one.high or abs(one.difference) < LEAST:
        return "cannot say"
    return "holds" if one.difference > 0 else "reversed"


def _same(masks: pd.DataFrame, mask: Any) -> bool:
    """Whether a localization chose, in every part of its task, what fact lookup chose."""
    if mask.localization == "fact lookup":
        return False
    own = masks[(masks["task"] == mask.task) & (masks["localization"] == mask.localization)]
    lookup = masks[(masks["task"] == mask.task) & (masks["localization"] == "fact lookup")]
    return set(zip(own["part"], own["components"], strict=True)) == set(
        zip(lookup["part"], lookup["components"], strict=True)
    )
