"""Which prompts a test asks: a format of the task, and a side of it."""

from typing import Literal, TypeAlias

from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task

Side: TypeAlias = Literal["forget", "retain", "injected"]
"""Facts to forget, facts to keep, or the facts to forget with the injected answers in place of the true ones."""


def side_of(task: Task, *, format: str | None = None, side: Side = "forget") -> Prompts:
    """One side of the test split in a format (default: the first, the trained prompt); ValueError if there is none."""
    name = next(iter(task.formats), "") if format is None else format
    if name not in task.formats:
        raise ValueError(
            f"expected a format of the task ({', '.join(task.formats) or 'it has none'}), got {name!r}: "
            f"mu.tasks.sports_facts, .counterfact and .from_frame build some; for one more, dataclasses.replace(task, "
            f"formats={{**task.formats, {name!r}: mu.tasks.Format(forget, retain)}})."
        )
    found = getattr(task.formats[name], side)
    if found is None:
        able = [other for other, format in task.formats.items() if format.injected is not None]
        raise ValueError(
            f"expected a format with injected answers ({', '.join(able) or 'the task has none'}), got {name!r}: "
            f"sports_facts and from_frame of mu.tasks build them with injected=..., counterfact always; or set "
            f"Format.injected."
        )
    return found
