"""An audit as DataFrames, and its worst case."""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan, nan
from typing import TYPE_CHECKING, Any

from mechunlearn.evaluate.audit_numbers import Finding
from mechunlearn.evaluate.recovered import Fraction

if TYPE_CHECKING:
    from pandas import DataFrame

WORST = "worst case"


def table(found: Sequence[Finding]) -> "DataFrame":
    """A row for each model: its number under every test, the largest fraction left, and by which."""
    import pandas as pd

    rows: dict[str, dict[str, Any]] = {}
    for each in found:
        rows.setdefault(each.row, {})[each.test] = each.value.value
    for row, values in rows.items():
        worst = worst_case(found, row)
        values |= {WORST: nan, "by": ""} if worst is None else {WORST: worst.left.value, "by": worst.test}
    return pd.DataFrame.from_dict(rows, orient="index")


def tidy(found: Iterable[Finding]) -> "DataFrame":
    """A row for each model and test."""
    import pandas as pd

    rows = []
    for each in found:
        fractions = {"value": each.value, "left": each.left} | ({} if each.recovery is None else vars(each.recovery))
        start = {"row": each.row, "test": each.test, "kind": each.kind, "chance": each.chance, "sense": each.sense}
        rows.append(start | {"nobody": each.nobody} | _columns(fractions))
    return pd.DataFrame(rows)


def worst_case(found: Iterable[Finding], row: str) -> Finding | None:
    """The test or attack that leaves the largest fraction; None if no fraction is defined."""
    defined = [each for each in found if each.row == row and not isnan(each.left.value)]
    return max(defined, key=lambda each: each.left.value, default=None)


def _columns(fractions: Mapping[str, Fraction]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in fractions.items():
        found |= {name: each.value, f"{name} low": each.low, f"{name} high": each.high, f"{name} reason": each.reason}
    return found
