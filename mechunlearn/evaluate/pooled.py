"""Several seeds of one test as one result."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mechunlearn.curve import Curve
from mechunlearn.evaluate.result import Result


def pooled(results: Sequence[Result]) -> Result:
    """One result of several seeds: each example's mean over seeds where all have the same examples, else all of them.

    Curves and controls are pooled alike; a curve is left out where seeds differ in its points. The interval of what
    is given back is over examples; that seeds differ too is seen only in the single results.
    """
    first = results[0]
    if len(results) == 1:
        return first
    same = all((r.names, len(r.per_example)) == (first.names, len(first.per_example)) for r in results)
    return Result(
        _joined([r.per_example for r in results], same),
        first.sense,
        first.chance,
        first.unit,
        first.names if same else tuple(name for r in results for name in r.names),
        _curve([r.curve for r in results if r.curve is not None], same, len(results)),
        _control([r.control for r in results if r.control is not None], len(results)),
    )


def _joined(values: Sequence[Tensor], same: bool) -> Tensor:
    numbers = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]
    return torch.stack(numbers).mean(0) if same else torch.cat(numbers)


def _curve(curves: Sequence[Curve], same: bool, count: int) -> Curve | None:
    if len(curves) < count or len({curve.points for curve in curves}) > 1:
        return None
    first = curves[0]
    averaged = same and len({curve.per_prompt.shape for curve in curves}) == 1
    return Curve(first.points, _joined([c.per_prompt for c in curves], averaged), first.unit, first.chance, first.axis)


def _control(controls: Sequence[Result], count: int) -> Result | None:
    return pooled(controls) if len(controls) == count else None
