"""Finished cells are on the disk, to the bit, and never computed again."""

import json
import multiprocessing
import os
import random
import signal
import warnings
from functools import partial

import pytest
import tiny
import torch
from travelling import calls, counted, failing, interrupting, noisy, nudged, probability, same_report

from mechunlearn.curve import Curve
from mechunlearn.evaluate import Cell, Result, compare
from mechunlearn.evaluate.grid.cells import CellsFile
from mechunlearn.identity import key_of

run = partial(compare, progress=False)


@pytest.fixture
def task(llama):
    return tiny.task(llama)


def cell(row="row", value=0.1):
    curve = Curve(("0", "8"), torch.tensor([[value, float("nan")], [1 / 3, -0.0]]), "x", 1 / 3, "steps")
    control = Result(torch.tensor([1e-40, value], dtype=torch.float64), "nobody", names=("a", "b"))
    result = Result(torch.tensor([value, 1 / 3]), "x", 0.1 + 0.2, "share", ("Zoë", 'a "b"\n'), curve, control)
    return Cell(row, "test", 3, result, "", 0.1 + 0.7)


def test_wherever_the_last_line_is_torn_the_others_are_there_and_the_file_goes_on(tmp_path):
    file = CellsFile(tmp_path / "cells.jsonl")
    file.append({"n": 1}, cell("one"))
    whole = file.path.stat().st_size
    file.append({"n": 2}, cell("two"))
    content = file.path.read_bytes()
    for stop in range(whole + 1, len(content) - 1, 97):
        file.path.write_bytes(content[:stop])
        with pytest.warns(UserWarning, match="line 2 of .* is torn or damaged: that cell is computed again"):
            assert list(file.finished()) == [key_of({"n": 1})]
        file.append({"n": 3}, cell("three"))
        with pytest.warns(UserWarning, match="line 2 of"):
            assert list(file.finished()) == [key_of({"n": 1}), key_of({"n": 3})]


def test_a_damaged_line_is_not_believed(tmp_path):
    file = CellsFile(tmp_path / "cells.jsonl")
    for n in (1, 2, 3):
        file.append({"n": n}, cell(str(n)))
    lines = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(lines[0] + lines[1].replace(b'"seconds": 0.', b'"seconds": 1.') + lines[2])
    with pytest.warns(UserWarning, match="line 2 of"):
        assert list(file.finished()) == [key_of({"n": 1}), key_of({"n": 3})]


def test_a_file_of_mechunlearn_0_1_0_is_refused(tmp_path):
    file = CellsFile(tmp_path / "cells.jsonl")
    file.path.write_text(json.dumps({"key": "0", "identity": {}, "cell": {}, "sha256": "0"}) + "\n")
    with pytest.raises(ValueError, match=r"got one of mechunlearn 0.1.0 at .*cells.jsonl: make it again"):
        file.finished()


def test_what_is_finished_is_read_and_what_failed_is_tried_again(llama, task, tmp_path):
    log, path = tmp_path / "log", tmp_path / "cells.jsonl"
    edits = {"e": nudged(llama)}
    metrics = {"a": partial(counted, log=str(log), name="a"), "x": failing}
    first = run(llama, task, edits, metrics=metrics, results=path)
    assert len(calls(log)) == 2
    lines = len(path.read_text().splitlines())
    again = run(llama, task, edits, metrics=metrics, results=path)
    assert same_report(first, again)
    assert [c.seconds for c in again.cells if c.result] == [c.seconds for c in first.cells if c.result]
    assert len(calls(log)) == 2
    assert len(path.read_text().splitlines()) == lines + 2  # the test that fails was tried again on both rows


def test_an_interrupt_keeps_the_finished_cells(llama, task, tmp_path):
    log, path = tmp_path / "log", tmp_path / "cells.jsonl"
    metrics = {"a": partial(counted, log=str(log), name="a"), "x": interrupting, "b": noisy}
    with pytest.raises(KeyboardInterrupt):
        run(llama, task, {}, metrics=metrics, results=path)
    assert len(calls(log)) == 1
    report = run(llama, task, {}, metrics={**metrics, "x": probability}, results=path)
    assert len(calls(log)) == 1
    assert all(cell.result is not None for cell in report.cells)


def other_code(model, task, *, seed, log, name):
    return counted(model, task, seed=seed + 0, log=log, name=name)


