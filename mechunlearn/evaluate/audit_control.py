"""The control of an audit that says whether the place matters: the same editor on as many weights elsewhere."""

from collections.abc import Sequence

from mechunlearn.components import matched
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit


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
