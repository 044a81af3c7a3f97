"""A report as one page that needs nothing else: table, plots, what failed, provenance."""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.report.frames import first_results
from mechunlearn.evaluate.report.views import View, views
from mechunlearn.evaluate.report.words import TextTable, failures, notes, text_table

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
) -> None:
    """The page of a report, in UTF-8."""
    plots = views(cells, weights, forgetting, damage)
    body = [
        "<main>",
        f"<h1>{escape(title)}</h1>",
        _summary(cells, weights, provenance),
        '<section aria-labelledby="table"><h2 id="table">Table</h2>',
        table(cells, weights, intervals=True),
        _notes(cells),
        "</section>",
        *_sections(plots),
        _provenance(provenance),
        "</main>",
        _drawing(plots) if plots else "",
    ]
    Path(path).write_text(_page(title, "\n".join(body)), encoding="utf-8")


def table(cells: Sequence[Cell], weights: Mapping[str, int], *, intervals: bool = False) -> str:
    """The table in HTML, with chance; of many tests with a line for each."""
    written = text_table(cells, weights, intervals=intervals)
    names, *lines = written.lines("chance")
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = [
        f'<tr{_marked(name, written)}><th scope="row">{escape(name)}</th>{"".join(map(_cell, texts))}</tr>'
        for name, *texts in lines
    ]
    return (
        '<div class="scroll" role="region" aria-label="results" tabindex="0"><table class="results">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _marked(name: str, written: TextTable) -> str:
    return ' class="chance"' if name == "chance" and not written.is_tall else ""


def _cell(text: str) -> str:
    """An interval goes below its number."""
    if text == "failed":
        return '<td class="failed">failed</td>'
    value, bracket, ends = text.partition(" [")
    return f"<td>{escape(value)}{f'<small>[{escape(ends)}</small>' if bracket else ''}</td>"


def _summary(cells: Sequence[Cell], weights: Mapping[str, int], provenance: Mapping[str, Any]) -> str:
    """What was tested, how much of it, and whether all of it worked."""
    task = provenance.get("task")
    name = f"{task['name']}: " if isinstance(task, Mapping) and "name" in task else ""
    seeds, failed = len({cell.seed for cell in cells}), sum(cell.result is None for cell in cells)
    counts = [(len(weights), "row"), (len(first_results(cells)), "test"), (seeds, "seed")]
    text = ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)
    return f"<p>{escape(name)}{text}; {failed or 'no'} result{'' if failed == 1 else 's'} failed.</p>"


def _notes(cells: Sequence[Cell]) -> str:
    failed = failures(cells)
    items = [f"<li>{escape(note)}</li>" for note in notes(cells) if note not in failed]
    items += [f'<li class="failed">{escape(note)}</li>' for note in failed]
    return f'<p class="reading">Below each number: its interval of 95 %.</p><ul class="notes">{"".join(items)}</ul>'


def _sections(plots: Mapping[str, Sequence[View]]) -> Iterator[str]:
    count = 0
    for section, found in plots.items():
        yield f'<section><h2>{escape(section)}</h2><div class="plots">'
        for view in found:
            yield _plot(view, f"plot-{count}")
            count += 1
        yield "</div></section>"


def _plot(view: View, name: str) -> str:
    label = escape(f"Plot: {view.title}. {view.reading}", quote=True)
    return (
        f'<figure><h3>{escape(view.title)}</h3><figcaption class="reading">{escape(view.reading)}</figcaption>'
        f'<div id="{name}" role="img" aria-label="{label}" style="height: {_height(view.figure)}px"></div></figure>'
    )


def _drawing(plots: Mapping[str, Sequence[View]]) -> str:
    """Draws when the page is laid out: a plot takes the width that its place has by then."""
    from plotly.graph_objects import Figure
    from plotly.offline import get_plotlyjs

    figures = [json.loads(view.figure.to_json() or "") for found in plots.values() for view in found]
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


def _height(figure: "Figure") -> int:
    return int(figure.to_dict()["layout"]["height"])


def _provenance(provenance: Mapping[str, Any]) -> str:
    if not provenance:
        return ""
    items = "".join(f"<dt>{escape(key)}</dt><dd>{_written(value)}</dd>" for key, value in provenance.items())
    return f'<section class="provenance"><h2>Provenance</h2><dl>{items}</dl></section>'


def _written(value: object) -> str:
    if isinstance(value, list | tuple) and all(isinstance(each, str | int | float) for each in value):
        return escape(", ".join(map(str, value)))
    if isinstance(value, Mapping | list | tuple):
        text = escape(json.dumps(value, indent=1, default=str, ensure_ascii=False))
        return f'<pre tabindex="0">{text}</pre>' if len(text) < 600 else _folded(text, value)
    return escape(str(value))


def _folded(text: str, value: Mapping[str, Any] | Sequence[Any]) -> str:
    return f'<details><summary>{len(value)} entries</summary><pre tabindex="0">{text}</pre></details>'


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
