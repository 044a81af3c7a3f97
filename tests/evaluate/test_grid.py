"""Rows, tests and seeds: what is run with what, and what happens when it goes wrong."""

import json
import re
from functools import partial

import pytest
import tiny
import torch
from state import left_as_it_was
from travelling import calls, counted, distance, failing, interrupting, noisy, nudged, probability, same, same_report

import mechunlearn as mu
from mechunlearn.evaluate import Result, compare
from mechunlearn.evaluate.results import pooled
from mechunlearn.model import slots
from mechunlearn.model.guard import Snapshot

run = partial(compare, progress=False)


@pytest.fixture
def task(llama):
    return tiny.task(llama)


def places(report):
    return [(cell.row, cell.test, cell.seed) for cell in report.cells]


def test_what_names_a_seed_runs_with_every_seed_and_what_does_not_runs_once(llama, task):
    metrics = {"noise": noisy, "plain": probability, "bound": partial(noisy, seed=7)}
    report = run(llama, task, {"edit": nudged(llama)}, metrics=metrics, seeds=(3, 1))
    each = [("noise", 3), ("noise", 1), ("plain", 3), ("bound", 3)]
    assert places(report) == [(row, *rest) for row in ("original", "edit") for rest in each]
    found = {(cell.row, cell.test, cell.seed): cell.result for cell in report.cells}
    for seed in (3, 1):
        curve = found["edit", "noise", seed].curve
        assert torch.equal(curve.per_prompt, torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)))
    bound = found["edit", "bound", 3].curve
    assert torch.equal(bound.per_prompt, torch.randn(6, 3, generator=torch.Generator().manual_seed(7)))


def test_the_first_of_several_edits_is_tested_with_the_first_seed(llama, task, tmp_path):
    edits = [nudged(llama, seed=seed) for seed in (0, 1, 2)]
    log = tmp_path / "log"
    metrics = {"a": partial(counted, log=str(log), name="a"), "plain": probability}
    with left_as_it_was(llama):
        report = run(llama, task, {"three": edits}, metrics=metrics, seeds=(5, 6, 7))
    prints = []
    for edit in edits:
        with edit.applied(llama):
            prints.append(mu.fingerprint(llama))
    clean = [f"a {seed} {mu.fingerprint(llama)}" for seed in (5, 6, 7)]
    assert calls(log) == clean + [f"a {seed} {found}" for seed, found in zip((5, 6, 7), prints, strict=True)]
    rows = [cell for cell in report.cells if (cell.row, cell.test) == ("three", "plain")]
    assert [cell.seed for cell in rows] == [5, 6, 7]
    for cell, edit in zip(rows, edits, strict=True):
        with edit.applied(llama):
            assert same(cell.result, probability(llama, task))
    assert report.weights == {"original": 0, "three": edits[0].n_parameters}


def test_every_row_can_be_held_against_the_original_model(model):
    """Distance 0 on the original row; on others that to the logits of the original, worked out beside it."""
    task, edit = tiny.task(model), nudged(model)
    before = task.forget.logits(model).flatten(1).detach()
    with edit.applied(model):
        edited = task.forget.logits(model).flatten(1).detach()
    with left_as_it_was(model):
        report = run(model, task, {"edit": edit}, metrics={"distance": distance})
    assert report.results["original"]["distance"].per_example.abs().max() == 0
    expected = (edited - before).abs().mean(1)
    assert torch.equal(report.results["edit"]["distance"].per_example, expected)
    assert expected.min() > 0


def test_the_edited_weights_are_back_after_the_original_ones_also_when_it_raises(llama, task):
    clean, seen = mu.fingerprint(llama), []

    def looking(model, task, *, original):
        seen.append(mu.fingerprint(model))
        with original() as inner:
            assert inner is model
            seen.append(mu.fingerprint(model))
            with original():
                seen.append(mu.fingerprint(model))
        seen.append(mu.fingerprint(model))
        with pytest.raises(ArithmeticError), original():
            raise ArithmeticError
        seen.append(mu.fingerprint(model))
        return probability(model, task)

    edit = nudged(llama)
    with edit.applied(llama):
        edited = mu.fingerprint(llama)
    report = run(llama, task, {"edit": edit}, metrics={"x": looking})
    assert not any(cell.error for cell in report.cells)
    assert seen == [clean] * 5 + [edited, clean, clean, edited, edited]


