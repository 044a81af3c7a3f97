"""What came out, in short: sentences and small tables, computed."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from paper.setup import LOCALIZATIONS

LESS = {
    "forget, multiple choice": "multiple choice",
    "forget, paraphrases": "paraphrases",
    "relearning, less nobody": "relearning, less nobody",
    "relearning, multiple choice, less nobody": "relearning, asked by multiple choice, less nobody",
    "probe, mean over layers": "probe, mean over layers",
}
"""Test -> its name: what should be low after forgetting, and lowest, says the paper, after fact lookup."""

COST = ("forget, trained prompt", "retain, trained prompt", "retain, multiple choice", "other knowledge")
"""What must be alike for two edits to be compared like with like."""

ALIKE = 0.05
"""By how much each of these may differ."""

SHOWN = {
    "forget, trained prompt": "trained prompt",
    "retain, trained prompt": "retained",
    "forget, multiple choice": "multiple choice",
    "retain, multiple choice": "retained, multiple choice",
    "forget, paraphrases": "paraphrases",
    "relearning, less nobody": "relearning, less nobody",
    "relearning, multiple choice, less nobody": "relearning, asked by multiple choice, less nobody",
}
"""Columns of the means."""

ATTACKS = {
    "relearning": "relearning",
    "relearning, less nobody": "relearning, less nobody",
    "relearning, multiple choice": "relearning, asked by multiple choice",
    "probe": "a probe at its best layer",
    "probe, mean over layers": "a probe, mean over layers",
}
"""What is shown next to the model that never knew."""

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
    """Every comparison with fact lookup, its verdict, and whether both edits cost and forget alike; and the
    (task, localization) that are left out of them, since they chose the same components."""
    every = differences.assign(verdict=[_verdict(one) for one in differences.itertuples()])
    costs = every[every["test"].isin(COST)]
    worst = costs.assign(size=costs["difference"].abs()).groupby(["task", "mode", "row"])["size"].max()
    found = [worst.get((one.task, one.mode, one.row), float("inf")) for one in every.itertuples()]
    every = every.assign(alike=[size <= ALIKE for size in found])
    same = {(m.task, m.localization) for m in masks.itertuples() if m.weights and _same(masks, m)}
    kept = [(task, row) not in same for task, row in zip(every["task"], every["row"], strict=True)]
    return every[pd.Series(kept, index=every.index, dtype=bool)], same


def counted(found: pd.DataFrame, by: str) -> pd.DataFrame:
    """How many of the comparisons hold, and how many are reversed, for each value of a column."""
    counts = found.groupby([by, "verdict"], sort=False).size().unstack(fill_value=0)
    return counts.reindex(columns=VERDICTS, fill_value=0)


NUMBERS = """\
Numbers: comparisons in which the paper's ordering holds / that cannot say / in which it is reversed. Each compares one
localization with fact lookup in one task by one test. An ordering holds, or is reversed, where the 95 % interval of the
difference excludes 0. Verdicts depend on each other: all of a task share fact lookup's edits, tests agree with each
other, the search for a learning rate has no interval, and so few seeds understate how much runs differ. Read them as a
tally."""


def in_short(results: pd.DataFrame, every: pd.DataFrame) -> Iterator[str | pd.DataFrame]:
    """Text and tables."""
    found = every[every["test"].isin(LESS)]
    if len(found):
        yield "\n".join(f"- {sentence}" for sentence in _sentences(results, found))
        yield _verdicts(found)
        yield NUMBERS
    yield from _beside_the_twin(results)
    for mode, some in results.groupby("mode", sort=False):
        means, tasks = _means(some)
        yield f"### {TWO[str(mode)].capitalize()}: means over {', '.join(tasks)}"
        yield means


def task_by_task(results: pd.DataFrame, every: pd.DataFrame) -> Iterator[str | pd.DataFrame]:
    """The verdicts of each task, and its means: where tasks differ, means over them hide it."""
    found = every[every["test"].isin(LESS)]
    tallies = []
    for (task, mode), some in found.groupby(["task", "mode"], sort=False):
        tallies.append({"": f"{task}, {TWO[str(mode)]}", "where edits cost alike": _numbers(some[some["alike"]])})
        tallies[-1] |= {"all": _numbers(some)}
    yield pd.DataFrame(tallies)
    for (task, mode), some in results.groupby(["task", "mode"], sort=False):
        yield f"### Means: {task}, {TWO[str(mode)]}"
        yield _wide(some, {**SHOWN, "probe": ATTACKS["probe"]}, ["original", *LOCALIZATIONS])


def _sentences(results: pd.DataFrame, found: pd.DataFrame) -> Iterator[str]:
    alike = found[found["alike"]]
    yield (
        "Less is left after edits at fact lookup, says the paper. Where two edits forget the trained prompt and keep "
        f"what is retained alike (to within {ALIKE}), that holds in {_of(alike)}."
    )
    yield (
        f"Without that condition it holds in {_of(found)}. There, one of two edits may simply have forgotten "
        "more of the trained prompt, or broken more of what was to be kept."
    )
    mlps = found[found["row"] == "random mlps"]
    if len(mlps):
        yield (
            f"Against the control, as many MLPs at random, it holds in {_of(mlps[mlps['alike']])}. Without that "
            f"condition, it holds in {_of(mlps)}."
        )
    yield from _gone(results[(results["task"] == "sport") & (results["mode"] == "erase")])
    left = results[
        (results["mode"] == "erase") & (results["row"] == "fact lookup") & (results["test"] == "forget, trained prompt")
    ]
    if len(left):
        shown = ", ".join(f"{one.task} {one.value:.2f}" for one in left.itertuples())
        yield f"What erasure at fact lookup leaves in the trained prompt itself: {shown}."


def _gone(erased: pd.DataFrame) -> Iterator[str]:
    """What attacks find after erasure in any place, and in the model that never knew."""
    for test, name in ATTACKS.items():
        own = erased[(erased["test"] == test) & erased["row"].isin(LOCALIZATIONS)]["value"]
        twin = erased[(erased["test"] == test) & (erased["row"] == "never knew")]["value"]
        if test in ("relearning", "probe") and len(own) and len(twin):
            yield (
                f"After erasure of the whole sport, {name} finds {own.min():.2f} to {own.max():.2f}, depending on "
                f"where; in a model that never knew, {twin.iloc[0]:.2f}."
            )


def _of(found: pd.DataFrame) -> str:
    n = found["verdict"].value_counts()
    return (
        f"{n.get('holds', 0)} of {len(found)} comparisons and is reversed in {n.get('reversed', 0)}; "
        f"{n.get('cannot say', 0)} cannot say"
    )


def _verdicts(found: pd.DataFrame) -> pd.DataFrame:
    kinds = {name: kind for kind, names in KINDS.items() for name in names}
    found = found.assign(kind=found["row"].map(kinds))
    lines = []
    for (mode, kind), some in found.groupby(["mode", "kind"], sort=False):
        choice = some[some["test"] == "forget, multiple choice"]
        line = {"": TWO[str(mode)], "compared with": kind, "where edits cost alike": _numbers(some[some["alike"]])}
        lines.append(line | {"all": _numbers(some), "all, multiple choice alone": _numbers(choice)})
    return pd.DataFrame(lines)


def _beside_the_twin(results: pd.DataFrame) -> Iterator[str | pd.DataFrame]:
    """Attacks on every edit of the task in which a model that never knew stands beside, erasure then injection."""
    twin = results[results["row"] == "never knew"]
    for (task, mode), _ in twin.groupby(["task", "mode"], sort=False):
        own = results[(results["task"] == task) & (results["mode"] == mode)]
        yield f"### What attacks find after {TWO[str(mode)]}: {task}, beside a model that never knew"
        yield _wide(own, ATTACKS, ["original", "never knew", *LOCALIZATIONS])


def _means(results: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Over the tasks that have every localization; and which these are."""
    rows = [row for row in LOCALIZATIONS if row in set(results["row"])]
    tasks = [str(task) for task, some in results.groupby("task", sort=False) if {*rows, "original"} <= set(some["row"])]
    return _wide(results[results["task"].isin(tasks)], SHOWN, ["original", *rows]), tasks


def _wide(results: pd.DataFrame, tests: dict[str, str], rows: Sequence[str]) -> pd.DataFrame:
    """Means of the values: a line for each row, a column for each test."""
    chosen = results[results["row"].isin(rows) & results["test"].isin(tests)]
    means = chosen.pivot_table(index="row", columns="test", values="value").reindex(index=rows, columns=list(tests))
    shown = (
        means.dropna(how="all").dropna(axis=1, how="all").map(lambda value: "" if pd.isna(value) else f"{value:.2f}")
    )
    return shown.rename(columns=tests).reset_index().rename(columns={"row": ""})


def _numbers(found: pd.DataFrame) -> str:
    counts = found["verdict"].value_counts()
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
