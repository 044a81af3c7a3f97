"""Other processes and threads give what one process gives, to the bit."""

import threading
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import tiny
from state import left_as_it_was
from travelling import (
    calls,
    counted,
    distance,
    failing,
    interrupting,
    load,
    load_other,
    noisy,
    nudged,
    probability,
    same_report,
)

from mechunlearn.evaluate import compare
from mechunlearn.evaluate.grid.workers import OtherModelError

run = partial(compare, progress=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """In the workers as here: sums over several threads may differ in the last bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def everything(model, **options):
    """Seeds, an edit for each seed, a control, the original in a test, and a test that fails."""
    edits = {"one": nudged(model), "two": [nudged(model, "L2H1", seed=seed) for seed in (1, 2)]}
    metrics = {"p": probability, "n": noisy, "d": distance, "x": failing}
    controls = {"other": load_other}
    task = tiny.task(model)
    return run(model, task, edits, metrics=metrics, seeds=(0, 1), controls=controls, **options)


@pytest.fixture(scope="module")
def serial():
    return everything(load())


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        yield pool


def test_two_processes_give_the_serial_report(llama, serial, processes, tmp_path):
    path = tmp_path / "cells.jsonl"
    with left_as_it_was(llama):
        assert same_report(serial, everything(llama, executor=processes, load=load, results=path))
    assert same_report(serial, everything(llama, results=path))  # and the file serves both


def test_what_cannot_travel_is_an_error_in_its_cell(llama, processes):
    metrics = {"local": lambda model, task: probability(model, task), "p": probability}
    report = run(llama, tiny.task(llama), {}, metrics=metrics, executor=processes, load=load)
    local, other = report.cells
    assert "lambda" in local.error
    assert other.result is not None


@pytest.mark.nightly
def test_a_dask_cluster_gives_the_serial_report(llama, serial):
    distributed = pytest.importorskip("distributed")
    cluster = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**cluster) as local, distributed.Client(local) as client:
        with client.get_executor() as executor, left_as_it_was(llama):
            assert same_report(serial, everything(llama, executor=executor, load=load))


class InOrder(Executor):
    """Runs each piece of work at once, here."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)

    def submit(self, function, /, *arguments, **options):
        future = self.pool.submit(function, *arguments, **options)
        future.exception()
        return future


LOADED: list[int] = []


def loading():
    LOADED.append(threading.get_ident())
    return load()


def test_each_thread_loads_a_model_of_its_own_once_and_leaves_the_compared_one(llama):
    """No test here draws from the global generator, which threads share."""
    edits = {"a": nudged(llama), "b": nudged(llama, "L2H1")}
    metrics = {"p": probability, "d": distance}
    expected = run(llama, tiny.task(llama), edits, metrics=metrics)
    with ThreadPoolExecutor(2) as pool, left_as_it_was(llama):
        for _ in range(2):
            found = run(llama, tiny.task(llama), edits, metrics=metrics, executor=pool, load=loading)
            assert same_report(expected, found)
    assert 1 <= len(LOADED) == len(set(LOADED)) <= 2


def test_a_worker_that_loads_another_model_ends_the_comparison(llama):
    with pytest.raises(OtherModelError, match=r"expected bridge to load.*the weights that are compared.*got others"):
        run(llama, tiny.task(llama), {}, metrics={"p": probability}, executor=InOrder(), load=load_other)


def test_an_interrupt_in_a_worker_ends_all_and_keeps_what_is_finished(llama, tmp_path):
    log, path = tmp_path / "log", tmp_path / "cells.jsonl"
    metrics = {"a": partial(counted, log=str(log), name="a"), "x": interrupting}
    with pytest.raises(KeyboardInterrupt):
        run(llama, tiny.task(llama), {}, metrics=metrics, executor=InOrder(), load=load, results=path)
    metrics["x"] = probability
    report = run(llama, tiny.task(llama), {}, metrics=metrics, executor=InOrder(), load=load, results=path)
    assert len(calls(log)) == 1
    assert all(cell.result is not None for cell in report.cells)


def test_models_do_not_travel(llama):
    options = {"metrics": {"p": probability}, "executor": InOrder()}
    with pytest.raises(ValueError, match="expected a function that loads the model in each worker, got none"):
        run(llama, tiny.task(llama), {}, **options)
    with pytest.raises(ValueError, match="expected a function that loads the control 'other'"):
        run(llama, tiny.task(llama), {}, controls={"other": load_other()}, load=load, **options)
