"""docs/results.md, from the CSV files alone: every number and every verdict in it is computed here."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from paper.markdown import interval, markdown, signed
from paper.protocol import DEFINITIONS, run_as, search, took, where
from paper.setup import LOCALIZATIONS
from paper.summary import LEAST, LESS, TWO, compared, counted, in_short, task_by_task
from paper.tables import COLUMNS, TABLES

PUBLISHED = Path(__file__).parent / "published.csv"

BESIDE = {"forget, trained prompt": "trained prompt", "retain, multiple choice": "retained, multiple choice"}
"""What a comparison must be read with: one edit may simply have forgotten more, or broken the format. Not counted."""

ABOUT_DEEPER = """\
In the shipped model the first MLP looks up nearly every fact, so that nearly every localization contains it. The deeper
model, `mu.testbed.load(deeper=True)`, is the shipped one, grown by two layers and trained on along routes that divide
the facts among several MLPs and have layers above extract them; its [card](testbed.md#model-card-the-deeper-model) says
how far that went: with all of those MLPs silent little is known, with any one of them left nearly everything is. Of the
experiments, injection alone was run on it, of the sport and of 64 CounterFact facts; the budget of an edit is the
same."""

DIFFERENCES = """\
Each localization minus fact lookup, on the same facts and seeds: ✓ where the paper's ordering holds, ✗ where it is
reversed; the first two columns are not counted. Terms are as under [What was run](#what-was-run)."""

NOT_RUN = (
    "**The experiments of the paper have not been run in full yet.** `examples/reproduce_paper.py` runs them on the "
    "shipped model, and writes their tables here. What follows is the study in which the truth is known."
)


def page(folder: Path) -> str:
    """The page of the CSV files in a folder: of a run of the paper's experiments, and of the planted study."""
    paper = _paper(folder / "reproduction") if (folder / "reproduction" / "results.csv").exists() else [NOT_RUN]
    blocks = ["# Results", *paper, *_deeper(folder / "deeper"), *_planted(folder / "planted")]
    return "\n\n".join(blocks) + "\n"


def _paper(folder: Path) -> Iterator[str]:
    frames, about = _frames(folder), provenance(folder)
    results = frames["results"]
    yield (
        "The experiments of [Guo et al. 2025](https://arxiv.org/abs/2410.12949), whether it matters *where* knowledge"
        " is edited, on the shipped model. `examples/write_results.py` writes this page from the CSV files in"
        " `docs/results`, which the scripts named here wrote; no number in it is typed."
    )
    every, same = compared(frames["differences"], frames["masks"])
    yield "## In short"
    yield from _shown(in_short(results, every))
    yield from _reading(folder.parent)
    yield "## What was run"
    yield DEFINITIONS
    yield from run_as(results, about)
    yield from took(frames["costs"], _frames(folder.parent / "deeper")["costs"], _plantings(folder.parent / "planted"))
    yield from where(frames["masks"], frames["edits"])
    yield from search(frames["edits"], about["setup"])
    yield from _tables(results)
    yield from _ordering(every, same)
    yield from _against_published(results)
    yield from _sizes(frames["sizes"])
    yield from _stages(results)
    yield from _pictures(folder)


def _deeper(folder: Path) -> Iterator[str]:
    """The same experiments on the other model of the package."""
    if not (folder / "results.csv").exists():
        return
    frames, about = _frames(folder), provenance(folder)
    every, same = compared(frames["differences"], frames["masks"])
    yield "## The deeper model"
    yield ABOUT_DEEPER
    yield "Comparisons in which the paper's ordering holds / that cannot say / in which it is reversed, as above:"
    yield from _shown(task_by_task(frames["results"], every))
    yield from kept_and_relearned(frames["results"])
    yield "### What was run on it"
    yield from run_as(frames["results"], about)
    yield from where(frames["masks"], frames["edits"])
    yield _trained_to_look_up(frames["masks"])
    yield from search(frames["edits"], about["setup"])
    yield "### The paper's ordering, by task"
    yield DIFFERENCES
    yield from _differences(every, same)


def kept_and_relearned(results: pd.DataFrame) -> Iterator[str]:
    """Whether an edit is robust because it broke more: a rank correlation over places for each task and mode."""
    kept, relearned = "retain, multiple choice", "relearning, multiple choice, less nobody"
    places = results[results["row"].isin(LOCALIZATIONS) & results["test"].isin([kept, relearned])]
    if not {kept, relearned} <= {*places["test"]}:
        return
    found = []
    for (task, mode), some in places.groupby(["task", "mode"], sort=False):
        means = some.pivot_table(index="row", columns="test", values="value")
        found.append(f"{task}, {TWO[str(mode)]}, {means[kept].corr(means[relearned], method='spearman'):.2f}")
    yield (
        "Whether an edit is robust because it broke more: over a task's places, the rank correlation (Spearman) of "
        "retained multiple choice with what is relearned, asked by multiple choice, less nobody (columns above), is, "
        f"for {'; for '.join(found)}. Above 0, edits that keep more have more relearned."
    )


def _trained_to_look_up(masks: pd.DataFrame) -> str:
    """How many of the MLPs that were trained to look facts up each localization contains."""
    from testbed.deeper_route import FIRST, UPPER

    truth = [f"L{layer}MLP" for layer in range(FIRST, UPPER)]
    lines = []
    for task, some in masks.groupby("task", sort=False):
        chosen = {one.localization: one.components.split() for one in some.itertuples()}
        counts = {name: f"{len({*own} & {*truth})} ({len(own)})" for name, own in chosen.items()}
        lines.append(f"{task}: {', '.join(f'{name} {counts[name]}' for name in LOCALIZATIONS if name in counts)}")
    return (
        f"Trained to look facts up were {', '.join(truth)}. Of these {len(truth)}, each localization contains so many "
        f"(of so many components in all): {'; '.join(lines)}."
    )


def _shown(blocks: Iterable[str | pd.DataFrame]) -> Iterator[str]:
    yield from (markdown(block) if isinstance(block, pd.DataFrame) else block for block in blocks)


def _frames(folder: Path) -> dict[str, pd.DataFrame]:
    """Of a run's CSV files; those that a run has nothing for are empty."""
    found = {path.stem: read(path) for path in sorted(folder.glob("*.csv"))}
    differences = pd.DataFrame(columns=["task", "mode", "row", "test", "difference", "low", "high"])
    costs = pd.DataFrame(columns=["task", "work", "pieces", "CPU seconds"])
    edits = pd.DataFrame(columns=["task", "mode", "localization", "seed", "learning rate", "components"])
    return {"differences": differences, "sizes": pd.DataFrame(), "costs": costs, "edits": edits, **found}


def _plantings(folder: Path) -> pd.DataFrame:
    return read(folder / "plantings.csv") if (folder / "plantings.csv").exists() else pd.DataFrame()


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, comment="#")


def provenance(folder: Path) -> dict[str, Any]:
    """The first line of results.csv."""
    return json.loads((folder / "results.csv").read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))


