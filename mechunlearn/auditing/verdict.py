"""Is it really gone? Every test and attack on one edit, beside the same edit elsewhere and a model that never knew."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechunlearn.auditing import words
from mechunlearn.auditing.findings import EDIT, NEVER_KNEW, ORIGINAL, Finding, findings, way_of, worst_case
from mechunlearn.auditing.plans import Plan, quick
from mechunlearn.components.plot import INK, ON_A_PAGE, dressed, looks, shown, whiskers
from mechunlearn.evaluate.grid.comparing import compare
from mechunlearn.evaluate.grid.rows import checked_edits
from mechunlearn.evaluate.report.page import View, results_table, write_page
from mechunlearn.evaluate.report.report import Report
from mechunlearn.evaluate.report.tradeoffs import damage_tests, forget_tests
from mechunlearn.identity import name_of
from mechunlearn.localize.controls import random_like
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, Editor, checked_edit

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


def audit(
    model: Model,
    task: Task,
    edit: Edit | Sequence[Edit],
    *,
    editor: Editor | None = None,
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
    """Run every test and attack of a budget on the original, the edit and its controls; the model is left as it was.

        mu.audit(model, task, edit, editor=partial(mu.edit.finetune, steps=25), never_knew=twin)

    - `edit`: one edit, just made or loaded, or a sequence with one for each of `seeds`.
    - `editor`: the function that made it, with its options. It is called again as `editor(model, task, mask)` on random
      masks of as many weights, for a sequence with each edit's `seed=`, to say whether the place matters. The audit
      says if this control is missing, or differs from the edit in more of its provenance than the seed.
    - `random`: the number of random masks.
    - `budget`: `mu.auditing.quick`, `mu.auditing.full`, or a function of your own from the task to a `Plan`.
    - `never_knew`: a model that never knew the facts, such as `mu.testbed.load(without="basketball")`. It tells attacks
      that recover from attacks that teach. Without it chance stands in.
    - `others`: more edits, by row.
    - `seeds`, `results`, `executor`, `load`: as for `compare`, which runs everything.

    A test that fails has the error in its cells, and the others go on. Cost: one more edit for each random mask (also
    where `results` has its cells), and that of `compare`. ValueError, before any test runs, for an edit of other
    weights, one of `others` with the name of another row, and an editor that cannot be called so, gives no `Edit`, or
    edits the place of the edit again.
    """
    plan, others = budget(task), dict(others or {})
    task.check_length(model)
    names = random_rows(random)
    # Before an edit is made again; `compare` checks the rest.
    taken = sorted({EDIT, NEVER_KNEW, *(names if editor is not None else [])} & set(others))
    if taken:
        raise ValueError(
            f"expected names of other edits than those of the audit's rows, got {taken[0]!r}: rename it"
            + (", or pass random=0." if taken[0] in names else ".")
        )
    checked_edits(model, EDIT, edit)
    controls, note = random_controls(model, task, edit, editor, count=random)
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
    noted = {**report.provenance, RANDOM: note} if note else report.provenance
    return Audit(replace(report, provenance=noted), plan.kinds)


@dataclass(frozen=True, eq=False, repr=False)
class Audit:
    """What each test and attack found. Print it."""

    report: Report
    """Every cell, side effects included."""
    kinds: Mapping[str, str]
    """Column -> clean, asked, latent, attack or damage."""

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """One for each row and each column but side effects: its number, and what is left or recovered."""
        return findings(self.report.cells, self.kinds)

    @property
    def table(self) -> "DataFrame":
        """A row for each model; columns: tests and attacks, the largest fraction left (`worst case`), `by` which."""
        import pandas as pd

        rows: dict[str, dict[str, Any]] = {}
        for finding in self.findings:
            rows.setdefault(finding.row, {})[finding.test] = finding.value.value
        for row, values in rows.items():
            worst = worst_case(self.findings, row)
            values |= {WORST: nan, "by": ""} if worst is None else {WORST: worst.left.value, "by": worst.test}
        return pd.DataFrame.from_dict(rows, orient="index")

    def to_frame(self) -> "DataFrame":
        """A row for each row, test and attack: value, left, recovered, taught, net, each with its interval."""
        import pandas as pd

        rows = []
        for finding in self.findings:
            fractions = {"value": finding.value, "left": finding.left, "of many": finding.of_many}
            fractions |= {"avoids": finding.avoids}
            fractions |= {} if finding.recovery is None else vars(finding.recovery)
            numbers = {name: getattr(finding, name) for name in ("row", "test", "kind", "chance", "sense", "nobody")}
            for name, one in fractions.items():
                numbers |= {name: one.value, f"{name} low": one.low, f"{name} high": one.high}
                numbers[f"{name} reason"] = one.reason
            rows.append(numbers)
        return pd.DataFrame(rows)

    @property
    def verdict(self) -> str:
        """What was found in the edited model, and what it lost besides, in some sentences."""
        return words.verdict(self.report, self.findings, self.kinds)

    @property
    def random_note(self) -> str:
        """Why there is no edit at random places, or in what it differs from the audited edit; empty if all is well."""
        return str(self.report.provenance.get(RANDOM, ""))

    def plot(self) -> "Figure":
        """The fraction left by each test in each model, with intervals."""
        return self._picture("Fraction of the knowledge left")

    def to_html(self, path: str | Path, *, title: str = "Is it gone?") -> None:
        """Write one page that needs nothing else: the verdict, the worst case by each way to look next to that of the
        same edit at random places, a picture, and then all that the report's page has."""
        cells, weights = self.report.cells, self.report.weights
        about = (weights, self.report.provenance, forget_tests(cells), damage_tests(cells))
        first = {"What is left, by each test": [View("Fraction left", READING, self._picture())]}
        write_page(path, cells, *about, title=title, opening=self._opening(), first=first)

    def to_markdown(self) -> str:
        """The verdict, the worst cases, what each test found, what attacks recovered, side effects, and what the
        numbers mean."""
        return words.markdown(self.report, self.findings, self.kinds, self.random_note)

    __repr__ = _repr_markdown_ = to_markdown

    def _picture(self, title: str = "") -> "Figure":
        """The fraction left by each test in each model but the original: points with their intervals."""
        import plotly.graph_objects as go

        order = [finding.test for way in words.WAYS for finding in self.findings if way_of(finding.kind) == way]
        tests, figure = list(dict.fromkeys(order)), go.Figure()
        for row, look in looks(self.report.weights, first=0).items():
            known = {finding.test: finding.left for finding in self.findings if finding.row == row}
            left = {test: known[test] for test in tests if row != ORIGINAL and not isnan(known[test].value)}
            if left:
                points = {"x": [one.value for one in left.values()], "y": [shown(test) for test in left]}
                ends = whiskers([(one.value, one.low, one.high) for one in left.values()], color=look.color)
                marker = {"color": look.color, "symbol": look.symbol, "size": 9}
                figure.add_scatter(**points, name=shown(row), mode="markers", marker=marker, error_x=ends)
        for place in (0, 1):
            figure.add_vline(x=place, line={"color": INK, "width": 1, "dash": "dot"})
        dressed(figure, title=title, height=130 + 24 * len(tests), **ON_A_PAGE)
        figure.update_xaxes(title="fraction of the knowledge left")
        labels = [shown(test) for test in reversed(tests)]
        return figure.update_yaxes(categoryorder="array", categoryarray=labels)

    def _opening(self) -> str:
        """The verdict and the table of worst cases, in HTML."""
        first, rest = self.verdict.split(". ", 1) if ". " in self.verdict else (self.verdict, "")
        head, *lines = words.worst_cases(self.findings, list(self.report.weights))
        return (
            f'<p class="verdict"><strong>{escape(first)}.</strong> {escape(rest)}</p>'
            f'<p class="reading">Of each way to look the test that leaves most, with an interval that allows for their '
            f"number. 0: as in a model without the knowledge; 1: as in the original.</p>{results_table(head, lines)}"
        )