def test_a_control_is_tested_in_the_same_way_and_held_against_the_original(llama, task):
    other = tiny.bridge("llama", seed=5)
    with left_as_it_was(llama), left_as_it_was(other):
        report = run(llama, task, {}, metrics={"p": probability, "d": distance}, controls={"other": other})
    assert list(report.results) == ["original", "other"]
    assert same(report.results["other"]["p"], probability(other, task))
    difference = task.forget.logits(other).flatten(1) - task.forget.logits(llama).flatten(1)
    assert torch.equal(report.results["other"]["d"].per_example, difference.abs().mean(1).detach())
    loaded = run(llama, task, {}, metrics={"p": probability}, controls={"other": partial(tiny.bridge, "llama", seed=5)})
    assert same(loaded.results["other"]["p"], report.results["other"]["p"])


def test_the_original_model_is_refused_where_an_attack_is_still_in_the_weights(llama, task):
    def attacking(model, task, *, original):
        weight = slots(model)[0, "W_O"].parameter
        saved = weight.detach().clone()
        with torch.no_grad():
            weight.add_(1.0)
        try:
            with original():
                pass
        finally:
            with torch.no_grad():
                weight.copy_(saved)

    with left_as_it_was(llama):
        report = run(llama, task, {"edit": nudged(llama)}, metrics={"x": attacking})
    assert all("undo what else has changed" in cell.error for cell in report.cells)


def wrong_number(model, task):
    return 0.5


def undefined(model, task):
    return Result(torch.tensor([0.5, float("nan")]), "x")


def undefined_control(model, task):
    return Result(torch.tensor([0.5]), "x", control=undefined(model, task))


def empty(model, task):
    return Result(torch.zeros(0), "x")


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (failing, "ArithmeticError: of no use"),
        (wrong_number, "ValueError: expected a test .* for the column 'x'.*returns float.*wrap the number"),
        (undefined, r"ValueError: expected finite values from the test 'x', got NaN or infinity for examples \[1\]"),
        (undefined_control, r"ValueError: expected finite values from the test 'control of x'"),
        (empty, "ValueError: expected finite values from the test 'x', got none"),
    ],
)
def test_a_test_that_fails_says_so_in_its_cell_and_the_others_are_kept(llama, task, test, message):
    with left_as_it_was(llama):
        report = run(llama, task, {"edit": nudged(llama)}, metrics={"x": test, "p": probability})
    failed = [cell for cell in report.cells if cell.test == "x"]
    assert [cell.row for cell in failed] == ["original", "edit"]
    for cell in failed:
        assert cell.result is None
        assert re.match(message, cell.error)
    assert all(cell.result is not None for cell in report.cells if cell.test == "p")


def test_yes_and_no_are_numbers(llama, task, unchecked):
    report = run(llama, task, {}, metrics={"x": lambda *_: Result(torch.tensor([True, False]), "x")})
    assert report.results["original"]["x"].value == 0.5


def test_an_interrupt_ends_all_and_leaves_the_model_as_it_was(llama, task):
    with left_as_it_was(llama), pytest.raises(KeyboardInterrupt):
        run(llama, task, {"edit": nudged(llama)}, metrics={"p": probability, "x": interrupting})


def left_changed(model, task, *, raising=False):
    with torch.no_grad():
        for weight in (slots(model)[1, "W_in"].parameter, next(iter(model.parameters()))):
            weight.data.add_(1.0)  # which the version counters of tensors do not see
    if raising:
        raise ArithmeticError("of no use")
    return probability(model, task)


def test_weights_that_a_test_has_changed_are_put_back_and_its_cell_says_so(model):
    task, edit = tiny.task(model), nudged(model)
    metrics = {"x": left_changed, "y": partial(left_changed, raising=True), "p": probability}
    with left_as_it_was(model):
        report = run(model, task, {"edit": edit}, metrics=metrics)
    broken = [cell for cell in report.cells if cell.test != "p"]
    for cell in broken:
        assert cell.result is None
        assert "expected a test that leaves the model as it was" in cell.error
        assert ("of no use" in cell.error) == (cell.test == "y")
    with edit.applied(model):
        assert same(report.results["edit"]["p"], probability(model, task))


def test_a_model_converted_by_a_test_is_put_back(llama, task):
    def halved(model, task):
        parameter = slots(model)[0, "W_Q"].parameter
        parameter.data = parameter.data.half()
        return probability(model, task)

    with left_as_it_was(llama, moved=True):  # the test has thrown the old memory away
        report = run(llama, task, {}, metrics={"x": halved})
        assert slots(llama)[0, "W_Q"].parameter.dtype == torch.float32
    assert report.cells[0].error


def test_parameters_that_came_cannot_be_put_back(llama):
    kept = Snapshot.of(llama)
    llama.original_model.register_parameter("new", torch.nn.Parameter(torch.zeros(2)))
    try:
        with pytest.raises(RuntimeError, match=r"expected a model with the parameters .* got others \(.*new\)"):
            kept.restore(llama)
    finally:
        del llama.original_model.new