def test_more_rows_columns_and_seeds_are_added_to_the_file_and_other_cells_stay_in_it(llama, task, tmp_path):
    log, path = tmp_path / "log", tmp_path / "cells.jsonl"
    test = partial(counted, log=str(log), name="a")
    edit, other = nudged(llama), nudged(llama, seed=1)

    def computed(edits, *, seeds=(0,), asked=task, test=test, controls=None):
        before = len(calls(log))
        run(llama, asked, edits, metrics={"a": test}, seeds=seeds, results=path, controls=controls)
        return len(calls(log)) - before

    assert computed({"e": edit}) == 2
    assert computed({"e": edit}) == 0
    assert computed({"e": nudged(llama)}) == 0  # the same edit, made again
    assert computed({"e": edit}, seeds=(0, 1)) == 2
    assert computed({"e": other}) == 1  # another edit of that name; the original is known
    assert computed({"e": edit, "f": other}) == 1
    assert computed({"e": edit}, asked=tiny.task(llama, seed=50)) == 2
    assert computed({"e": edit}, test=partial(other_code, log=str(log), name="a")) == 2
    assert computed({}, controls={"t": tiny.bridge("llama", seed=5)}) == 1
    assert computed({}, controls={"t": partial(tiny.bridge, "llama", seed=5)}) == 0
    assert computed({"e": edit, "f": other}, seeds=(0, 1)) == 1  # f with seed 1
    assert computed({"e": edit}) == 0


SEEDS = (0, 1, 2)


def grid(model, log, path):
    edits = {"one": nudged(model), "several": [nudged(model, seed=seed) for seed in (5, 6, 7)]}
    metrics = {name: partial(counted, log=str(log), name=name, seconds=0.005) for name in "abcd"}
    return run(model, tiny.task(model), edits, metrics=metrics, seeds=SEEDS, results=path)


def going_on(model, log, path):
    grid(model, log, path)
    os._exit(0)


def finished(path):
    """What `counted` wrote down of the cells that are in the file, the torn one left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith(b"}\n")]
    return {line["content"]["cell"]["$Cell"]["result"]["$Result"]["sense"] for line in whole}


def test_killed_again_and_again_it_goes_on_and_computes_each_finished_cell_once(llama, tmp_path):
    """SIGKILL at random times, at least five; what is in the file after one is never started again."""
    log, path = tmp_path / "log", tmp_path / "cells.jsonl"
    context, rng = multiprocessing.get_context("fork"), random.Random(0)
    expected = grid(llama, log, None)
    every_call = calls(log)
    log.unlink()
    kills: list[tuple[set[str], int]] = []
    while len(kills) < 5 or not kills[-1][0]:
        begun, wanted = len(calls(log)), rng.randrange(5)
        child = context.Process(target=going_on, args=(llama, log, path))
        child.start()
        while child.exitcode is None and len(calls(log)) < begun + wanted:
            child.join(0.002)
        child.join(rng.uniform(0.0, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL, "it was done before it could be killed"
        kills.append((finished(path), len(calls(log))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a line that was torn
        report = grid(llama, log, path)
    for known, count in kills:
        assert not known & set(calls(log)[count:])
    assert same_report(report, expected)
    assert len(every_call) == len(set(every_call)) == 3 * 4 * len(SEEDS)
    assert set(calls(log)) == set(every_call)
    assert len(calls(log)) <= len(every_call) + len(kills)


def test_tests_of_one_name_do_not_share_a_cell_and_one_without_a_value_needs_no_file(llama, task, tmp_path):
    class Scaled:
        def __init__(self, by):
            self.by = by

        def __call__(self, model, task):
            return Result(torch.full((2,), float(self.by)), "x")

    def with_thing(thing):
        return lambda model, task: Scaled(1 if thing else 0)(model, task)

    def value(test, results):
        (cell,) = run(llama, task, {}, metrics={"a": test}, results=results).cells
        return cell.result.value

    path = tmp_path / "cells.jsonl"
    assert [value(Scaled(by), path) for by in (1, 2, 1)] == [1, 2, 1]
    assert [value(Scaled(by).__call__, path) for by in (3, 4)] == [3, 4]
    assert value(with_thing(object()), None) == 1
    with pytest.raises(ValueError, match="got a object, which nothing tells from another one"):
        value(with_thing(object()), path)