WORST = "worst case"

READING = (
    "Each point is a test of a model: 0 is what a model without the knowledge does, 1 what the original does. Points "
    "right of 0 by more than their whisker (95 %) are found. Where the edit is not left of the same edit at random "
    "places, the place does not matter. Attacks count beyond what they find about nobody."
)

RANDOM = "random places"
"""In the provenance of the report: what the audit has to say about the control at random places."""

NO_EDITOR = (
    "no editor was given: pass editor=..., the function that made the edit, with its options, such as "
    "functools.partial(mu.edit.finetune, steps=25)"
)


def random_rows(count: int) -> list[str]:
    """Their names. ValueError for fewer than none."""
    if count < 0:
        raise ValueError(f"expected a number of random masks, 0 or more, got random={count}.")
    return ["random"] if count == 1 else [f"random {row + 1}" for row in range(count)]


def random_controls(
    model: Model, task: Task, edit: Edit | Sequence[Edit], editor: Editor | None, *, count: int
) -> tuple[dict[str, Edit | tuple[Edit, ...]], str]:
    """Row -> the edit (or each, with its seed) made again on a random mask, and what the audit says about them."""
    if editor is None or count == 0:
        return {}, NO_EDITOR if editor is None else "random=0 was passed"
    edits, notes = (edit,) if isinstance(edit, Edit) else tuple(edit), list[str]()
    options = [{} if isinstance(edit, Edit) else _seed(one) for one in edits]
    _check_editor(editor, model, task, edits[0], options[0])
    made: dict[str, list[Any]] = {}
    try:
        for row, name in enumerate(random_rows(count)):
            masks = (random_like(one.mask, model, row * len(edits) + number) for number, one in enumerate(edits))
            made[name] = [editor(model, task, mask, **seed) for mask, seed in zip(masks, options, strict=True)]
    except (ValueError, ArithmeticError, RuntimeError, MemoryError) as problem:
        # Elsewhere it may fail where here it did not: memory, divergence, no other place of this size. Errors of other
        # types are those of an editor that is wrong anywhere.
        notes.append(f"{type(problem).__name__}: {problem}")
    rows = {name: tuple(_checked(editor, *pair) for pair in zip(edits, row, strict=True)) for name, row in made.items()}
    differences = dict(d for row in rows.values() for pair in zip(edits, row, strict=True) for d in _differences(*pair))
    if differences:
        named = "; ".join(differences.values())
        notes.append(f"the control is another edit than the audited one: it differs in {named}")
    return {name: row[0] if isinstance(edit, Edit) else row for name, row in rows.items()}, ". ".join(notes)