def _tables(results: pd.DataFrame) -> Iterator[str]:
    yield "## Tables 1 to 4"
    yield (
        "In brackets, where there is a published number: Gemma-7B, in the workshop version (retained multiple choice: "
        "from the authors' notebook). The paper's other knowledge is MMLU. *never knew*: the same model, trained "
        "without basketball, is what perfect forgetting looks like."
    )
    published = pd.read_csv(PUBLISHED)
    published = published[published["source"].str.startswith("workshop")]
    for title, (task, mode) in TABLES.items():
        chosen = _of(results, task, mode)
        if len(chosen):
            yield f"### {title.capitalize()}: {TWO[mode]}, {task}"
            theirs = _of(published, task, mode)
            yield markdown(_wide(chosen, list(COLUMNS.values()), theirs))


def _wide(own: pd.DataFrame, tests: Iterable[str], published: pd.DataFrame) -> pd.DataFrame:
    """A line for each row: value [low, high] (published)."""
    lines = []
    for row in dict.fromkeys(own["row"]):
        if " after " not in row:
            lines.append({"": row} | {test: _cell(own, published, row, test) for test in tests})
    return pd.DataFrame(lines)


def _cell(own: pd.DataFrame, published: pd.DataFrame, row: str, test: str) -> str:
    ours, theirs = (frame[(frame["row"] == row) & (frame["test"] == test)] for frame in (own, published))
    text = "" if ours.empty else interval(ours.iloc[0])
    return text if theirs.empty else f"{text} ({theirs.iloc[0]['value']:.2f})"


def _ordering(every: pd.DataFrame, same: set[tuple[str, str]]) -> Iterator[str]:
    yield "## Does the paper's ordering hold here?"
    yield (
        "The paper: after edits at fact lookup, less is found in other formats, by relearning and by probes than after "
        "edits elsewhere (it has no erasure of 64 athletes or of CounterFact, says that relearning a whole sport does "
        "not tell places apart, and finds random MLPs no worse on single athletes' relearning). "
        "Below, each other localization minus fact lookup, on the same facts and seeds: positive, and "
        "the paper's ordering holds (✓), negative, and it is reversed (✗); an interval that contains 0, or a "
        f"difference below {LEAST}, does not say. The first two columns are not counted: where less is left in the "
        "trained prompt already, or the format is broken for what was to be kept, the others do not compare like with "
        "like."
    )
    yield from _differences(every, same)


