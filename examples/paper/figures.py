"""The figures of the paper: formats, relearning, probes by layer, sizes of edits, and edits in sequence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from pictures import write_pngs
from plotly.subplots import make_subplots

from mechunlearn.evaluate import Report
from paper.facts import PARTS
from paper.setup import LOCALIZATIONS
from paper.tables import curves_frame, provenance_of, reports_of, results_frame, sizes_frame, write_csv

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c510a", "#6b6b6b", "#999933")


def write_figures(out: Path) -> None:
    """A page for each task and mode; of each figure a PNG, if there is a browser, and its numbers."""
    folder, about = out / "figures", provenance_of(out)
    folder.mkdir(exist_ok=True)
    drawn: dict[Path, go.Figure] = {}
    for (task, mode), report in reports_of(out, about).items():
        report.to_html(folder / f"{task}, {mode}.html", title=f"{task}, {mode}")
        for name, figure, frame in [*_of_report(report), *_of_stages(report)]:
            drawn[folder / f"{task}, {mode}, {name}.png"] = figure
            write_csv(frame, folder / f"{task}, {mode}, {name}.csv", about)
    sizes = sizes_frame(out)
    if len(sizes):
        figure = sizes_figure(sizes)
        drawn[folder / "sport, sizes of edits.png"] = figure
        figure.write_html(folder / "sport, sizes of edits.html", include_plotlyjs=True)
        write_csv(sizes, folder / "sport, sizes of edits.csv", about)
    problem = write_pngs({path: _signed(figure, path.stem, about) for path, figure in drawn.items()})
    if problem:
        print(f"No PNG files: {problem}")


def sizes_figure(sizes: pd.DataFrame) -> go.Figure:
    """A panel for each test: a line for each localization, dotted for as many of its weights at random (of which the
    legend has one)."""
    tests = list(dict.fromkeys(sizes["test"]))
    figure = make_subplots(1, len(tests), subplot_titles=tests, shared_yaxes=True)
    for column, test in enumerate(tests, 1):
        for name, how, lines in _groups(sizes[sizes["test"] == test], "localization", "how"):
            dash, label = ("solid", name) if how == "chosen" else ("dot", f"{name}, as many at random")
            line = {"color": _color(name), "dash": dash}
            error = {"array": lines["high"] - lines["value"], "arrayminus": lines["value"] - lines["low"], "width": 2}
            listed = column == 1 and (how == "chosen" or name == LOCALIZATIONS[0])
            where = {"row": 1, "col": column, "showlegend": listed, "legendgroup": label}
            x = lines["weights"].astype(int)
            figure.add_scatter(x=x, y=lines["value"], error_y=error, name=label, line=line, **where)
        figure.update_xaxes(type="log", title="weights set to zero", row=1, col=column)
    return _dressed(figure, height=520)


def stages_figure(frame: pd.DataFrame) -> go.Figure:
    """A panel for each test: what is left of all facts after each part."""
    tests = list(dict.fromkeys(frame["test"]))
    columns = 2
    figure = make_subplots(-(-len(tests) // columns), columns, subplot_titles=tests, shared_yaxes=True)
    for place, test in enumerate(tests):
        for name, lines in frame[frame["test"] == test].groupby("localization", sort=False):
            where = {"row": 1 + place // columns, "col": 1 + place % columns, "showlegend": place == 0}
            line, error = {"color": _color(str(name))}, {"array": lines["high"] - lines["value"], "width": 2}
            error["arrayminus"] = lines["value"] - lines["low"]
            x, y = lines["stage"], lines["value"]
            figure.add_scatter(x=x, y=y, error_y=error, name=name, line=line, legendgroup=name, **where)
    return _dressed(figure.update_xaxes(title="parts edited", dtick=1), height=240 * -(-len(tests) // columns) + 140)


def _of_report(report: Report) -> Iterator[tuple[str, go.Figure, pd.DataFrame]]:
    rows = [row for row in report.weights if " after " not in row]
    own = report.select(rows=rows)
    frame, curves = results_frame(own), curves_frame(own)
    formats = [test for test in dict.fromkeys(frame["test"]) if test.startswith(("forget, ", "retain, "))]
    yield "formats", own.select(tests=formats).plot(), frame[frame["test"].isin(formats)]
    tests = dict.fromkeys(curves["test"]) if len(curves) else {}
    attacks = [test for test in tests if test != "probe"]
    if attacks:
        yield "relearning", own.plot_curves(attacks), curves[curves["test"].isin(attacks)]
    if "probe" in tests:
        yield "probes", own.plot_layers(["probe"]), curves[curves["test"] == "probe"]


def _of_stages(report: Report) -> Iterator[tuple[str, go.Figure, pd.DataFrame]]:
    frame = results_frame(report)
    parts = frame["row"].str.extract(rf"^(?P<localization>.+), after (?P<stage>\d) of {PARTS}$")
    stages = pd.concat([parts, frame.drop(columns=["row"])], axis=1).dropna(subset=["stage"])
    if len(stages):
        yield "stages", stages_figure(stages), stages


def _groups(frame: pd.DataFrame, *by: str) -> Iterator[tuple[Any, ...]]:
    for names, lines in frame.groupby(list(by), sort=False):
        yield (*names, lines)


def _color(localization: str) -> str:
    return COLORS[LOCALIZATIONS.index(localization)]


def _dressed(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        height=height,
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
    )
    return figure.update_yaxes(range=[0, 1.05])


def _signed(figure: go.Figure, name: str, about: dict[str, Any]) -> go.Figure:
    """With its name, and where its numbers are from, as the title."""
    setup, seeds = about["setup"], about["seeds"]
    text = f"{setup['model']} {setup['fingerprint'][:12]}, seeds {seeds}, mechunlearn {about['mechunlearn']}"
    title = {"text": f"{name} <span style='font-size: 11px'>({text})</span>", "x": 0, "xanchor": "left"}
    return go.Figure(figure).update_layout(title=title, margin={"t": 80})