def _seed(edit: Edit) -> dict[str, Any]:
    """As an option of an editor, if the edit has one."""
    return {name: value for name, value in edit.provenance.items() if name == "seed"}


def _check_editor(editor: Editor, model: Model, task: Task, edit: Edit, options: Mapping[str, Any]) -> None:
    try:
        inspect.signature(editor).bind(model, task, edit.mask, **options)
    except (TypeError, ValueError) as problem:
        call = ", ".join(["model", "task", "mask", *(f"{name}={value}" for name, value in options.items())])
        raise ValueError(
            f"expected an editor that can be called as editor({call}), got {name_of(editor)} ({problem}): pass the "
            f"function that made the edit, with its options bound by functools.partial."
        ) from problem


def _checked(editor: Editor, edit: Edit, control: object) -> Edit:
    control = checked_edit(control, editor)
    if control.mask == edit.mask:
        raise ValueError(
            f"expected an editor that edits the mask that it is given, got {name_of(editor)}, which edits the place of "
            f"the edit again: let it pass its third argument on."
        )
    return control


def _differences(edit: Edit, control: Edit) -> list[tuple[str, str]]:
    """Settings in which they differ: name, and both values in words."""
    own, other = _settings(edit.provenance), _settings(control.provenance)
    by_seed = {"prefixes"} if _seed(edit) != _seed(control) else set[str]()
    names = [name for name in {**own, **other} if own.get(name) != other.get(name) and name not in by_seed]
    return [(name, f"{name} ({other.get(name, 'none')}; the edit: {own.get(name, 'none')})") for name in names]


FOLLOWING = {"seed", "search", "explained", "selected", "removed", "planted", "probabilities"}
"""Of a provenance: the seed, how the options were chosen, and numbers that an editor finds, which differ elsewhere."""


def _settings(provenance: Mapping[str, Any], *inside: str) -> dict[str, str]:
    """Dotted name -> value as JSON, since a loaded edit has lists where a fresh one has tuples."""
    settings = {}
    for name, value in provenance.items():
        path = (*inside, str(name))
        if name in FOLLOWING or path[-2:] == ("covariance", "shrinkage"):
            continue
        nested = isinstance(value, Mapping)
        settings |= _settings(value, *path) if nested else {".".join(path): json.dumps(value, default=str)}
    return settings
