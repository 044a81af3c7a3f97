"""Edits by hand, and tests of a model that can travel to other processes."""

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch

import mechunlearn as mu
from mechunlearn.curve import Curve
from mechunlearn.evaluate import Result
from mechunlearn.weights import read, select

load = partial(tiny.bridge, "llama")
load_other = partial(tiny.bridge, "llama", seed=5)


def nudged(model: Any, label: str = "L1MLP", *, seed: int = 0, size: float = 0.1) -> mu.Edit:
    """An edit that adds noise to a component."""
    mask = mu.ComponentMask.of([label], mu.shape(model))
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: value + size * torch.randn(value.shape, generator=generator)
        for name, value in read(select(model, mask)).items()
    }
    return mu.Edit(mask, values, mu.fingerprint(model), {"editor": "noise", "seed": seed})


def probability(model: Any, task: Any) -> Result:
    return mu.evaluate.in_format(model, task, name="trained prompt", side="forget")


def noisy(model: Any, task: Any, *, seed: int) -> Result:
    """Depends on the seed, on the weights, and on the global generator."""
    found, curve = probability(model, task), torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
    values = found.per_example + seed + torch.rand(6)
    control = Result(values / 3, "control", names=found.names)
    return Result(values, "noise", 0.25, "", found.names, Curve(("0", "1", "2"), curve, "x", 0.1, "steps"), control)


def distance(model: Any, task: Any, *, original: Any) -> Result:
    """How far the logits are from the original model's."""
    edited = task.forget.logits(model).flatten(1).detach()
    with original() as before:
        return Result((edited - task.forget.logits(before).flatten(1).detach()).abs().mean(1), "distance")


def failing(model: Any, task: Any) -> Result:
    raise ArithmeticError("of no use")


def interrupting(model: Any, task: Any) -> Result:
    raise KeyboardInterrupt


def counted(model: Any, task: Any, *, seed: int, log: str, name: str, seconds: float = 0.0) -> Result:
    """Writes down that it was called, with which seed and on which weights; so does what it gives."""
    line = f"{name} {seed} {mu.fingerprint(model)}"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)
    time.sleep(seconds)
    return replace(noisy(model, task, seed=seed), sense=line)


def calls(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def same(one: Result | None, other: Result | None) -> bool:
    """Bit for bit, curves and controls included."""
    if one is None or other is None:
        return one is other
    if not torch.equal(one.per_example, other.per_example) or one.per_example.dtype != other.per_example.dtype:
        return False
    if (one.curve is None) != (other.curve is None) or not same(one.control, other.control):
        return False
    if one.curve is not None and other.curve is not None:
        plain = {"points", "unit", "chance", "axis"}
        if not torch.equal(one.curve.per_prompt, other.curve.per_prompt):
            return False
        if any(getattr(one.curve, name) != getattr(other.curve, name) for name in plain):
            return False
    return all(getattr(one, name) == getattr(other, name) for name in ("sense", "chance", "unit", "names"))


def same_report(one: Any, other: Any) -> bool:
    """Everything but how long it took."""
    if (one.weights, one.provenance, len(one.cells)) != (other.weights, other.provenance, len(other.cells)):
        return False
    return all(
        (a.row, a.test, a.seed, a.error) == (b.row, b.test, b.seed, b.error) and same(a.result, b.result)
        for a, b in zip(one.cells, other.cells, strict=True)
    )