def _differences(every: pd.DataFrame, same: set[tuple[str, str]]) -> Iterator[str]:
    """Counted, and each task's."""
    every = every[every["test"].isin({**BESIDE, **LESS})]
    found = every[every["test"].isin(LESS)]
    if same:
        named = ", ".join(f"{localization} ({task})" for task, localization in sorted(same))
        yield f"Left out, since they chose the same components as fact lookup: {named}."
    yield _sentence(found)
    counts = counted(found, "row")
    order = [name for name in LOCALIZATIONS if name in counts.index]
    yield markdown(counts.loc[order].reset_index().rename(columns={"row": "compared with"}))
    for (task, mode), some in every.groupby(["task", "mode"], sort=False):
        yield f"### {task}, {TWO[str(mode)]}"
        table = [{"": row} | _line(lines) for row, lines in some.groupby("row", sort=False)]
        yield markdown(pd.DataFrame(table).fillna(""))


def _line(lines: pd.DataFrame) -> dict[str, str]:
    marks = {"holds": " ✓", "reversed": " ✗", "cannot say": ""}
    named = {one.test: one for one in lines.itertuples()}
    beside = {name: signed(named[test]) for test, name in BESIDE.items() if test in named}
    return beside | {
        name: signed(named[test]) + marks[named[test].verdict] for test, name in LESS.items() if test in named
    }


def _sentence(found: pd.DataFrame) -> str:
    """What came out, in one sentence, and for each kind of test."""
    parts = []
    for test, name in [("", "in all"), *LESS.items()]:
        some = found if not test else found[found["test"] == test]
        n = some["verdict"].value_counts()
        if len(some):
            parts.append(f"{name}: holds in {n.get('holds', 0)} of {len(some)}, reversed in {n.get('reversed', 0)}")
    return f"Comparisons of one localization with fact lookup, in one task and mode, by one test: {'; '.join(parts)}."


def _against_published(results: pd.DataFrame) -> Iterator[str]:
    yield "## Injection, next to the published means"
    yield (
        "In brackets: means over Gemma-7B, Gemma-2-9B and Llama-3-8B and over the tasks named, one run each, from the "
        "result files that the authors published with the ICML version: relearning is by LoRA, after 20 steps, and "
        "*sport* means three sports."
    )
    published = pd.read_csv(PUBLISHED)
    published = published[published["source"].str.startswith("ICML")]
    for tasks in dict.fromkeys(published["task"]):
        theirs = published[published["task"] == tasks]
        for task in tasks.split(" and "):
            chosen = _of(results, task, "inject")
            if len(chosen):
                tests = [test for test in dict.fromkeys(theirs["test"]) if test in set(chosen["test"])]
                yield f"### {task} (published: {tasks})"
                yield markdown(_wide(chosen, tests, theirs))


def _sizes(sizes: pd.DataFrame) -> Iterator[str]:
    if len(sizes):
        yield "## Weight masks: how much is left after setting weights to zero"
        yield (
            "Erasure of the whole sport by learned weight masks (no search: the library's defaults), made into edits "
            "that set the k weights with the smallest numbers to zero; *at random*: any k weights of the same "
            "components. Fewer seeds than above may have been run."
        )
        lines = []
        for (name, how, k), some in sizes.groupby(["localization", "how", "weights"], sort=False):
            values = {one["test"]: interval(one) for _, one in some.iterrows()}
            lines.append({"localization": name, "": how, "k": int(k), **values})
        yield markdown(pd.DataFrame(lines).fillna(""))


def _stages(results: pd.DataFrame) -> Iterator[str]:
    stages = results[results["row"].str.contains(" after ")]
    if len(stages):
        yield "## In sequence: 64 CounterFact facts as 4 x 16"
        yield "All 64 facts are asked after each part; earlier parts are not rehearsed."
        tests = ["forget, trained prompt", "forget, multiple choice", "forget, paraphrases", "retain, trained prompt"]
        for mode, some in stages.groupby("mode", sort=False):
            yield f"### {TWO[str(mode)].capitalize()}"
            lines = [{"": row} | _values(own, tests) for row, own in some.groupby("row", sort=False)]
            yield markdown(pd.DataFrame(lines).fillna(""))


def _values(own: pd.DataFrame, tests: Iterable[str]) -> dict[str, str]:
    return {one["test"]: interval(one) for _, one in own.iterrows() if one["test"] in tests}


def _pictures(folder: Path) -> Iterator[str]:
    found = sorted(folder.glob("*.png"))
    if found:
        yield "## Figures"
        for path in found:
            yield f"![{path.stem}](results/reproduction/{path.name.replace(' ', '%20')})"


def _reading(folder: Path) -> Iterator[str]:
    """What no table can say, in a file of its own."""
    if (folder / "reading.md").exists():
        yield (folder / "reading.md").read_text(encoding="utf-8").strip()


def _planted(folder: Path) -> Iterator[str]:
    """What `planted_study.py` wrote from its own tables."""
    if (folder / "planted.md").exists():
        yield "## Where the truth is known"
        yield (folder / "planted.md").read_text(encoding="utf-8").strip()
        for path in sorted(folder.glob("*.png")):
            yield f"![{path.stem}](results/planted/{path.name.replace(' ', '%20')})"


def _of(frame: pd.DataFrame, task: str, mode: str) -> pd.DataFrame:
    return frame[(frame["task"] == task) & (frame["mode"] == mode)]
