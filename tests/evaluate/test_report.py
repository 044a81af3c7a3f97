"""Tables, frames, files: synthetic results whose numbers are known by hand."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from mechunlearn.curve import Curve
from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.report.report import Report
from mechunlearn.evaluate.report.tradeoffs import front, tradeoffs
from mechunlearn.evaluate.results import Result, interval_over_seeds
from mechunlearn.intervals import bootstrap

NAMES = ("a", "b", "c", "d")
PAPER = "mean probability over the candidates (the paper's accuracy)"


def share(*values: float, chance: float = 0.25, **more) -> Result:
    return Result(torch.tensor(values), PAPER, chance, "share", NAMES[: len(values)], **more)


def attack(start: float, end: float, *, axis: str = "steps") -> Result:
    values = torch.linspace(start, end, 3).expand(4, 3) + torch.tensor([-0.04, -0.01, 0.01, 0.04])[:, None]
    lower = Curve(("0", "5", "20"), values / 2, "probability", 0.25, axis)
    control = Result(values[:, -1] / 2, "nobody", 0.25, "share", curve=lower)
    curve = Curve(("0", "5", "20"), values, "probability", 0.25, axis)
    return Result.strongest(curve, "relearned", names=NAMES, control=control)


def loss(*values: float) -> Result:
    return Result(torch.tensor(values), "cross-entropy", math.log(50), "nats per token")


def cells(row: str, forget: float, kept: float, text: float, *, broken: bool = False) -> list[Cell]:
    found = [
        Cell(row, "forget, question", 0, share(forget, forget / 2, forget, forget / 2), "", 0.5),
        Cell(row, "retain, question", 0, share(kept, kept, kept / 2, kept / 2), "", 0.5),
        Cell(row, "text loss", 0, loss(text, text + 1), "", 0.5),
        Cell(row, "probe", 0, attack(forget / 2, forget * 0.9, axis="residual stream that enters layer")),
    ]
    for seed in (0, 1):
        failed = Cell(row, "relearning", seed, None, "FloatingPointError: a | b\nlost & 100 %_of_$it", 2.0)
        found.append(failed if broken else Cell(row, "relearning", seed, attack(forget, forget + 0.1 * (seed + 1))))
    return found


@pytest.fixture(scope="module")
def report() -> Report:
    found = [
        *cells("original", 0.8, 0.8, 2.0),
        *cells("MLPs <1-2> & co_50%", 0.2, 0.8, 2.1),
        *cells("random", 0.4, 0.4, 2.5, broken=True),
    ]
    return Report(
        tuple(found),
        {"original": 0, "MLPs <1-2> & co_50%": 131072, "random": 4_000_000},
        {"versions": {"torch": "2.13"}, "edits": {"random": {"components": [f"L{i}MLP" for i in range(99)]}}},
    )


def test_the_table_has_the_means_and_nan_where_a_test_failed(report):
    table = report.table
    assert list(table.index) == list(report.weights)
    assert list(table.columns) == [
        *("forget, question", "retain, question", "text loss", "probe", "relearning", "edited weights")
    ]
    assert table.loc["original", "forget, question"] == pytest.approx(0.6)
    assert table.loc["random", "text loss"] == pytest.approx(3.0)
    assert table.loc["original", "relearning"] == pytest.approx((0.9 + 1.0) / 2)
    assert math.isnan(table.loc["random", "relearning"])
    assert int(table.isna().sum().sum()) == 1
    assert table["edited weights"].tolist() == [0, 131072, 4_000_000]
    assert report.errors["seed"].tolist() == [0, 1]
    assert report.errors["error"].str.startswith("FloatingPointError").all()


def test_the_frame_has_one_line_per_cell_with_its_numbers(report):
    frame = report.to_frame()
    assert len(frame) == len(report.cells)
    for cell, line in zip(report.cells, frame.itertuples(), strict=True):
        assert (line.row, line.test, line.seed, line.seconds) == (cell.row, cell.test, cell.seed, cell.seconds)
        if cell.result is None:
            assert math.isnan(line.value)
            assert line.error == cell.error
        else:
            assert (line.low, line.high) == cell.result.interval()
            numbers = (cell.result.value, cell.result.chance, len(cell.result.per_example), cell.result.sense)
            assert (line.value, line.chance, line.n, line.sense) == numbers
            assert cell.result.control is None or line.control == cell.result.control.value


def test_the_long_frames_have_every_example_and_every_point(report):
    examples, curves = report.per_example(), report.curves()
    worked = [cell.result for cell in report.cells if cell.result is not None]
    assert len(examples) == sum(len(result.per_example) for result in worked)
    chosen = examples[(examples.row == "original") & (examples.test == "forget, question")]
    assert dict(zip(chosen.name, chosen.value, strict=True)) == pytest.approx({"a": 0.8, "b": 0.4, "c": 0.8, "d": 0.4})
    assert len(curves) == 3 * sum(result.curve is not None for result in worked)
    line = curves[(curves.row == "original") & (curves.test == "relearning") & (curves.seed == 1)].set_index("point")
    assert line["value"].tolist() == pytest.approx([0.8, 0.9, 1.0])
    assert line["control"].tolist() == pytest.approx([0.4, 0.45, 0.5])
    assert set(line["axis"]) == {"steps"}


def test_intervals_of_one_seed_are_the_results_own(report):
    first = report.cells[0].result
    line = report.intervals.loc[("original", "forget, question")]
    assert (line["low"], line["high"]) == first.interval()
    assert (line["n"], line["seeds"]) == (4, 1)
    assert report.intervals.loc[("original", "relearning"), "seeds"] == 2
    assert report.intervals.loc[("random", "relearning"), "seeds"] == 0


def noise(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(values: torch.Tensor) -> list[Result]:
    names = tuple(f"fact {i}" for i in range(values.shape[1]))
    return [Result(row, "x", names=names) for row in values]


def test_seeds_that_agree_leave_the_interval_over_facts():
    """Bit for bit that of one seed, which tests/test_intervals.py compares with scipy."""
    values = noise(30, 0)
    low, high = bootstrap(values)
    found = interval_over_seeds(results(torch.stack([values] * 4)), [0, 1, 2, 3])
    assert found == pytest.approx((float(low), float(high)), abs=1e-12)


def test_facts_that_agree_leave_the_interval_over_seeds_of_scipy():
    """Two bootstraps of 5000 draws: their ends differ by less than a tenth of a standard error."""
    means = noise(40, 1)
    found = interval_over_seeds(results(means[:, None].expand(40, 6)), range(40), draws=5000)
    options = {"n_resamples": 5000, "method": "percentile", "rng": np.random.default_rng(0)}
    expected = stats.bootstrap((means.numpy(),), np.mean, **options)
    ends = expected.confidence_interval
    assert found == pytest.approx((ends.low, ends.high), abs=0.1 * expected.standard_error)


def test_facts_and_seeds_add_their_variances():
    """Of fact + seed effects the squared width is the sum of the two (normal values, 40 of each; 10 % for draws)."""
    facts, seeds = noise(40, 2), noise(40, 3)

    def width(values: torch.Tensor) -> float:
        low, high = interval_over_seeds(results(values), range(40), draws=4000)
        return high - low

    both = width(facts[None] + seeds[:, None])
    apart = math.hypot(width(facts[None].expand(40, 40)), width(seeds[:, None].expand(40, 40)))
    assert both == pytest.approx(apart, rel=0.1)


def test_seeds_with_other_facts_and_only_right_answers_keep_an_honest_interval():
    """Clopper and Pearson over the six facts: 6 of 6 is no proof."""
    halves = [Result(torch.ones(3), "x", names=("a", "b", "c")), Result(torch.ones(3), "x", names=("d", "e", "f"))]
    expected = stats.binomtest(6, 6).proportion_ci(method="exact")
    found = interval_over_seeds(halves, [0, 1], draws=20_000)
    assert found == pytest.approx((expected.low, 1.0), abs=0.005)


def test_differences_are_paired_over_facts_and_seeds(report):
    frame = report.against("original")
    assert frame.loc[("random", "text loss")].tolist() == pytest.approx([0.5, 0.5, 0.5])
    found = frame.loc[("MLPs <1-2> & co_50%", "relearning")]
    assert found["difference"] == pytest.approx(-0.6)
    assert found["low"] < -0.6 < found["high"]
    assert frame.loc[("random", "relearning")].isna().all()
    with pytest.raises(ValueError, match="expected a row of the report"):
        report.against("nobody")


def test_a_test_without_randomness_is_paired_with_every_seed():
    """One original, three seeds of a random edit: differences .1, .2, .3 of every fact, by hand."""
    found = [Cell("original", "t", 0, share(0.5, 0.6, 0.7, 0.8))]
    found += [Cell("random", "t", i, share(*(x - 0.1 * (i + 1) for x in (0.5, 0.6, 0.7, 0.8)))) for i in range(3)]
    line = Report(tuple(found), {"original": 0, "random": 8}, {}).against("original").loc[("random", "t")]
    assert line["difference"] == pytest.approx(-0.2)
    assert -1 < line["low"] < -0.3
    assert -0.1 < line["high"] < 1


def test_markdown_shows_failures_and_their_reason_once(report):
    text = report.to_markdown()
    lines = text.splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}) == 1
    assert "| original | 0.600 | 0.600 | 2.500 | 0.720 | 0.950 | 0 |" in lines
    assert "| random | 0.300 | 0.300 | 3.000 | 0.360 | failed | 4,000,000 |" in lines
    assert "- failed: random, relearning (seeds 0, 1): FloatingPointError: a | b lost & 100 %_of_$it" in lines
    assert "- mean over up to 2 seeds" in lines
    assert any("*chance*" in line and "0.250" in line for line in lines)
    assert "0.600 [" in report.to_markdown(intervals=True)


def test_latex_is_balanced_and_escaped(report):
    lines = report.to_latex(intervals=True).splitlines()
    body = [line for line in lines if not line.startswith("%")]
    assert body[0] == r"\begin{tabular}{l*{6}{r}}"
    assert body[-1] == r"\end{tabular}"
    assert [sum(line == rule for line in body) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 2, 1]
    rows = [line for line in body if line.endswith(r" \\")]
    assert len(rows) == 1 + len(report.weights) + 1
    for row in rows:
        assert len(re.findall(r"(?<!\\)&", row)) == 6
        assert not re.findall(r"(?<!\\)[%$#_]|[<>|]", row)
        assert row.count("{") == row.count("}")
    assert r"MLPs \textless{}1-2\textgreater{} \& co\_50\%" in rows[2]


def assert_same(one: Result | None, other: Result | None) -> None:
    if one is None or other is None:
        assert one is other
        return
    assert (one.sense, one.chance, one.unit, one.names) == (other.sense, other.chance, other.unit, other.names)
    assert one.per_example.dtype == other.per_example.dtype
    assert torch.equal(one.per_example, other.per_example)
    assert (one.curve is None) == (other.curve is None)
    if one.curve is not None and other.curve is not None:
        assert torch.equal(one.curve.per_prompt, other.curve.per_prompt)
        assert vars(one.curve).keys() == vars(other.curve).keys()
        assert (one.curve.points, one.curve.axis) == (other.curve.points, other.curve.axis)
    assert_same(one.control, other.control)


def test_damage_and_knowledge_left_by_hand(report):
    """Loss rises by .1 and .5; a share counts by its fall (0 and .3); left are the means of forget."""
    found = tradeoffs(report.cells, ["forget, question"], "text loss")
    assert {row: round(harm.value, 6) for row, (harm, _) in found.items()} == {
        "original": 0.0,
        "MLPs <1-2> & co_50%": 0.1,
        "random": 0.5,
    }
    assert [round(left.value, 6) for _, left in found.values()] == [0.6, 0.15, 0.3]
    falls = tradeoffs(report.cells, ["forget, question"], "retain, question")
    assert [harm.value for harm, _ in falls.values()] == pytest.approx([0.0, 0.0, 0.3])
    assert list(tradeoffs(report.cells, ["relearning"], "text loss")) == ["original", "MLPs <1-2> & co_50%"]


def test_the_front_is_what_no_other_point_beats_in_both():
    points = {"a": (0.0, 0.9), "b": (0.1, 0.2), "c": (0.2, 0.2), "d": (0.5, 0.1), "e": (0.6, 0.9), "f": (0.1, 0.2)}
    assert sorted(front(points)) == [(0.0, 0.9), (0.1, 0.2), (0.5, 0.1)]


def test_plots_have_a_trace_for_each_row_with_its_numbers(report):
    figures = [report.plot(), report.plot_curves(), report.plot_layers(), report.plot_sizes(), report.plot_pareto()]
    for figure in figures:
        assert figure.layout.title.text
        assert len({trace.name for trace in figure.data if trace.showlegend is not False}) > 1
    bars = [trace for trace in figures[0].data if trace.type == "bar"]
    drawn = {(trace.legendgroup, trace.xaxis): trace.x for trace in bars}
    assert drawn[("original", "x")][0] == pytest.approx(0.6)
    assert drawn[("original", "x2")][0] == pytest.approx(0.6)
    assert drawn[("random", "x3")][1] is None  # relearning failed
    lines = {trace.legendgroup: trace.y for trace in figures[1].data if trace.mode == "lines+markers"}
    assert list(lines["original"]) == pytest.approx([0.8, 0.875, 0.95])
    assert "random" not in lines


def test_plots_without_numbers_say_so(report):
    bare = report.select(tests=["text loss"])
    with pytest.raises(ValueError, match="expected a test with such a curve"):
        bare.plot_curves()
    with pytest.raises(ValueError, match="expected tests of this report for forgetting"):
        bare.plot_pareto()
    with pytest.raises(ValueError, match="for damage"):
        report.plot_pareto(damage="perplexity")
    with pytest.raises(ValueError, match='expected the row "original"'):
        report.select(rows=["random"]).plot_pareto()


def test_select_keeps_the_order_given(report):
    small = report.select(rows=["random", "original"], tests=["text loss", "forget, question"])
    assert list(small.table.index) == ["random", "original"]
    assert list(small.table.columns) == ["text loss", "forget, question", "edited weights"]
    pd.testing.assert_series_equal(small.table.loc["random"], report.table.loc["random", list(small.table.columns)])
    with pytest.raises(ValueError, match="expected rows of the report"):
        report.select(rows=["nobody"])


def test_the_page_needs_nothing_else_and_shows_every_row_and_column(report, tmp_path):
    report.to_html(tmp_path / "report.html", title="Gone? <b>")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=\"(?!data:)", page)
    assert "@import" not in page
    assert "<title>Gone? &lt;b&gt;</title>" in page
    assert page.count('scope="row"') == len(report.weights) + 1
    assert page.count('scope="col"') == 7
    assert "MLPs &lt;1-2&gt; &amp; co_50%" in page
    assert '<td class="failed">failed</td>' in page
    assert "L98MLP" in page
    titles = re.findall("<h2[^>]*>(.*?)</h2>", page)
    assert titles == [
        *("Table", "Every way to ask", "Attacks over their budget", "What is left in each layer"),
        *("Size of the edit", "Forgetting against damage", "Provenance"),
    ]
    assert page.count('<div id="plot-') == page.count("<figcaption") == page.count('role="img" aria-label="Plot: ') == 7


def test_a_page_without_numbers_for_a_plot_leaves_it_out(report, tmp_path):
    report.select(tests=["text loss"]).to_html(tmp_path / "small.html")
    page = (tmp_path / "small.html").read_text(encoding="utf-8")
    assert re.findall("<h2[^>]*>(.*?)</h2>", page) == ["Table", "Provenance"]
    assert len(page) < 20000  # plotly.js is only there for plots


def test_a_test_without_chance_is_drawn_without_its_line(tmp_path):
    report = Report((Cell("original", "forget, x", 0, Result(torch.ones(3), "p", None, "share")),), {"original": 0}, {})
    figure = report.plot()
    assert list(figure.layout.shapes) == []
    report.to_html(tmp_path / "page.html")
    assert "NaN" not in (tmp_path / "page.html").read_text(encoding="utf-8").rpartition("const {template")[2]


def test_a_notebook_shows_the_table_with_chance(report):
    shown = report._repr_html_()
    assert "chance" in shown
    assert "0.250" in shown
    assert "failed" in shown


def test_many_tests_are_one_to_a_line():
    results = {f"test {i}": share(i / 20, 0.5) for i in range(13)}
    cells = tuple(Cell(row, test, 0, result) for row in ("original", "mlp") for test, result in results.items())
    report = Report(cells, {"original": 0, "mlp": 7}, {})
    head, _, first, *_ = report.to_markdown().splitlines()
    assert head == "|  | original | mlp | *chance* |"
    assert first == "| test 0 | 0.250 | 0.250 | 0.250 |"
    assert "| edited weights | 0 | 7 |  |" in report.to_markdown()
    assert report.to_latex().count(r"\\") == 15
    assert report._repr_html_().count("<tr>") == 15
