"""A report as one page that needs nothing else: table, plots, what failed, provenance."""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.report.figures import bars, curves, groups_of_shares, has_controls, tests_with_curves
from mechunlearn.evaluate.report.frames import first_results
from mechunlearn.evaluate.report.text import failures, notes, text_table
from mechunlearn.evaluate.report.tradeoffs import pareto, sizes, tradeoffs

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def write_page(
    path: str | Path,
    cells: Sequence[Cell],
    weights: Mapping[str, int],
    provenance: Mapping[str, Any],
    forgetting: Sequence[str],
    damage: Sequence[str],
    *,
    title: str,
    opening: str = "",
    first: Mapping[str, Sequence["View"]] = MappingProxyType({}),
) -> None:
    """The page of a report, in UTF-8; `opening` (HTML) and the plots of `first` come before its table."""
    views = {
        "Every way to ask": _bars(cells),
        "Attacks over their budget": _curves(cells, layers=False, reading=_ATTACKS),
        "What is left in each layer": _curves(cells, layers=True, reading=_LAYERS),
        "Size of the edit": _sizes(cells, weights, forgetting, damage),
        "Forgetting against damage": _pareto(cells, forgetting, damage),
    }
    # Sections for which there are no numbers are left out.
    plots = {**first, **{section: views_of for section, views_of in views.items() if views_of}}
    sections = list(_sections(plots))
    failed = failures(cells)
    items = [f"<li>{escape(note)}</li>" for note in notes(cells) if note not in failed]
    items += [f'<li class="failed">{escape(note)}</li>' for note in failed]
    body = [
        "<main>",
        f"<h1>{escape(title)}</h1>",
        opening,
        *sections[: len(first)],
        _summary(cells, weights, provenance),
        '<section aria-labelledby="table"><h2 id="table">Table</h2>',
        table(cells, weights, intervals=True),
        f'<p class="reading">Below each number: its interval of 95 %.</p><ul class="notes">{"".join(items)}</ul>',
        "</section>",
        *sections[len(first) :],
        _provenance(provenance),
        "</main>",
        _drawing(plots) if plots else "",
    ]
    Path(path).write_text(_page(title, "\n".join(body)), encoding="utf-8")


def table(cells: Sequence[Cell], weights: Mapping[str, int], *, intervals: bool = False) -> str:
    """The table in HTML, with chance; of many tests with a line for each."""
    written = text_table(cells, weights, intervals=intervals)
    names, *lines = written.lines("chance")
    return results_table(names, lines, {} if written.is_tall else {"chance": ' class="chance"'})


def results_table(
    names: Sequence[str], lines: Sequence[Sequence[str]], marks: Mapping[str, str] = MappingProxyType({})
) -> str:
    """A table in HTML that scrolls in its box; `marks`: first cell of a line -> attributes of the line."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = [
        f'<tr{marks.get(name, "")}><th scope="row">{escape(name)}</th>{"".join(map(_cell, texts))}</tr>'
        for name, *texts in lines
    ]
    return (
        '<div class="scroll" role="region" aria-label="results" tabindex="0"><table class="results">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


class View(NamedTuple):
    """A plot on the page, with its title and how to read it."""

    title: str
    reading: str
    figure: "Figure"


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


def _cell(text: str) -> str:
    """A cell of the table, with the interval below its number."""
    if text == "failed":
        return '<td class="failed">failed</td>'
    value, bracket, ends = text.partition(" [")
    ends, _, by = ends.partition("], ")
    small = f"<small>[{escape(ends)}{f']</small><small>{escape(by)}' if by else ''}</small>" if bracket else ""
    return f"<td>{escape(value)}{small}</td>"


def _summary(cells: Sequence[Cell], weights: Mapping[str, int], provenance: Mapping[str, Any]) -> str:
    task = provenance.get("task")
    name = f"{task['name']}: " if isinstance(task, Mapping) and "name" in task else ""
    seeds, failed = len({cell.seed for cell in cells}), sum(cell.result is None for cell in cells)
    counts = [(len(weights), "row"), (len(first_results(cells)), "test"), (seeds, "seed")]
    text = ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)
    return f"<p>{escape(name)}{text}; {failed or 'no'} result{'' if failed == 1 else 's'} failed.</p>"


def _sections(plots: Mapping[str, Sequence[View]]) -> Iterator[str]:
    count = 0
    for section, views_of in plots.items():
        drawn = []
        for view in views_of:
            label = escape(f"Plot: {view.title}. {view.reading}", quote=True)
            height = int(view.figure.to_dict()["layout"]["height"])
            drawn.append(
                f'<figure><h3>{escape(view.title)}</h3><figcaption class="reading">{escape(view.reading)}</figcaption>'
                f'<div id="plot-{count}" role="img" aria-label="{label}" style="height: {height}px"></div></figure>'
            )
            count += 1
        yield f'<section><h2>{escape(section)}</h2><div class="plots">{"".join(drawn)}</div></section>'


def _drawing(plots: Mapping[str, Sequence[View]]) -> str:
    """The script that draws the plots once the page is laid out, so that each takes the width of its place."""
    from plotly.graph_objects import Figure
    from plotly.offline import get_plotlyjs

    figures = [json.loads(view.figure.to_json() or "") for views_of in plots.values() for view in views_of]
    for figure in figures:
        del figure["layout"]["template"]  # large, and the same for all
    template = json.loads(Figure(layout={"template": "plotly_white"}).to_json() or "")["layout"]["template"]
    content = json.dumps({"template": template, "figures": figures}).replace("<", "\\u003c")
    return f"<script>{get_plotlyjs()}</script>\n<script>{_DRAW.replace('CONTENT', content)}</script>"


# A legend takes more lines where the screen is narrow.
_DRAW = """
const {template, figures} = CONTENT;
const settings = {responsive: true, displaylogo: false, displayModeBar: false};
figures.forEach((figure, i) => {
  const place = document.getElementById("plot-" + i);
  const entries = figure.data.filter(trace => trace.showlegend !== false).length;
  const height = figure.layout.height + (place.clientWidth < 480 ? 22 * entries : 0);
  place.style.height = height + "px";
  Plotly.newPlot(place, figure.data, {...figure.layout, template, height}, settings);
});
"""


def _provenance(provenance: Mapping[str, Any]) -> str:
    if not provenance:
        return ""
    items = "".join(f"<dt>{escape(key)}</dt><dd>{_written(value)}</dd>" for key, value in provenance.items())
    return f'<section class="provenance"><h2>Provenance</h2><dl>{items}</dl></section>'


def _written(value: object) -> str:
    if isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
        return escape(", ".join(map(str, value)))
    if isinstance(value, Mapping | list | tuple):
        text = escape(json.dumps(value, indent=1, default=str, ensure_ascii=False))
        shown = f'<pre tabindex="0">{text}</pre>'
        return shown if len(text) < 600 else f"<details><summary>{len(value)} entries</summary>{shown}</details>"
    return escape(str(value))


def _page(title: str, body: str) -> str:
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
