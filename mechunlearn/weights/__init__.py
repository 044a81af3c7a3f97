"""Localized weights of a model, and an edit of them as a value."""

from mechunlearn.weights.applying import taken_back
from mechunlearn.weights.edit import Edit, Editor, EditSize, checked_edit
from mechunlearn.weights.entries import Entries, Values, exclusively, read, select, write

__all__ = [
    "Edit", "EditSize", "Editor", "Entries", "Values", "checked_edit", "exclusively", "read", "select",
    "taken_back", "write",
]  # fmt: skip
