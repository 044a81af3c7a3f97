"""What was run, where, and with which learning rates: the parts of the page that say so."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from paper.markdown import markdown
from paper.setup import LOCALIZATIONS, OWN
from paper.summary import TWO

DEFINITIONS = """\
*Tasks*: forget which sport basketball players play (sport), or the first 16 or 64 athletes; 16 or 64 of the model's own
general facts, in the schema of CounterFact (the 64 also in four parts, one after the other). *Erasure* makes the answer
unlikely, *injection* teaches another one: golf, a random other sport, the record's false answer.

*Places*, by localization: fact lookup is MLPs, for sports those under which probes begin to read the sport at the name,
for CounterFact those whose output the heads that extract answers read. Attribution patching and causal tracing choose
attention layers and MLPs, or MLPs alone, by score. Controls: random layers, random MLPs, all MLPs, everything.

*Accuracy* is the paper's: of sports the probability among four, the mean over facts (chance 0.25); of CounterFact
answers the probability among all tokens (chance 0); by multiple choice that of the letter among four. Other knowledge
is multiple choice about what the task does not touch: general knowledge, for CounterFact sports. *Less nobody*: how
much more relearning finds about the facts than, with the same questions, about made-up subjects, for an attack can
teach an answer. Relearned is one half of the facts, asked is the other. *Probes* read the sport at each layer (chance
0.33)."""


def run_as(results: pd.DataFrame, about: dict[str, Any]) -> Iterator[str]:
    setup, seeds = about["setup"], about["seeds"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    model = f"the {setup['model']} model" if setup["model"] in OWN else f"`{setup['model']}`"
    chosen = (
        "each localization's own, by the search below"
        if setup["paper"] is None
        else f"with the coefficients, those of the paper for {setup['paper']}"
    )
    yield (
        f"Model: {model}, fingerprint `{setup['fingerprint']}`. Seeds: {len(seeds)}; they differ in the order of "
        "batches, in random places, and in which half of the facts attacks see. "
        f"Edits of {setup['steps']} steps (single athletes: {setup['athletes_steps']}; each part "
        f"of a sequence: {max(1, setup['steps'] // 2)}) of {setup['batch_size']} prompts a term and "
        f"{setup['text_batch_size']} rows of text; learning rates: {chosen}. Relearning: all weights, "
        f"{setup['relearn_steps']} steps of {setup['relearn_batch_size']} facts at {setup['relearn_rate']:g}, the best "
        f"point of the curve. Brackets: 95 %, over facts and seeds together. Versions: {versions}."
    )
    n = results[results["test"] == "forget, trained prompt"].groupby("task", sort=False)["n"].first()
    yield "Tested facts to forget: " + ", ".join(f"{task} {int(count)}" for task, count in n.items()) + "."


def took(costs: pd.DataFrame, deeper: pd.DataFrame, plantings: pd.DataFrame) -> Iterator[str]:
    """CPU time of the workers of all studies."""
    if len(costs):
        parts = {
            "the experiments": costs["CPU seconds"].sum(),
            "those on the deeper model": deeper["CPU seconds"].sum(),
            "the planted study": plantings.filter(like="seconds, ").sum().sum(),
        }
        total = sum(parts.values()) / 60
        shown = ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in parts.items() if seconds)
        yield (
            f"`make results` writes this page from nothing. That takes {total:.0f} CPU minutes ({shown}), which two "
            f"processes share: {total / 2:.0f} minutes on two cores, and some more for tables and figures."
        )


def search(edits: pd.DataFrame, setup: dict[str, Any]) -> Iterator[str]:
    """The rates that were chosen."""
    first = edits[edits["learning rate"].notna()] if len(edits) else edits
    first = first[first["seed"] == first["seed"].min()] if len(first) else first
    if setup["paper"] is not None or not len(first):
        return
    rates = setup["learning_rates"]
    own = first[~first["task"].str.endswith("sequential")]
    edge = int((own["learning rate"] == max(rates)).sum())
    yield "### The search"
    yield (
        f"For every localization the same: rates {', '.join(f'{rate:g}' for rate in rates)}, with seed 0, scored by "
        "the trained prompt alone, retained less forgotten, on facts that no number here uses. The coefficient of "
        "forgetting is 1; the paper tunes it. All seeds take what seed 0 chose, but random places, which are others "
        "with each seed, are searched anew; below are those of the first seed. "
        f"{edge} of {len(own)} choices are the highest rate. No interval on this page covers this choice."
    )
    names = first["task"] + ", " + first["mode"].map(TWO)
    table = first.assign(column=names).pivot_table(index="localization", columns="column", values="learning rate")
    order = [name for name in LOCALIZATIONS if name in table.index]
    table = table.reindex(index=order, columns=list(dict.fromkeys(names)))
    shown = table.map(lambda rate: "" if pd.isna(rate) else f"{rate:g}")
    yield markdown(shown.reset_index().rename(columns={"localization": ""}))


def where(masks: pd.DataFrame, edits: pd.DataFrame) -> Iterator[str]:
    yield "### Where"
    drawn = edits[edits["localization"] == "random mlps"] if len(edits) else edits
    means = drawn.groupby("task", sort=False)["shared"].mean() if "shared" in drawn else {}
    shared = ", ".join(f"{task} {mean:.1f}" for task, mean in means.items())
    yield (
        "All cover at most as many weights as fact lookup, but for all MLPs and no localization. Random places, drawn "
        "anew for each seed, are in `edits.csv`."
        + (f" Of random MLPs so many are fact lookup's own, on average: {shared}." if shared else "")
    )
    lines = []
    for (task, part), some in masks.groupby(["task", "part"], sort=False):
        chosen = {one.localization: one.components for one in some.itertuples()}
        about = {"": f"{task}, {part.replace('-', ' ')}" if (masks["task"] == task).sum() > len(some) else task}
        lines.append(about | {name: chosen[name] for name in LOCALIZATIONS if name in chosen})
    yield markdown(pd.DataFrame(lines))
