import math

import pytest
import tiny
import torch
from conftest import shared
from state import left_as_it_was
from travelling import nudged

import mechunlearn as mu
from mechunlearn.evaluate import Result, compare, every_format, paper_metrics

CHOSEN = {name: test for name, test in paper_metrics.items() if "multiple choice" not in name}


def compared(model):
    task = tiny.task(model)
    edits = {"mlp": nudged(model, "L1MLP"), "head": nudged(model, "L2H1")}
    with left_as_it_was(model):
        return compare(model, task, edits, metrics=CHOSEN, progress=False)


@pytest.fixture(scope="module")
def report():
    return compared(shared("bridge", "llama"))


def test_the_table_has_the_original_first_and_the_number_of_edited_weights_last(model):
    report = compared(model)
    assert list(report.table.index) == ["original", "mlp", "head"]
    assert list(report.table.columns) == [*CHOSEN, "edited weights"]
    sizes = mu.shape(model)
    expected = [0, *(sizes.n_parameters([mu.Component.parse(label)]) for label in ("L1MLP", "L2H1"))]
    assert report.table["edited weights"].tolist() == expected
    assert not report.table.isna().any().any()
    assert (report.table.iloc[0] != report.table.iloc[1]).all()


def test_markdown_and_plot_show_every_row_and_chance(report):
    text = report.to_markdown()
    assert all(f"| {row} |" in text for row in ("original", "mlp", "head", "*chance*"))
    assert "0.250" in text
    assert "mean probability over the candidates" in text
    names = {trace.name for trace in report.plot().data}
    assert names == {"original", "mlp", "head", "chance"}


def test_intervals_hold_the_value_and_say_what_was_measured(report):
    frame = report.intervals
    assert (frame["low"] <= frame["value"] + 1e-9).all()
    assert (frame["value"] <= frame["high"] + 1e-9).all()
    assert frame.loc[("mlp", "text loss"), "chance"] == pytest.approx(math.log(tiny.N_VOCAB))


def test_every_format_and_side_is_tested_by_default(llama):
    task = tiny.task(llama)
    report = compare(llama, task, {}, progress=False)
    formats = {f"{side}, {name}" for name in ("trained prompt", "question") for side in ("forget", "retain")}
    assert {*formats, "other knowledge", "text loss"} <= set(report.table.columns)
    assert list(report.table.columns) == [*every_format(task), "edited weights"]


def test_differences_are_paired(report):
    frame, table = report.against("original"), report.table
    for row in ("mlp", "head"):
        for test in CHOSEN:
            found = frame.loc[(row, test)]
            assert found["difference"] == pytest.approx(table.loc[row, test] - table.loc["original", test], abs=1e-6)
            assert found["low"] <= found["difference"] + 1e-9
            assert found["difference"] <= found["high"] + 1e-9


def test_a_researchers_own_test_is_a_column(llama):
    def eleven(model, task):
        return Result(torch.tensor([10.0, 12.0]), "a constant")

    report = compare(llama, tiny.task(llama), {}, metrics={"mine": eleven}, progress=False)
    assert report.table.loc["original", "mine"] == 11.0


def test_accuracy_in_its_three_senses_by_hand(llama):
    """Against plain logits of the whole batch, one prompt at a time."""
    prompts = tiny.prompts(llama)
    found = mu.evaluate.accuracy(llama, prompts, batch_size=4)
    for i in range(len(prompts)):
        one = prompts[[i]]
        logits = llama(one.tokens, attention_mask=one.attention_mask.long())[0, int(one.positions[0, 0])]
        shares = logits[one.candidates[0]].softmax(0)
        assert float(found.probability.per_example[i]) == pytest.approx(float(shares[0]), abs=1e-5)
        assert bool(found.candidates.per_example[i]) == (int(shares.argmax()) == 0)
        assert bool(found.vocabulary.per_example[i]) == (int(logits.argmax()) == int(one.answers[0, 0]))
    assert found.candidates.chance == found.probability.chance == 0.25


def test_text_loss_is_the_mean_cross_entropy(model):
    task = tiny.task(model)
    logits = model(task.text_test, attention_mask=torch.ones_like(task.text_test))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), task.text_test[:, 1:].flatten())
    assert mu.evaluate.text_loss(model, task).value == pytest.approx(float(expected), rel=1e-5)


def test_text_is_read_as_far_as_is_asked(llama):
    task = tiny.task(llama)
    n, whole = len(task.text_test) - 1, mu.evaluate.text_loss(llama, task).per_example
    of_two = mu.evaluate.every_format(task, text_rows=2)["text loss"](llama, task).per_example
    assert mu.evaluate.text_loss(llama, task, rows=n).per_example.tolist() == pytest.approx(whole[:n].tolist())
    assert of_two.tolist() == pytest.approx(whole[:2].tolist())
    for rows in (0, n + 2):
        with pytest.raises(ValueError, match=rf"rows must lie in 1..{n + 1} .* got {rows}"):
            mu.evaluate.text_loss(llama, task, rows=rows)


def test_an_edit_that_changes_nothing_scores_like_the_original(model):
    task = tiny.task(model)
    nothing = nudged(model, size=0.0)
    table = compare(model, task, {"nothing": nothing}, metrics=CHOSEN, progress=False).table
    assert torch.equal(torch.tensor(table.iloc[0, :-1].tolist()), torch.tensor(table.iloc[1, :-1].tolist()))
