"""Edits one after the other, each made on the model as the ones before it left it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from mechunlearn.components import ComponentMask
from mechunlearn.edit.finetuning import finetune
from mechunlearn.identity import name_of
from mechunlearn.model import Model, fingerprint
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, Editor, checked_edit, read, select

if TYPE_CHECKING:
    from pandas import DataFrame


Localize: TypeAlias = Callable[[Model, Task], ComponentMask]


@dataclass(frozen=True, eq=False, repr=False)
class EditSequence:
    """Edits that build on each other, and what was measured on the way."""

    edits: tuple[Edit, ...]
    """One per task. Each is made for the weights that the ones before it give: apply them in order."""
    combined: Edit
    """All of them as one edit of the original model: the last weights of every entry that any of them covers."""
    names: tuple[str, ...]
    """The names of the tasks."""
    evaluations: tuple[Mapping[str, Any], ...] = ()
    """The rows that `after` returned: for the original model, then after each edit; empty without `after`."""

    @property
    def table(self) -> "DataFrame":
        """A row for the original model and one after each edit, with the columns of `after`."""
        from pandas import DataFrame

        rows = ("original", *self.names)[: len(self.evaluations)]
        return DataFrame([dict(row) for row in self.evaluations], index=list(rows))

    def __repr__(self) -> str:
        return f"EditSequence({len(self.edits)} edits; combined: {self.combined!r})"


def sequence(
    model: Model,
    tasks: Sequence[Task],
    localize: Localize | ComponentMask | Sequence[ComponentMask],
    *,
    edit: Editor = finetune,
    after: Callable[[Model], Mapping[str, Any]] | None = None,
) -> EditSequence:
    """Make an edit for each task, in order, on the model as edited so far; the model is left as it was.

    - `localize`: `(model, task) -> ComponentMask`, called on the model as edited so far; or one mask for all tasks, or
      a mask for each.
    - `edit`: any editor, its options bound with `partial`. Every call has a fresh optimizer.
    - `after(model)` gives a row of the table; it is called on the original model and after each edit.

    Earlier facts are not rehearsed, unless a task has them: `tasks.partitioned(task, k, rehearse=True)`.

    The protocol of Guo et al. 2025 (https://arxiv.org/abs/2410.12949): 64 CounterFact facts as 4 x 16,
    `partial(finetune, inject=True, steps=25)`, evaluated on all 64 after each. Their masks are those of the *original*
    model on each 16 facts: pass `[localize(model, part) for part in parts]` for that.

    Cost: that of the edits and evaluations; memory for the localized weights of each edit twice, and once more for
    `combined`. ValueError for no tasks, another number of masks than tasks, and an editor that gives no `Edit`.
    """
    if not tasks:
        raise ValueError("expected at least one task, got none: tasks.partitioned(task, k) makes k of one.")
    is_one_mask = isinstance(localize, ComponentMask)
    where = [localize] * len(tasks) if is_one_mask or not isinstance(localize, Sequence) else localize
    if len(where) != len(tasks):
        raise ValueError(f"expected a mask for each of the {len(tasks)} tasks, got {len(where)}: or pass one for all.")
    original, edits, evaluations = fingerprint(model), [], []
    with ExitStack() as applied:
        if after is not None:
            evaluations.append(_row(after, model))
        for task, mask in zip(tasks, where, strict=True):
            place = mask if isinstance(mask, ComponentMask) else mask(model, task)
            edits.append(checked_edit(edit(model, task, place), edit))
            applied.enter_context(edits[-1].applied(model))
            if after is not None:
                evaluations.append(_row(after, model))
        combined = _combined(model, edits, original)
    return EditSequence(tuple(edits), combined, tuple(task.name for task in tasks), tuple(evaluations))


def _row(after: Callable[[Model], Mapping[str, Any]], model: Model) -> Mapping[str, Any]:
    row = after(model)
    if not isinstance(row, Mapping):
        raise ValueError(
            f"expected after(model) to give a row, column -> number, got {type(row).__name__} from {name_of(after)}: "
            f'return {{"name": number}}.'
        )
    return row


def _combined(model: Model, edits: Sequence[Edit], original: str) -> Edit:
    """The present weights of every entry that an edit covers, as an edit of the original model."""
    first = edits[0].mask
    members = frozenset(component for edit in edits for component in edit.mask)
    mask = ComponentMask(members, first.shape, {"method": "sequence", "of": [dict(e.mask.provenance) for e in edits]})
    values = read(select(model, mask))
    return Edit(mask, values, original, {"editor": "sequence", "of": [dict(e.provenance) for e in edits]})
