"""Without an optional package the error names the extra that brings it, and the model is as it was."""

import sys

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu


@pytest.fixture
def without(monkeypatch):
    """Makes every import of a package fail, as where it is not installed."""

    def missing(package):
        for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, "mechunlearn.evaluate.adapter", raising=False)

    return missing


def test_bitsandbytes(without):
    without("bitsandbytes")
    with pytest.raises(ImportError, match=r"pip install 'mechunlearn\[bitsandbytes\]'"):
        mu.edit.adamw_8bit([torch.zeros(2, requires_grad=True)], lr=0.1)


def test_peft(without, llama):
    without("peft")
    with left_as_it_was(llama), pytest.raises(ImportError, match=r"pip install 'mechunlearn\[peft\]'"):
        mu.evaluate.relearn_lora(llama, tiny.task(llama))


def test_lm_eval(without, llama):
    without("lm_eval")
    with left_as_it_was(llama), pytest.raises(ImportError, match=r"pip install 'mechunlearn\[lm-eval\]'"):
        mu.evaluate.lm_eval_task(llama, name="mmlu")
