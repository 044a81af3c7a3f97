"""docs/results.md says what its CSV files say, and nothing else."""

from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.once

ABOUT = (
    '# {"seeds": [0, 1], "versions": {"torch": "2"}, "setup": {"model": "shipped", "fingerprint": "abc", "steps": 2, '
    '"athletes_steps": 2, "batch_size": 4, "text_batch_size": 2, "learning_rates": [0.001], '
    '"relearn_steps": 2, "paper": null}}\n'
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
    from reproduction.page import page

    written = page(folder)
    assert "in all: holds in 1 of 4, reversed in 1" in written
    assert "relearning, less nobody: holds in 0 of 2, reversed in 1" in written
    assert "| random | 1 | 1 | 1 |" in written
    assert "| all mlps | 0 | 1 | 0 |" in written
    assert "| erasure | attention too | 1 | 1 | 1 | 1 / 0 / 0 |" in written
    assert "| erasure | other MLPs | 0 | 1 | 0 | 0 / 0 / 0 |" in written
    assert "the same components as fact lookup: attribution patching mlps (sport)" in written


def test_means_over_tasks_are_of_each_localization(examples, folder):
    """0.125 for the sport and 0.375 for another task; what no row was asked has no column."""
    from reproduction.page import page

    path = folder / "reproduction" / "results.csv"
    lines = path.read_text()
    path.write_text(lines + 'counterfact-16,erase,fact lookup,"forget, trained prompt",0.375,0.375,0.375,13\n')
    written = page(folder)
    assert "### Erasure, means over 2 tasks\n\n|  | trained prompt |\n| --- | --- |\n| original | 1.00 |" in written
    assert "| fact lookup | 0.25 |" in written


def test_published_numbers_stand_beside_our_own(examples, folder):
    from reproduction.page import page

    assert "| fact lookup | 0.12 [0.12, 0.12] (0.00)" in page(folder)  # the paper's 0.002
    assert "| original | 1.00 [1.00, 1.00] |" in page(folder)


def test_relearning_counts_less_what_is_said_of_nobody(examples):
    """By hand: .9 and .5 of the facts, .4 of nobody each."""
    import torch
    from reproduction.tables import with_less_nobody

    from mechunlearn.evaluate import Cell, Report, Result

    nobody = Result(torch.tensor([0.4, 0.4]), "accuracy", 0.25)
    found = Result(torch.tensor([0.9, 0.5]), "accuracy", 0.25, "share", ("a", "b"), control=nobody)
    cells = (Cell("edit", "relearning", 0, found), Cell("edit", "probe", 0, found))
    made = with_less_nobody(Report(cells, {"edit": 7}, {})).cells
    assert [cell.test for cell in made] == ["relearning", "probe", "relearning, less nobody"]
    assert made[2].result is not None
    assert made[2].result.per_example.tolist() == pytest.approx([0.5, 0.1])
    assert made[2].result.names == ("a", "b")


def test_equal_files_give_an_equal_page_without_a_run(examples, folder, monkeypatch):
    import sys

    import write_results
    from reproduction.page import page

    monkeypatch.setattr(sys, "argv", ["write_results.py", str(folder.with_suffix(".md"))])
    write_results.main()
    assert folder.with_suffix(".md").read_text() == page(folder)


def test_the_page_of_the_documents_is_what_its_files_say(examples):
    from reproduction.page import page

    written = ROOT / "docs" / "results.md"
    if not written.exists():
        pytest.skip("docs/results.md is not written yet")
    assert written.read_text(encoding="utf-8") == page(ROOT / "docs" / "results")


def test_a_budget_is_filled_in_order_of_score_with_what_still_fits(examples, llama):
    """An MLP has 3 x 32 x 64 = 6,144 weights, an attention layer with two KV heads 3,072."""
    from reproduction.places import matched

    import mechunlearn as mu

    sizes = mu.shape(llama)
    like = mu.ComponentMask.of(["L1MLP"], sizes)
    assert (like.n_parameters, sizes.n_parameters(mu.ComponentMask.of(["L0ATTN"], sizes))) == (6144, 3072)
    scores = {"L0ATTN": -3.0, "L0MLP": 2.0, "L2ATTN": 1.0, "L1ATTN": 0.5}
    found = mu.ComponentScores.of(scores, sizes)
    assert matched(found, like) == mu.ComponentMask.of(["L0ATTN", "L2ATTN"], sizes)
    assert matched(found, like, set(mu.components.mlps(sizes))) == mu.ComponentMask.of(["L0MLP"], sizes)
