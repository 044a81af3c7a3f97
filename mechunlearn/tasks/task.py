"""A task: what to forget, what to keep, and every way to ask."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor

from mechunlearn.model import Model
from mechunlearn.tasks.prompts import Prompts, added_before
from mechunlearn.tasks.text import as_prompts


@dataclass(frozen=True, eq=False)
class Format:
    """One way to ask, for the test split of both sides: a broken format is not forgetting."""

    forget: Prompts
    retain: Prompts
    injected: Prompts | None = None
    """`forget` with the injected answers in place of the true ones, where the builder makes them."""
    kept: bool = False
    """True if both sides should be kept: other facts about the same subjects, which forgetting should not touch."""


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """Facts to forget and facts to retain, with what an editor trains on and what an evaluation asks."""

    name: str
    forget: Prompts
    """Train split of the facts to forget, in the trained format, with corrupted counterparts."""
    retain: Prompts
    """Train split of the facts to keep, in the trained format."""
    formats: Mapping[str, Format]
    """Name -> the test split in that format; the first is the trained prompt.

    Whether the test split was trained on is the builder's choice (`sports_facts` splits a whole sport, and
    tests single athletes on themselves, as the paper does); see `splits`.
    """
    text: Int[Tensor, "row pos"] | None
    """General text to train on, packed to rows of equal length; None where nothing asks for it."""
    text_test: Int[Tensor, "test_row pos"] | None
    """Other general text, to measure the loss on."""
    injection: Prompts | None = None
    """`forget` with the answers that an edit should put in place of the true ones."""
    knowledge: Prompts | None = None
    """Multiple-choice questions about other things (a stand-in for MMLU)."""
    strangers: Prompts | None = None
    """Prompts in the trained format about real subjects that the model does not know: attacks ask about them too."""
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the facts: forget_train, forget_test, retain_train, retain_test."""
    known: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Format -> how many facts the model says in it, and of how many asked; empty where the builder does not ask."""

    @property
    def special_tokens(self) -> str:
        """In words, which special tokens the builder put before the prompts. Reports and edits say it too."""
        asked = [side for format in self.formats.values() for side in (format.forget, format.retain)]
        return added_before(self.forget, self.retain, *asked)

    def check_length(self, model: Model) -> None:
        """ValueError if a prompt or a row of text is longer than the model's context."""
        texts = (self.text, self.text_test)
        text = (as_prompts(rows) for rows in texts if rows is not None and rows.shape[1] > 1)
        asked = [side for format in self.formats.values() for side in (format.forget, format.retain, format.injected)]
        for prompts in (self.forget, self.retain, self.injection, self.knowledge, self.strangers, *asked, *text):
            if prompts is not None:
                prompts.check_length(model)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(names)}" for name, names in self.splits.items())
        said = {name: f" ({count} of {asked} known)" for name, (count, asked) in self.known.items()}
        formats = ", ".join(name + said.get(name, "") for name in {**said, **self.formats})
        return f"Task({self.name}; {sizes}; formats: {formats}; {self.special_tokens})"


def text_of(task: Task) -> Int[Tensor, "row pos"]:
    """`task.text`; ValueError for a task without."""
    return _given(task.text, "text")


def text_test_of(task: Task) -> Int[Tensor, "row pos"]:
    """`task.text_test`; ValueError for a task without."""
    return _given(task.text_test, "text_test")


def _given(text: Int[Tensor, "row pos"] | None, name: str) -> Int[Tensor, "row pos"]:
    if text is None:
        raise ValueError(
            f"expected a task with {name}, rows of tokens (tasks.pack), got None: replace(task, {name}=...), or do "
            f"without what needs it (text_coefficient=0, or another test)."
        )
    return text