def test_a_result_does_not_depend_on_what_ran_before_it(llama, task):
    """`noisy` draws from the global generator too, which afterwards is where it was."""
    torch.manual_seed(0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    one = run(llama, task, {}, metrics={"a": noisy, "b": probability}, seeds=(1, 2))
    assert torch.equal(torch.rand(3), drawn)
    other = run(llama, task, {}, metrics={"b": probability, "a": noisy}, seeds=(2, 1))
    for seed in (1, 2):
        first, second = (next(c for c in r.cells if (c.test, c.seed) == ("a", seed)) for r in (one, other))
        assert same(first.result, second.result)


def refused(message):
    return pytest.raises(ValueError, match=message)


def test_bad_arguments_are_refused_before_anything_runs(llama, task, tmp_path, unchecked):
    def never(model, task):
        pytest.fail("ran")

    edit, metrics = nudged(llama), {"x": never}
    with left_as_it_was(llama):
        for edits, message in (
            ({"original": edit}, 'expected names other than "original"'),
            ({"e": [edit, edit]}, "expected one edit for each of the 1 seeds, got 2 for 'e'"),
            ({"e": [0.5]}, "expected edits .* got float for 'e'"),
        ):
            with refused(message):
                run(llama, task, edits, metrics=metrics)
        for options, message in (
            ({"metrics": {}}, "expected tests .* got none"),
            ({"metrics": {"x": 0.5}}, "expected tests .* got float for 'x'"),
            ({"seeds": ()}, "expected different whole numbers as seeds"),
            ({"seeds": (1, 1)}, r"expected different whole numbers as seeds.*got \(1, 1\)"),
            ({"controls": {"original": llama}}, 'expected names other than "original"'),
            ({"controls": {"e": llama}}, "expected other names for controls than for edits"),
            ({"controls": {"twin": llama}}, "expected another model as the control 'twin'"),
            ({"results": tmp_path / "none" / "cells"}, "expected results in a folder that exists"),
        ):
            with refused(message):
                run(llama, task, {"e": edit}, **{"metrics": metrics, **options})


def test_a_control_with_another_vocabulary_is_refused(llama, task, shipped):
    with refused(r"expected a control with the vocabulary of the model \(101 tokens\)"):
        run(llama, task, {}, metrics={"p": probability}, controls={"other": shipped})


def test_the_provenance_is_json_and_says_what_was_done(llama, task):
    edits = {"e": [nudged(llama, seed=0), nudged(llama, seed=1)]}
    metrics = {"forget": partial(mu.evaluate.in_format, name="question", side="forget"), "noise": noisy}
    report = run(llama, task, edits, metrics=metrics, seeds=(0, 1), controls={"twin": tiny.bridge("llama", seed=5)})
    found = json.loads(json.dumps(report.provenance))
    assert found["model"] == mu.fingerprint(llama)
    assert found["seeds"] == [0, 1]
    assert found["metrics"]["forget"] == "mechunlearn.evaluate.asking.in_format(name=question, side=forget)"
    assert found["rows"]["e"]["components"] == [["L1MLP"]] * 2
    assert [made["seed"] for made in found["rows"]["e"]["provenance"]] == [0, 1]
    assert found["rows"]["twin"]["control"] == mu.fingerprint(tiny.bridge("llama", seed=5))
    assert set(found["versions"]) >= {"mechunlearn", "torch", "transformer_lens"}


def test_the_bar_names_row_and_test(llama, task, capsys):
    compare(llama, task, {"mine": nudged(llama)}, metrics={"the test": probability})
    shown = capsys.readouterr().err
    assert "0/2" in shown
    assert "original: the test" in shown
    assert "mine: the test" in shown


def test_the_same_grid_gives_the_same_report(llama, task):
    options = {"metrics": {"n": noisy, "d": distance}, "seeds": (0, 1)}
    edits = {"e": nudged(llama)}
    one, other = (run(llama, task, edits, **options) for _ in range(2))
    assert same_report(one, other)
    assert not same_report(one, run(llama, task, {"e": nudged(llama, seed=1)}, **options))


def test_seeds_are_pooled_by_example_by_hand():
    one = Result(torch.tensor([0.0, 1.0]), "x", 0.25, "share", ("a", "b"))
    other = Result(torch.tensor([0.5, 0.0]), "x", 0.25, "share", ("a", "b"))
    assert pooled([one]) is one
    both = pooled([one, other])
    assert both.per_example.tolist() == [0.25, 0.5]
    assert (both.sense, both.chance, both.unit, both.names) == ("x", 0.25, "share", ("a", "b"))
    apart = pooled([one, Result(torch.tensor([0.5, 0.0, 1.0]), "x", names=("b", "c", "d"))])
    assert apart.per_example.tolist() == [0.0, 1.0, 0.5, 0.0, 1.0]
    assert apart.names == ("a", "b", "b", "c", "d")
