"""An audit as a picture and as a page: the verdict and the worst cases first, then every number."""

from collections.abc import Sequence
from html import escape
from math import isnan
from typing import TYPE_CHECKING

from mechunlearn.auditing.findings import ORIGINAL, Finding, way_of
from mechunlearn.auditing.words import WAYS, worst_cases
from mechunlearn.evaluate.report.figures import INK, dressed, looks, shown
from mechunlearn.evaluate.report.page import View, results_table

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

READING = (
    "Each point is a test of a model: 0 is what a model without the knowledge does, 1 what the original does. Points "
    "right of 0 by more than their whisker (95 %) are found. Where the edit is not left of the same edit at random "
    "places, the place does not matter. Attacks count beyond what they find about nobody."
)


def picture(findings: Sequence[Finding], rows: Sequence[str], *, title: str = "") -> "Figure":
    """The fraction left by each test in each model but the original: points with their intervals."""
    import plotly.graph_objects as go

    order = [finding.test for way in WAYS for finding in findings if way_of(finding.kind) == way]
    tests, figure = list(dict.fromkeys(order)), go.Figure()
    for row, look in list(looks(rows).items()):
        known = {finding.test: finding.left for finding in findings if finding.row == row}
        drawn = [test for test in tests if row != ORIGINAL and not isnan(known[test].value)]
        if drawn:
            left = [known[test] for test in drawn]
            ends = {
                "array": [one.high - one.value for one in left],
                "arrayminus": [one.value - one.low for one in left],
            }
            whiskers = {"type": "data", "symmetric": False, "thickness": 1, "width": 2, "color": look.color} | ends
            marker = {"color": look.color, "symbol": look.symbol, "size": 9}
            points = {"x": [one.value for one in left], "y": [shown(test) for test in drawn]}
            figure.add_scatter(**points, name=shown(row), mode="markers", marker=marker, error_x=whiskers)
    for place in (0, 1):
        figure.add_vline(x=place, line={"color": INK, "width": 1, "dash": "dot"})
    dressed(figure, title=title, height=130 + 24 * len(tests))
    figure.update_xaxes(title="fraction of the knowledge left")
    labels = [shown(test) for test in reversed(tests)]
    return figure.update_yaxes(categoryorder="array", categoryarray=labels)


def opening(verdict: str, findings: Sequence[Finding], rows: Sequence[str]) -> str:
    """The verdict and the table of worst cases, in HTML."""
    first, rest = verdict.split(". ", 1) if ". " in verdict else (verdict, "")
    head, *lines = worst_cases(findings, rows)
    return (
        f'<p class="verdict"><strong>{escape(first)}.</strong> {escape(rest)}</p>'
        f'<p class="reading">Of each way to look the test that leaves most, with an interval that allows for their '
        f"number. 0: as in a model without the knowledge; 1: as in the original.</p>{results_table(head, lines)}"
    )


def views(findings: Sequence[Finding], rows: Sequence[str]) -> dict[str, list[View]]:
    """The section that comes before the tables of the page."""
    return {"What is left, by each test": [View("Fraction left", READING, picture(findings, rows))]}
