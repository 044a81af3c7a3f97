"""What takes how long when an edit of the shipped model is evaluated.

    python benchmarks/evaluate.py          all formats of one edit, and the quick audit; two threads
    python benchmarks/evaluate.py --full   the full audit too

Seconds of the wall clock, one run. Rows: the original, an edit of the first MLP, a random control, and the model that
never knew. Bars: all formats of one edit in 5 s; the quick audit of original, edit and never-knew model in 180 s.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import torch

import mechunlearn as mu
from mechunlearn.auditing import Plan

editor = partial(mu.edit.finetune, progress=False)
BARS = {"all formats": 5.0, "quick audit": 180.0}


def main() -> None:
    torch.set_num_threads(2)
    model = mu.testbed.load()
    task = mu.tasks.sports_facts(model, forget="basketball")
    edit = editor(model, task, mu.ComponentMask.of(["L0MLP"], mu.shape(model)))
    _formats(model, task, edit)
    _audit("quick audit", mu.auditing.quick, model, task, edit)
    if "--full" in sys.argv:
        _audit("full audit", mu.auditing.full, model, task, edit)


def _formats(model: mu.model.Model, task: mu.Task, edit: mu.Edit) -> None:
    """Both sides of every format; the second time, so that nothing is loaded meanwhile."""
    tests = {
        f"{side}, {name}": partial(mu.evaluate.in_format, name=name, side=side)
        for name in task.formats
        for side in ("forget", "retain")
    }
    reports = [mu.evaluate.compare(model, task, {"edit": edit}, metrics=tests, progress=False) for _ in range(2)]
    frame = reports[1].to_frame()
    _say("all formats", float(frame.loc[frame["row"] == "edit", "seconds"].sum()), f"{len(tests)} columns of one edit")


def _audit(name: str, budget: Callable[[mu.Task], Plan], model: mu.model.Model, task: mu.Task, edit: mu.Edit) -> None:
    never = mu.testbed.load(without="basketball")
    started = time.perf_counter()
    found = mu.audit(model, task, edit, editor=editor, budget=budget, never_knew=never)
    took, frame = time.perf_counter() - started, found.report.to_frame()
    control = float(frame.loc[frame["row"] == "random", "seconds"].sum())
    _say(name, took, f"with the random control, whose tests take {control:.1f} s of it, and whose edit is made here")
    table = frame.pivot_table(index="test", columns="row", values="seconds", aggfunc="sum", sort=False)
    print(table.loc[table.sum(axis=1).sort_values(ascending=False).index].round(2).to_string())
    print(found, flush=True)


def _say(name: str, seconds: float, what: str) -> None:
    bar = f" (bar: {BARS[name]:.0f} s)" if name in BARS else ""
    print(f"{name:12} {seconds:7.1f} s{bar}   {what}", flush=True)


if __name__ == "__main__":
    main()
