"""docs/results.md says what its CSV files say, and nothing else."""

from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]


ABOUT = (
    '# {"seeds": [0, 1], "versions": {"torch": "2"}, "setup": {"model": "shipped", "fingerprint": "abc", "steps": 2, '
    '"athletes_steps": 2, "batch_size": 4, "text_batch_size": 2, "learning_rates": [0.001], '
    '"relearn_steps": 2, "relearn_batch_size": 4, "relearn_rate": 0.001, "paper": null}}\n'
)


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Basketball erased at two places; what a verdict may rest on is written by hand."""
    (tmp_path / "results" / "reproduction").mkdir(parents=True)
    about = {"task": "sport", "mode": "erase"}
    place = {"task": "sport", "part": "part-1", "weights": 1000}
    mlps = "attribution patching mlps"
    frames = {
        "results": [
            {
                **about,
                "row": row,
                "test": "forget, trained prompt",
                "value": value,
                "low": value,
                "high": value,
                "n": 33,
            }
            for row, value in (("original", 1.0), ("fact lookup", 0.125), ("random", 0.5))
        ],
        "differences": [
            {**about, "row": row, "test": test, "difference": difference, "low": low, "high": high}
            for row, test, difference, low, high in (
                ("random", "forget, multiple choice", 0.5, 0.25, 0.75),  # holds
                ("random", "relearning, less nobody", -0.5, -0.75, -0.25),  # reversed
                ("random", "forget, paraphrases", 0.005, 0.004, 0.006),  # too small to say
                ("all mlps", "relearning, less nobody", 0.5, -0.1, 1.1),  # too uncertain to say
                ("all mlps", "forget, trained prompt", 0.5, 0.4, 0.6),  # not counted
                (mlps, "relearning, less nobody", 0.5, 0.4, 0.6),  # the same components: left out
            )
        ],
        "masks": [
            {**place, "localization": "fact lookup", "shared with fact lookup": 1, "components": "L0MLP"},
            {**place, "localization": mlps, "shared with fact lookup": 1, "components": "L0MLP"},
        ],
    }
    for name, rows in frames.items():
        path = tmp_path / "results" / "reproduction" / f"{name}.csv"
        path.write_text(ABOUT + pd.DataFrame(rows).to_csv(index=False))
    return tmp_path / "results"


def test_the_verdict_is_counted_from_intervals(examples, folder):
    from paper.page import page

    written = page(folder)
    assert "in all: holds in 1 of 4, reversed in 1" in written
    assert "relearning, less nobody: holds in 0 of 2, reversed in 1" in written
    assert "| random | 1 | 1 | 1 |" in written
    assert "| all mlps | 0 | 1 | 0 |" in written
    assert "| erasure | attention too | 0 / 0 / 0 | 1 / 1 / 1 | 1 / 0 / 0 |" in written  # what they cost is not known
    assert "| erasure | other MLPs | 0 / 0 / 0 | 0 / 1 / 0 | 0 / 0 / 0 |" in written
    assert "the same components as fact lookup: attribution patching mlps (sport)" in written


def test_only_edits_that_cost_alike_are_compared_like_with_like(examples, folder):
    """The random place forgot .04 less and kept all the rest: alike; with .06 it would not be."""
    from paper.summary import compared

    about = {"task": "sport", "mode": "erase", "row": "random"}
    costs = ("retain, trained prompt", "retain, multiple choice", "other knowledge")
    masks = pd.read_csv(folder / "reproduction" / "masks.csv", comment="#")
    for difference, alike in ((0.04, True), (0.06, False)):
        rows = [{**about, "test": test, "difference": 0.0, "low": 0.0, "high": 0.0} for test in costs]
        rows += [{**about, "test": "forget, trained prompt", "difference": difference, "low": 0.01, "high": 0.1}]
        rows += [{**about, "test": "forget, multiple choice", "difference": 0.5, "low": 0.4, "high": 0.6}]
        every, _ = compared(pd.DataFrame(rows), masks)
        assert every.set_index("test").loc["forget, multiple choice", ["verdict", "alike"]].tolist() == ["holds", alike]
    nothing = pd.DataFrame(columns=["task", "mode", "row", "test", "difference", "low", "high"])
    assert not len(compared(nothing, masks)[0])


def test_differences_are_of_seeds_that_both_have(examples):
    """Fact lookup with two seeds, another place with the second alone: .9 - .3, not .9 less the mean of both."""
    import torch
    from paper.tables import differences_frame

    from mechunlearn.evaluate import Cell, Report, Result

    def cell(row: str, seed: int, value: float) -> Cell:
        return Cell(row, "x", seed, Result(torch.full((4,), value), "accuracy", 0.25, "share", (*"abcd",)))

    cells = (cell("fact lookup", 0, 0.1), cell("fact lookup", 1, 0.3), cell("random", 1, 0.9), cell("all mlps", 2, 0.9))
    found = differences_frame(Report(cells, {"fact lookup": 1, "random": 1, "all mlps": 1}, {}))
    assert found.set_index("row")["difference"].dropna().to_dict() == {"random": pytest.approx(0.6)}


def test_means_over_tasks_are_of_each_localization(examples, folder):
    """0.125 for the sport and 0.375 for another task; what no row was asked has no column."""
    from paper.page import page

    path = folder / "reproduction" / "results.csv"
    lines = path.read_text()
    for row in ("original", "fact lookup", "random"):
        value = 0.375 if row == "fact lookup" else 1.0
        lines += f'counterfact-16,erase,{row},"forget, trained prompt",{value},{value},{value},13\n'
    lines += 'counterfact-64,erase,fact lookup,"forget, trained prompt",0.9,0.9,0.9,51\n'  # not every row: left out
    path.write_text(lines)
    written = page(folder)
    assert (
        "### Erasure: means over sport, counterfact-16\n\n|  | trained prompt |\n| --- | --- |\n| original |" in written
    )
    assert "| fact lookup | 0.25 |" in written


def test_published_numbers_stand_beside_our_own(examples, folder):
    from paper.page import page

    assert "| fact lookup | 0.12 [0.12, 0.12] (0.00)" in page(folder)  # the paper's 0.002
    assert "| original | 1.00 [1.00, 1.00] |" in page(folder)


def test_relearning_counts_less_what_is_said_of_nobody(examples):
    """By hand: .9 and .5 of the facts, .4 of nobody each."""
    import torch
    from paper.derived import with_derived

    from mechunlearn.evaluate import Cell, Report, Result

    nobody = Result(torch.tensor([0.4, 0.4]), "accuracy", 0.25)
    found = Result(torch.tensor([0.9, 0.5]), "accuracy", 0.25, "share", ("a", "b"), control=nobody)
    cells = (Cell("edit", "relearning", 0, found), Cell("edit", "probe", 0, found))
    made = with_derived(Report(cells, {"edit": 7}, {})).cells
    assert [cell.test for cell in made] == ["relearning", "probe", "relearning, less nobody"]
    assert made[2].result is not None
    assert made[2].result.per_example.tolist() == pytest.approx([0.5, 0.1])
    assert made[2].result.names == ("a", "b")


def test_equal_files_give_an_equal_page_without_a_run(examples, folder, monkeypatch):
    import sys

    import write_results
    from paper.page import page

    monkeypatch.setattr(sys, "argv", ["write_results.py", str(folder.with_suffix(".md"))])
    write_results.main()
    assert folder.with_suffix(".md").read_text() == page(folder)


def test_a_run_on_the_deeper_model_has_a_section_of_its_own(examples, folder, tmp_path):
    """Published beside the other run, not over it; what both took is one sum."""
    import write_results

    run = tmp_path / "run"
    (run / "tables").mkdir(parents=True)
    (run / "setup.json").write_text('{"model": "deeper"}')
    costs = ABOUT + "task,work,pieces,CPU seconds\nsport,erase,2,600\n"
    (folder / "reproduction" / "costs.csv").write_text(costs)
    for path in (folder / "reproduction").glob("*.csv"):
        text = path.read_text().replace('"model": "shipped"', '"model": "deeper"').replace("0.125", "0.25")
        (run / "tables" / path.name).write_text(text)
    write_results.publish(run, folder.with_suffix(".md"))
    written = folder.with_suffix(".md").read_text()
    first, second = written.split("## The deeper model")
    assert "Model: the shipped model" in first
    assert "Model: the deeper model" in second
    assert "That takes 20 CPU minutes (the experiments 10, those on the deeper model 10)" in first
    assert "| fact lookup | 0.12 |" in first
    assert "| fact lookup | 0.25 |" in second
    assert first.count("in all: holds in 1 of 4, reversed in 1") == second.count("in all: holds in 1 of 4") == 1


def test_the_page_of_the_documents_is_what_its_files_say(examples):
    from paper.page import page

    written = ROOT / "docs" / "results.md"
    if not written.exists():
        pytest.skip("docs/results.md is not written yet")
    assert written.read_text(encoding="utf-8") == page(ROOT / "docs" / "results")


def test_a_budget_is_filled_in_order_of_score_with_what_still_fits(examples, llama):
    """An MLP has 3 x 32 x 64 = 6,144 weights, an attention layer with two KV heads 3,072."""
    from paper.places import matched

    import mechunlearn as mu

    sizes = mu.shape(llama)
    like = mu.ComponentMask.of(["L1MLP"], sizes)
    assert (like.n_parameters, sizes.n_parameters(mu.ComponentMask.of(["L0ATTN"], sizes))) == (6144, 3072)
    scores = {"L0ATTN": -3.0, "L0MLP": 2.0, "L2ATTN": 1.0, "L1ATTN": 0.5}
    found = mu.ComponentScores.of(scores, sizes)
    assert matched(found, like) == mu.ComponentMask.of(["L0ATTN", "L2ATTN"], sizes)
    assert matched(found, like, set(mu.components.mlps(sizes))) == mu.ComponentMask.of(["L0MLP"], sizes)


def test_whether_edits_that_keep_more_are_relearned_more_is_a_rank_correlation_for_each_task(examples):
    from paper.page import kept_and_relearned

    rows = []
    for task, relearned in (("one", [0.1, 0.2, 0.3]), ("two", [0.3, 0.2, 0.1])):
        for row, kept, back in zip(("fact lookup", "random", "all mlps"), [0.5, 0.6, 0.9], relearned, strict=True):
            rows.append((task, "inject", row, "retain, multiple choice", kept))
            rows.append((task, "inject", row, "relearning, multiple choice, less nobody", back))
        rows += [(task, "inject", "original", "retain, multiple choice", 1.0)]
        rows += [(task, "inject", "original", "relearning, multiple choice, less nobody", 0.2)]
    results = pd.DataFrame(rows, columns=["task", "mode", "row", "test", "value"])
    assert "for one, injection, 1.00; for two, injection, -1.00." in next(kept_and_relearned(results))
    assert not [*kept_and_relearned(results[results["test"] == "retain, multiple choice"])]
