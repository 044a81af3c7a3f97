"""Models without the knowledge have nothing left, and avoid nothing; the original has all of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import mechunlearn as mu
from mechunlearn.auditing import Audit, Finding, Plan, quick
from mechunlearn.tasks import Format

ASKED = ("question", "multiple choice", "multiple choice in words")
ATTACKS = ("few-shot", "quantization")


def plan(task: mu.Task) -> Plan:
    whole = quick(task)
    asked, attacks = {test: whole.asked[test] for test in ASKED}, {test: whole.attacks[test] for test in ATTACKS}
    return replace(whole, asked=asked, latent={"logit lens": whole.latent["logit lens"]}, attacks=attacks, damage={})


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The shipped model with other matrices in attention and MLPs."""
    model: Any = mu.testbed.load()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim > 1 and "embed" not in name:
                values.copy_(change(values))
    return model


def fresh(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    model = changed(lambda values: 0.02 * torch.randn(values.shape, generator=generator))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim > 1 and "embed" in name:
                values.copy_(0.02 * torch.randn(values.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def audited(shipped: Any) -> Audit:
    twin = mu.testbed.load(without="basketball")
    whole = mu.tasks.sports_facts(shipped, forget="basketball")
    formats = {name: whole.formats[name] for name in ("trained prompt", *ASKED)}
    formats = {name: Format(some.forget, some.retain[:8]) for name, some in formats.items()}
    task = replace(whole, formats=formats)
    models = {"never knew": twin, "twin": twin, "all zero": changed(torch.zeros_like)}
    models |= {f"fresh {seed}": fresh(seed) for seed in range(3)}
    report = mu.evaluate.compare(shipped, task, {}, metrics=plan(task).tests, controls=models, progress=False)
    assert report.errors.empty
    return Audit(report, plan(task).kinds)


def of(audited: Audit, row: str) -> list[Finding]:
    return [finding for finding in audited.findings if finding.row == row]


@pytest.mark.parametrize("row", ["twin", "all zero", "fresh 0", "fresh 1", "fresh 2"])
def test_a_model_without_the_knowledge_has_nothing_left_and_avoids_nothing(audited: Audit, row: str):
    for finding in of(audited, row):
        assert finding.left.low <= 0, finding
        assert finding.of_many.low <= 0, finding
        assert not finding.avoids.low > 0, finding


def test_the_original_has_all_of_it(audited: Audit):
    assert [finding.left.value for finding in of(audited, "original")] == [1.0] * (len(ASKED) + len(ATTACKS) + 2)


def test_one_that_says_it_less_than_any_of_them_avoids_it(shipped: Any, audited: Audit):
    """Without a model that never knew, the twin, which never says basketball, is below chance."""
    cells = [cell for cell in audited.report.cells if cell.row in ("original", "twin")]
    alone = Audit(replace(audited.report, cells=tuple(cells)), audited.kinds)
    assert [finding.test for finding in of(alone, "twin") if finding.avoids.low > 0] == ["clean", *ASKED]
