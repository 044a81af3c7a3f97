"""Is it really gone? Every test and attack on one edit, beside the same edit elsewhere and a model that never knew."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mechunlearn.auditing import words
from mechunlearn.auditing.findings import EDIT, NEVER_KNEW, Finding, findings, table, tidy
from mechunlearn.auditing.plans import Plan, quick
from mechunlearn.components import matched
from mechunlearn.evaluate.grid.comparing import compare
from mechunlearn.evaluate.report.report import Report
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

    `budget`: `mu.auditing.quick`, `mu.auditing.full`, or a function of your own from the task to a `Plan`.
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
        return table(self.findings)

    def to_frame(self) -> "DataFrame":
        """A row for each row, test and attack: value, left, recovered, taught, net, each with its interval."""
        return tidy(self.findings)

    @property
    def verdict(self) -> str:
        """What was found in the edited model, and what it lost besides, in some sentences."""
        return words.verdict(self.report, self.findings, self.kinds)

    def to_markdown(self) -> str:
        """The verdict, the table, what each attack recovered, side effects, and what the numbers mean."""
        return words.markdown(self.report, self.findings, self.kinds, self.no_random)

    def __repr__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def elsewhere(
    model: Model, task: Task, edit: Edit | Sequence[Edit], *, count: int
) -> tuple[dict[str, Edit | tuple[Edit, ...]], str]:
    """`count` rows of edits made like `edit` on random masks; and why there are none, if there are none.

    Of several edits (one for each seed) each row has as many, all on masks of their own.
    """
    several = (edit,) if isinstance(edit, Edit) else tuple(edit)
    if count == 0:
        return {}, "random=0 was passed"
    if any(not isinstance(each, Edit) or each.editor is None for each in several):
        return {}, "how to repeat it is not known: loaded, combined, learned as a mask, made by hand, or from a stream"
    other = [each.provenance.get("task") for each in several if each.provenance.get("task", task.name) != task.name]
    if other:
        return {}, f"the edit was made on another task, {other[0]}"
    rows = {}
    try:
        for row, name in enumerate(random_rows(count)):
            made = tuple(_made(model, task, each, row * len(several) + i) for i, each in enumerate(several))
            rows[name] = made[0] if isinstance(edit, Edit) else made
    except Exception as problem:  # memory may do elsewhere what it did not do here
        return rows, f"{type(problem).__name__}: {problem}"
    return rows, ""


def random_rows(count: int) -> list[str]:
    """Their names. ValueError for fewer than none."""
    if count < 0:
        raise ValueError(f"expected a number of random masks, 0 or more, got random={count}.")
    return ["random"] if count == 1 else [f"random {row + 1}" for row in range(count)]


def _made(model: Model, task: Task, edit: Edit, seed: int) -> Edit:
    assert edit.editor is not None
    return edit.editor(model, task, matched(edit.mask, seed))
