"""Of each row under each test: how much is left, and what an attack recovered; as frames, and the worst case."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from mechunlearn.auditing.plans import CLEAN
from mechunlearn.evaluate.fractions import Fraction, Recovery, left_fraction, recovery
from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.report.frames import by_row_and_test, interval_of, value_over_seeds
from mechunlearn.evaluate.results import Result

if TYPE_CHECKING:
    from pandas import DataFrame


ORIGINAL, EDIT, NEVER_KNEW = "original", "edit", "never knew"
"""Names of rows."""

BySeed: TypeAlias = dict[int, Result]
Found: TypeAlias = Mapping[tuple[str, str], BySeed]
"""Row and test -> seed -> result."""


@dataclass(frozen=True)
class Finding:
    """What one test or attack found in one model."""

    row: str
    test: str
    kind: str
    """clean, asked, latent or attack."""
    value: Fraction
    """Its own number, with the interval over facts and seeds."""
    nobody: float | None
    """Of an attack: the same number of its control, such as the same questions about nobody."""
    chance: float | None
    sense: str
    left: Fraction
    """(this model - never knew) / (original - never knew), by this test."""
    recovery: Recovery | None
    """Of an attack, if something says what the model knew before it."""


def findings(cells: Iterable[Cell], kinds: Mapping[str, str]) -> tuple[Finding, ...]:
    """Rows and tests in their order; side effects are left out.

    An attack with a curve, and a control that has one too, counts by how much more it finds than its control, at the
    budget at which that is most: an attack that makes a model give the answer to any question finds nothing.
    """
    grouped = {key: each for key, each in by_row_and_test(cells).items() if kinds[key[1]] != "damage"}
    found = {key: {c.seed: c.result for c in each if c.result is not None} for key, each in grouped.items()}
    never = NEVER_KNEW if any(row == NEVER_KNEW for row, _ in found) else None
    return tuple(
        Finding(
            row,
            test,
            kinds[test],
            _value(each),
            _of_control(found[row, test]) if kinds[test] == "attack" else None,
            *_meaning(found, test),
            _left(found, row, test, never, is_attack=kinds[test] == "attack"),
            _recovery(found, row, test, never) if kinds[test] == "attack" else None,
        )
        for (row, test), each in grouped.items()
    )


def _value(cells: list[Cell]) -> Fraction:
    if not any(cell.result for cell in cells):
        return _none(f"failed: {cells[0].error}")
    return Fraction(value_over_seeds(cells), *interval_of(cells))


def _of_control(results: BySeed) -> float | None:
    values = [result.control.value for result in results.values() if result.control is not None]
    return sum(values) / len(values) if values else None


def _meaning(found: Found, test: str) -> tuple[float | None, str]:
    first = next((result for (_, name), some in found.items() if name == test for result in some.values()), None)
    return (None, "") if first is None else (first.chance, first.sense)


def _left(found: Found, row: str, test: str, never_knew: str | None, *, is_attack: bool) -> Fraction:
    rows = [row, ORIGINAL, *([] if never_knew is None else [never_knew])]
    failed = [name for name in dict.fromkeys(rows) if not found[name, test]]
    if failed:
        return _none(f"failed on {', '.join(failed)}")
    own, original, *never = (found[name, test] for name in rows)
    if is_attack and _have_controls(own, original, *never):
        own, original, *never = (_most(results) for results in (own, original, *never))
    return left_fraction(own, original, never_knew=never[0] if never else None)


def _recovery(found: Found, row: str, test: str, never_knew: str | None) -> Recovery | None:
    attacked, original = found[row, test], found[ORIGINAL, test]
    taught = None if never_knew is None else found[never_knew, test]
    ran = [attacked, original, *([] if taught is None else [taught])]
    if all(ran) and _have_controls(*ran):
        never = None if taught is None else _start(taught)
        most = None if taught is None else _most(taught)
        return _of(_most(attacked), _start(attacked), _start(original), never, most)
    unlearned, original = found[row, CLEAN], found[ORIGINAL, CLEAN]
    if not attacked or not unlearned or not original or not _alike(attacked, unlearned):
        return None
    never = None if never_knew is None else found[never_knew, CLEAN]
    return None if never == {} else _of(attacked, unlearned, original, never, taught)


def _of(attacked: BySeed, unlearned: BySeed, original: BySeed, never: BySeed | None, taught: BySeed | None) -> Recovery:
    found = recovery(attacked, unlearned, original, never_knew=never, attacked_never_knew=taught or None)
    if taught != {}:
        return found
    reason = _none("failed on never knew")
    return replace(found, taught=reason, net=reason)


def _have_controls(*rows: BySeed) -> bool:
    """Whether every result has a curve and a control with the same points of the same examples."""
    return all(_difference(result) is not None for results in rows for result in results.values())


def _most(results: BySeed) -> BySeed:
    """By how much more is found than in the control, at the budget at which that is most."""
    return {seed: _at(result, int(_less_control(result).mean(0).argmax())) for seed, result in results.items()}


def _start(results: BySeed) -> BySeed:
    """The same before the attack, which is the first point."""
    return {seed: _at(result, 0) for seed, result in results.items()}


def _at(result: Result, point: int) -> Result:
    """Guessing finds as much in the control: chance is 0."""
    return Result(_less_control(result)[:, point], f"{result.sense}, less the control", 0.0, names=result.names)


def _less_control(result: Result) -> Tensor:
    difference = _difference(result)
    assert difference is not None
    return difference


def _difference(result: Result) -> Tensor | None:
    own, control = result.curve, None if result.control is None else result.control.curve
    if own is None or control is None or own.points != control.points:
        return None
    return own.per_prompt - control.per_prompt if own.per_prompt.shape == control.per_prompt.shape else None


def _alike(attacked: BySeed, clean: BySeed) -> bool:
    """Whether they measure the same, in the same unit."""
    one, other = next(iter(attacked.values())), next(iter(clean.values()))
    return (one.sense, one.unit) == (other.sense, other.unit)


def _none(reason: str) -> Fraction:
    return Fraction(nan, nan, nan, reason)


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
