"""Which plots a report has numbers for, each with its title and how to read it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.report.figures import bars, curves, groups_of_shares, has_controls, tests_with_curves
from mechunlearn.evaluate.report.tradeoffs import pareto, sizes, tradeoffs

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class View(NamedTuple):
    """A plot on the page."""

    title: str
    reading: str
    figure: "Figure"


def views(
    cells: Sequence[Cell], weights: Mapping[str, int], forgetting: Sequence[str], damage: Sequence[str]
) -> dict[str, list[View]]:
    """Section -> its plots; sections without numbers are absent."""
    found = {
        "Every way to ask": _bars(cells),
        "Attacks over their budget": _curves(cells, layers=False, reading=_ATTACKS),
        "What is left in each layer": _curves(cells, layers=True, reading=_LAYERS),
        "Size of the edit": _sizes(cells, weights, forgetting, damage),
        "Forgetting against damage": _pareto(cells, forgetting, damage),
    }
    return {section: plots for section, plots in found.items() if plots}


_BARS = {
    "forget": "Facts to forget, by how they are asked: a bar at the chance line is gone for this question.",
    "retain": "Facts to keep, asked in the same ways: where this falls too, the format broke, which is not forgetting.",
    "other": "Tests that have no pair of forget and retain.",
}
_WHISKERS = " Whiskers: intervals of 95 %. The short black line is chance."
_ATTACKS = (
    "Left: before the attack, or its smallest budget. A line that rises above what the attack can teach recovers "
    "knowledge that was only hidden."
)
_LAYERS = (
    "What a probe reads from the residual stream that enters each layer; the last point is the final one. A line above "
    "chance, and above what is read without the facts, means that the knowledge is still there."
)
_BAND = " Bands: intervals of 95 %."
_CONTROL = " Thin lines: the control of the row in the same colour, where there is nothing to find."


def _bars(cells: Sequence[Cell]) -> list[View]:
    return [
        View(panel.capitalize() if panel != "other" else "Other shares", _BARS[panel] + _WHISKERS, figure)
        for panel, tests in groups_of_shares(cells).items()
        for figure in [bars(cells, {panel: tests})]
    ]


def _curves(cells: Sequence[Cell], *, layers: bool, reading: str) -> list[View]:
    return [
        View(test, reading + _BAND + (_CONTROL if has_controls(cells, test) else ""), curves(cells, [test]))
        for test in tests_with_curves(cells, layers=layers)
    ]


def _sizes(
    cells: Sequence[Cell], weights: Mapping[str, int], forgetting: Sequence[str], damage: Sequence[str]
) -> list[View]:
    if not forgetting or not any(weights.values()):
        return []
    reading = (
        f"Each point is an edit; the dashed line is the original model. Compare edits of one size: a larger one can "
        f"do more of both. Knowledge left is {_mean_of(forgetting)}."
    )
    return [View("Edited weights against what is left", reading, sizes(cells, weights, forgetting, damage))]


def _pareto(cells: Sequence[Cell], forgetting: Sequence[str], damage: Sequence[str]) -> list[View]:
    return [
        View(
            f"Knowledge left against {test}",
            f"Best is the lower left corner: nothing left, nothing broken. The dotted line joins the rows that no "
            f"other beats in both. Knowledge left is {_mean_of(forgetting)}; damage is paired with the original.",
            pareto(cells, forgetting, test),
        )
        for test in damage
        if forgetting and len(tradeoffs(cells, forgetting, test)) > 1
    ]


def _mean_of(tests: Sequence[str]) -> str:
    if len(tests) == 1:
        return f'"{tests[0]}"'
    if all(test.startswith("forget, ") for test in tests):
        named = "; ".join(test.removeprefix("forget, ") for test in tests)
        return f"the mean of forget over {len(tests)} ways to ask" + (f" ({named})" if len(tests) <= 4 else "")
    return f"the mean of {len(tests)} tests ({'; '.join(tests)})"
