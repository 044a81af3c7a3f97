"""Numbers that follow from finished results: relearning less what is said of nobody, and probes over all layers."""

from dataclasses import replace

from mechunlearn.evaluate import Cell, Report, Result


def with_derived(report: Report) -> Report:
    """Two more tests for each that allows it.

    "..., less nobody": what relearning finds beyond what the same attacked model says about nobody, at the budget at
    which most is found about the facts. What it taught to say of anyone was not brought back.
    "probe, mean over layers": the paper's number; at its best layer a probe may be saturated.
    """
    more = [made for cell in report.cells for made in (_less_nobody(cell), _over_layers(cell)) if made is not None]
    return Report((*report.cells, *more), report.weights, report.provenance)


def _less_nobody(cell: Cell) -> Cell | None:
    result = cell.result
    if not cell.test.startswith("relearning") or result is None or result.control is None:
        return None
    values = result.per_example - result.control.per_example
    less = Result(values, f"{result.sense}, less nobody", 0.0, result.unit, result.names)
    return replace(cell, test=f"{cell.test}, less nobody", result=less)


def _over_layers(cell: Cell) -> Cell | None:
    result = cell.result
    if cell.test != "probe" or result is None or result.curve is None:
        return None
    values = result.curve.per_prompt.float().mean(1)
    names = result.names if len(result.names) == len(values) else ()
    mean = Result(values, f"{result.sense}, mean over layers", result.curve.chance, result.unit, names)
    return replace(cell, test="probe, mean over layers", result=mean)
