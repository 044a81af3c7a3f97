"""What an editor is, for functions that are given one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial, wraps
from typing import Any, ParamSpec, TypeAlias

from mechunlearn.components import ComponentMask
from mechunlearn.identity import name_of
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit

Editor: TypeAlias = Callable[..., Edit]
"""`(model, task, mask, **options) -> Edit`: any function of this signature is one."""


Given = ParamSpec("Given")

_OF_ONE_RUN = ("model", "task", "mask", "checkpoint", "on_step")


def repeatable(editor: Callable[Given, Edit]) -> Callable[Given, Edit]:
    """An editor whose edits say how to make the same elsewhere (`Edit.editor`): with its options, but no checkpoint.

    Not where an option is an iterator, such as a stream of text that is used up.
    """

    @wraps(editor)
    def made(*arguments: Given.args, **options: Given.kwargs) -> Edit:
        again = {name: value for name, value in options.items() if name not in _OF_ONE_RUN}
        edit = editor(*arguments, **options)
        is_used_up = any(isinstance(value, Iterator) for value in again.values())
        return edit if is_used_up else replace(edit, editor=partial(made, **again))

    return made


def edited(editor: Editor, model: Model, task: Task, mask: ComponentMask, **options: Any) -> Edit:
    """What the editor makes; ValueError if that is not an `Edit`."""
    found = editor(model, task, mask, **options)
    if not isinstance(found, Edit):
        raise ValueError(
            f"expected an editor (model, task, mask) -> Edit, got {name_of(editor)}, which returns "
            f"{type(found).__name__}: wrap it in a function that returns an Edit (a LearnedMask has .edit() and "
            f".discretize(k=...))."
        )
    return found
