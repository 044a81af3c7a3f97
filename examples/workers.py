"""Processes that work for a script, each on its own threads, and none of which outlives it."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread


def processes(count: int) -> ProcessPoolExecutor:
    """An executor of so many new processes. They compute on one thread each, unless the work says otherwise."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    return ProcessPoolExecutor(count, get_context("spawn"), initializer=_end_with_the_script)


def _end_with_the_script() -> None:
    """A script that is killed cannot end its workers, which would wait for work forever."""
    Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    script = parent_process()
    assert script is not None
    script.join()
    os._exit(1)
