"""Is it really gone? Every test and attack on one edit, with what a model finds there that never knew."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mechunlearn.evaluate import audit_frames, audit_text
from mechunlearn.evaluate.audit_control import elsewhere, random_rows
from mechunlearn.evaluate.audit_numbers import EDIT, NEVER_KNEW, Finding, findings
from mechunlearn.evaluate.budgets import quick
from mechunlearn.evaluate.compare import compare
from mechunlearn.evaluate.plan import Plan
from mechunlearn.evaluate.report import Report
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit

if TYPE_CHECKING:
    from pandas import DataFrame


def audit(
    model: Model,
    task: Task,
    edit: Edit | Sequence[Edit],
    *,
    budget: Callable[[Task], Plan] = quick,
    never_knew: Model | Callable[[], Model] | None = None,
    random: int = 1,
    others: Mapping[str, Edit | Sequence[Edit]] | None = None,
    seeds: Sequence[int] = (0,),
    results: str | Path | None = None,
    executor: Executor | None = None,
    load: Callable[[], Model] | None = None,
    progress: bool = True,
) -> "Audit":
    """Every test and attack of a budget on the original, the edit and its controls; the model is left as it was.

    `budget`: `mu.evaluate.quick`, `mu.evaluate.full`, or a function of your own from the task to a `Plan`.
    `never_knew`: a model that never knew what is forgotten, such as `mu.testbed.load(without="basketball")`. It tells
    attacks that recover from attacks that teach. Without one, chance stands in and the audit says so.
    `random`: on how many random masks of as many weights the edit is made again, by the same editor with the same
    options (a search of its own they do not get), to say whether the place matters. It takes an edit that an editor
    just made: one that was loaded or made by hand cannot be repeated, and the audit says so. `others`: more edits.
    `edit`, `seeds`, `results`, `executor`, `load`: as for `compare`, which runs everything. A test that fails has that
    in its cells, and the others go on.

    Cost: the edit once more for each random mask (also where `results` has its cells), and that of `compare` with the
    columns of the budget. ValueError, before anything runs, for an edit of other weights, or one of `others` with the
    name of another row.
    """
    plan = budget(task)
    others = dict(others or {})
    _check(model, edit, others, random)
    controls, reason = elsewhere(model, task, edit, count=random)
    report = compare(
        model,
        task,
        {EDIT: edit, **controls, **others},
        metrics=plan.tests,
        controls={} if never_knew is None else {NEVER_KNEW: never_knew},
        seeds=seeds,
        results=results,
        executor=executor,
        load=load,
        progress=progress,
    )
    return Audit(report, plan.kinds, reason)


def _check(model: Model, edit: Edit | Sequence[Edit], others: Mapping[str, object], random: int) -> None:
    """Before an edit is repeated; `compare` checks the rest."""
    taken = sorted({EDIT, NEVER_KNEW, *random_rows(random)} & set(others))
    if taken:
        raise ValueError(
            f"expected names of other edits than those of the audit's rows, got {taken[0]!r}: rename it"
            + (", or pass random=0." if taken[0] in random_rows(random) else ".")
        )
    for each in (edit,) if isinstance(edit, Edit) else edit:
        if isinstance(each, Edit):
            each.check(model)


@dataclass(frozen=True, eq=False, repr=False)
class Audit:
    """What each test and attack found. Print it."""

    report: Report
    """Every cell, side effects included."""
    kinds: Mapping[str, str]
    """Column -> clean, asked, latent, attack or damage."""
    no_random: str = ""
    """Why the edit was not repeated at random places."""

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """One for each row and each column but side effects: its number, and what is left or recovered."""
        return findings(self.report.cells, self.kinds)

    @property
    def table(self) -> "DataFrame":
        """A row for each model, a column for each test and attack: `clean`, ..., and the worst case.

        `worst case` is the largest fraction left under any of them, `by` which of them that is.
        """
        return audit_frames.table(self.findings)

    def to_frame(self) -> "DataFrame":
        """A row for each row, test and attack: value, left, recovered, taught, net, each with its interval."""
        return audit_frames.tidy(self.findings)

    @property
    def verdict(self) -> str:
        """What was found in the edited model, and what it lost besides, in some sentences."""
        return audit_text.verdict(self.report, self.findings, self.kinds)

    def to_markdown(self) -> str:
        """The verdict, the table, what each attack recovered, side effects, and what the numbers mean."""
        return audit_text.markdown(self.report, self.findings, self.kinds, self.no_random)

    def __repr__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()
