"""One test of one row with one seed: what a report is made of."""

from dataclasses import dataclass

from mechunlearn.evaluate.result import Result


@dataclass(frozen=True, eq=False)
class Cell:
    """A result, or why there is none."""

    row: str
    """"original", the name of an edit, or the name of a control model."""
    test: str
    """The column."""
    seed: int
    result: Result | None
    error: str = ""
    """Kind and message of what the test raised."""
    seconds: float = 0.0
