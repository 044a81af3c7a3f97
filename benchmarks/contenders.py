"""CPU seconds of contenders that must not disturb each other: a process for each, which take turns."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

import torch

Prepare: TypeAlias = Callable[[], Callable[[], object]]
"""Builds a model and gives the function that is timed. A top-level function: it is sent to a new process."""


@dataclass(frozen=True)
class Cost:
    """What a contender takes."""

    seconds: float
    """Median CPU seconds of a call, or of what the call has timed itself."""
    mebibytes: float
    """The most resident memory that its process ever held: imports, the model, the call."""


def medians(contenders: Mapping[str, Prepare], *, rounds: int, warm_up: bool = True) -> dict[str, float]:
    """Median CPU seconds of one call of each contender, one thread, after a call that warms up."""
    return {name: cost.seconds for name, cost in costs(contenders, rounds=rounds, warm_up=warm_up).items()}


def costs(
    contenders: Mapping[str, Prepare], *, rounds: int, warm_up: bool = True, own_clock: bool = False
) -> dict[str, Cost]:
    """`medians`, with memory. With `own_clock` a call gives the CPU seconds that count, as where it first prepares."""
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    processes = []
    for name, prepare in contenders.items():
        ends[name], theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(prepare, warm_up, own_clock, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a contender that dies is an EOFError here, and not waited for
        ends[name].recv()  # one after the other: imports and warm-ups do not overlap
    found: dict[str, list[Cost]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, end in ends.items():
            end.send(None)
            found[name].append(end.recv())
    for process in processes:
        process.terminate()
        process.join()
    return {
        name: Cost(statistics.median(cost.seconds for cost in of_one), of_one[-1].mebibytes)
        for name, of_one in found.items()
    }


def table(found: Mapping[str, float], floors: Mapping[str, str]) -> str:
    """Each contender's CPU seconds, and how often what it is compared with they are."""
    lines = [f"{'':58}{'CPU s':>10}{'ratio':>8}"]
    for name, seconds in found.items():
        ratio = f"{seconds / found[floors[name]]:8.3f}  of {floors[name]}" if name in floors else ""
        lines.append(f"{name:58}{seconds:10.4f}{ratio}")
    return "\n".join(lines)


def _serve(prepare: Prepare, warm_up: bool, own_clock: bool, end: Connection) -> None:
    torch.set_num_threads(1)
    run = prepare()
    if warm_up:
        run()
    end.send("ready")
    while True:
        end.recv()
        started = time.process_time()
        result = run()
        seconds = result if own_clock else time.process_time() - started
        end.send(Cost(seconds, _peak()))  # type: ignore[arg-type]  # a clock of its own gives a float


def _peak() -> float:
    """Of this process alone: `getrusage` counts what the parent held when it started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
