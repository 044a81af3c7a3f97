"""Of each row under each test: how much is left, and what an attack recovered; and the worst case."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import TypeAlias

from torch import Tensor

from mechunlearn.auditing.plans import CLEAN
from mechunlearn.evaluate.fractions import Fraction, Recovery, avoidance_fraction, left_fraction, recovery, undefined
from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.report.frames import by_row_and_test, first_results, interval_of, value_over_seeds
from mechunlearn.evaluate.results import Result

ORIGINAL, EDIT, NEVER_KNEW = "original", "edit", "never knew"
"""Names of rows."""

BySeed: TypeAlias = dict[int, Result]
Results: TypeAlias = Mapping[tuple[str, str], BySeed]
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
    """(this model - floor) / (original - floor), by this test; the floor is what a model without the knowledge does."""
    of_many: Fraction
    """The same, with an interval that allows for the number of tests of this kind (Bonferroni)."""
    avoids: Fraction
    """How far its answers are below those of models without the knowledge; undefined where nothing is asked.
    The interval allows for the number of tests, too."""
    recovery: Recovery | None
    """Of an attack, if something says what the model knew before it."""


def findings(cells: Sequence[Cell], kinds: Mapping[str, str]) -> tuple[Finding, ...]:
    """Rows and tests in their order; side effects are left out.

    An attack with a curve, and a control that has one too, counts by how much more it finds than its control, at the
    budget at which that is most: an attack that makes a model give the answer to any question finds nothing.
    """
    grouped = {key: some for key, some in by_row_and_test(cells).items() if kinds[key[1]] != "damage"}
    results = {key: {c.seed: c.result for c in some if c.result is not None} for key, some in grouped.items()}
    never = NEVER_KNEW if any(row == NEVER_KNEW for row, _ in results) else None
    first, found = first_results(cells), []
    count = {kind: sum(way_of(kinds[test]) == way_of(kind) for test in first) for kind in kinds.values()}
    for (row, test), some in grouped.items():
        own, is_attack, meaning = results[row, test], kinds[test] == "attack", first[test]
        value = Fraction(value_over_seeds(some), *interval_of(some)) if own else undefined(f"failed: {some[0].error}")
        controls = [result.control.value for result in own.values() if is_attack and result.control is not None]
        nobody = sum(controls) / len(controls) if controls else None
        chance, sense = (None, "") if meaning is None else (meaning.chance, meaning.sense)
        left, of_many, avoids = _left(results, row, test, never, kinds[test], count[kinds[test]])
        recovered = _recovery(results, row, test, never) if is_attack else None
        fractions = (left, of_many, avoids, recovered)
        found.append(Finding(row, test, kinds[test], value, nobody, chance, sense, *fractions))
    return tuple(found)


def way_of(kind: str) -> str:
    """asked (the clean test too), latent or attack."""
    return "asked" if kind == "clean" else kind


def _left(
    results: Results, row: str, test: str, never_knew: str | None, kind: str, among: int
) -> tuple[Fraction, Fraction, Fraction]:
    """What is left, the same as one of so many numbers, and by how much the answer is avoided."""
    rows = [row, ORIGINAL, *([] if never_knew is None else [never_knew])]
    failed = [name for name in dict.fromkeys(rows) if not results[name, test]]
    if failed:
        missing = undefined(f"failed on {', '.join(failed)}")
        return missing, missing, missing
    by_row = {name: results[name, test] for name in rows}
    if kind == "attack" and _have_controls(*by_row.values()):
        by_row = {name: _less_control(some) for name, some in by_row.items()}
    of = (by_row[row], by_row[ORIGINAL])
    never = None if never_knew is None else by_row[never_knew]
    left = left_fraction(*of, never_knew=never)
    of_many = left_fraction(*of, never_knew=never, confidence=1 - 0.05 / among)
    avoids = undefined("nothing is asked")
    if way_of(kind) == "asked":
        avoids = avoidance_fraction(*of, never_knew=never, confidence=1 - 0.05 / among)
    return left, of_many, avoids


def _recovery(results: Results, row: str, test: str, never_knew: str | None) -> Recovery | None:
    attacked, original = results[row, test], results[ORIGINAL, test]
    taught = None if never_knew is None else results[never_knew, test]
    ran = [attacked, original, *([] if taught is None else [taught])]
    if all(ran) and _have_controls(*ran):
        # A curve begins before the attack, and counts beyond its control: no other test is needed.
        unlearned, original, *rest = (_less_control(results, before=True) for results in ran)
        attacked, never, taught = _less_control(attacked), rest[0] if rest else None, taught and _less_control(taught)
    else:
        # Otherwise the clean test says what was known before, if it measures the same.
        unlearned, original = results[row, CLEAN], results[ORIGINAL, CLEAN]
        never = None if never_knew is None else results[never_knew, CLEAN]
        if not attacked or not unlearned or not original or never == {}:
            return None
        one, other = next(iter(attacked.values())), next(iter(unlearned.values()))
        if (one.sense, one.unit) != (other.sense, other.unit):
            return None
    fractions = recovery(attacked, unlearned, original, never_knew=never, attacked_never_knew=taught or None)
    if taught != {}:
        return fractions
    reason = undefined("failed on never knew")
    return replace(fractions, taught=reason, net=reason)


def _have_controls(*rows: BySeed) -> bool:
    """Whether every result has a curve and a control with the same points of the same examples."""
    return all(_difference(result) is not None for results in rows for result in results.values())


def _less_control(results: BySeed, *, before: bool = False) -> BySeed:
    """By how much more is found than in the control: before the attack, or at the budget at which that is most."""
    less = {}
    for seed, result in results.items():
        difference = _difference(result)
        assert difference is not None
        found = difference[:, 0 if before else int(difference.mean(0).argmax())]
        # Guessing finds as much in the control: chance is 0.
        unit = "difference of shares" if result.unit == "share" else result.unit
        less[seed] = Result(found, f"{result.sense}, less the control", 0.0, unit, result.names)
    return less


def _difference(result: Result) -> Tensor | None:
    own, control = result.curve, None if result.control is None else result.control.curve
    if own is None or control is None or own.points != control.points:
        return None
    return own.per_prompt - control.per_prompt if own.per_prompt.shape == control.per_prompt.shape else None


def worst_case(findings: Iterable[Finding], row: str, way: str = "") -> Finding | None:
    """The test or attack (of this way) that leaves the largest fraction; None if no fraction is defined."""
    of_row = [finding for finding in findings if finding.row == row and way in ("", way_of(finding.kind))]
    defined = [finding for finding in of_row if not isnan(finding.left.value)]
    return max(defined, key=lambda finding: finding.left.value, default=None)
