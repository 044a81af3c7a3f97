"""1 - UDS: what the tested model's layers are worth to the original."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch
from hushed import hushed
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.evaluate.patching import _knowledge_left, _patched, patching_audit
from mechunlearn.metrics import answer_log_probability
from mechunlearn.model import base_run
from mechunlearn.tasks import Format
from mechunlearn.tasks.positions import answers, from_subject, subject_last


def itself(model):
    """The tested model is the original."""
    return lambda: nullcontext(model)


def test_the_score_of_four_facts_by_hand():
    """Gaps count above 0.05 and a loss at most as much as the gap; the third fact has no gap and is left out."""
    gap = torch.tensor([[0.1, 1.0], [0.04, 0.5], [0.0, 0.01], [0.2, 0.2]], dtype=torch.float64)
    loss = torch.tensor([[0.05, 1.0], [0.04, 0.0], [0.0, 0.0], [-1.0, 0.3]], dtype=torch.float64)
    result = _knowledge_left(gap, loss, 0.05, ("a", "b", "c", "d"))
    assert result.names == ("a", "b", "d")
    assert result.per_example.tolist() == pytest.approx([0.05 / 1.1, 1.0, 0.5])
    assert result.value == pytest.approx((0.05 / 1.1 + 1.5) / 3)
    assert result.curve.per_prompt.tolist() == [pytest.approx(row) for row in ([0.05, 0.0], [0.0, 0.5], [0.2, 0.0])]


@pytest.mark.parametrize("where", [answers, from_subject])
def test_the_original_has_all_of_its_knowledge_and_a_model_that_never_knew_none(llama, where):
    other, task = tiny.bridge("llama", seed=5), tiny.task(llama, answer=2)
    same = patching_audit(llama, task, original=itself(llama), never_knew=other, where=where)
    assert torch.equal(same.per_example, torch.ones(len(same.names)))
    nothing = patching_audit(other, task, original=itself(llama), never_knew=other, where=where)
    assert nothing.value == 0
    assert nothing.names == same.names


def test_a_patch_is_what_a_hook_would_do(llama):
    """The slow reference: the same states written in by a hook, in a whole forward."""
    prompts = tiny.prompts(llama, answer=2)
    run = base_run(llama, prompts.tokens, prompts.attention_mask, prompts.positions)
    for where in (answers, from_subject):
        mask = where(prompts) & prompts.attention_mask
        states = torch.randn(6, int(mask.sum(1).max()), 32, generator=torch.Generator().manual_seed(0))

        def put(value, hook, mask=mask, states=states):
            value = value.clone()
            for row in range(6):
                columns = mask[row].nonzero()[:, 0]
                value[row, columns] = states[row, : len(columns)]
            return value

        logits = prompts.logits(llama, hooks=[("blocks.2.hook_resid_pre", put)])
        expected = answer_log_probability(logits, prompts) / prompts.answer_mask.sum(1)
        with torch.no_grad():
            found = _patched(llama, run, prompts, where, 2, states)
        assert torch.allclose(found, expected, atol=1e-5)


def test_answers_and_from_subject_by_hand(llama):
    prompts = tiny.prompts(llama, answer=2, padding="left")
    for row in range(6):
        real = prompts.attention_mask[row].nonzero()[:, 0].tolist()
        count = int(prompts.answer_mask[row].sum())
        assert answers(prompts)[row].nonzero()[:, 0].tolist() == real[-count:]
        last = int(subject_last(prompts)[row].int().argmax())
        assert from_subject(prompts)[row].nonzero()[:, 0].tolist() == list(range(last, real[-1] + 1))


def test_every_architecture_is_audited_and_left_as_it_was(model):
    task = tiny.task(model)
    tested = task.formats["trained prompt"].forget
    said = tested.logits(model)[:, 0].argmax(-1, keepdim=True)
    known = Format(replace(tested, answers=said, candidates=None), tested)
    task = replace(task, formats={"trained prompt": known})
    with left_as_it_was(model):
        result = patching_audit(model, task, original=itself(model))
    assert result.value == 1
    assert result.curve.points == ("0", "1", "2", "3")

    def failing(prompts):
        if len(prompts) < 4:
            raise RuntimeError("at the last batch")
        return answers(prompts)

    with left_as_it_was(model), pytest.raises(RuntimeError, match="at the last batch"):
        patching_audit(model, task, original=itself(model), where=failing, batch_size=4)


def test_bad_input_is_refused(llama, unchecked):
    task = tiny.task(llama)
    with pytest.raises(ValueError, match=r"expected the original model, got none.*mu\.evaluate\.compare"):
        patching_audit(llama, task)
    for options, message in (
        ({"format": "poem"}, "expected a format of the task"),
        ({"where": "answers"}, "expected a function as where"),
        ({"where": lambda prompts: prompts.attention_mask & False}, "expected tokens to patch in every prompt"),
        ({"batch_size": 0}, "batch_size of at least 1"),
        ({"threshold": 100.0}, "expected an original that knows some of the facts"),
        ({"never_knew": mu.testbed.load()}, "expected never_knew of the shape of the original"),
    ):
        with pytest.raises(ValueError, match=message):
            patching_audit(llama, task, original=itself(llama), **options)


def test_what_the_last_mlp_hides_is_left_and_the_twin_has_little():
    """All layers but the last serve the original as before. Patches at the answer alone see less of it: later layers
    read the subject again, and the output, which is hidden, decides."""
    model = mu.testbed.load()
    task = mu.tasks.sports_facts(model, forget="basketball")
    asked = task.formats["trained prompt"]
    task = replace(task, formats={"trained prompt": Format(asked.forget[:16], asked.retain[:32])})
    edit = hushed(model, task.formats["trained prompt"].forget)
    options = {"original": lambda: nullcontext(model)}
    twin = patching_audit(mu.testbed.load(without="basketball"), task, **options, where=from_subject)
    hidden = mu.testbed.load()
    edit.apply(hidden)
    found = patching_audit(hidden, task, **options, where=from_subject)
    assert found.curve.mean[-1] == 0
    assert float(found.curve.mean[:10].min()) > 0.5
    assert twin.value < 0.2 < 0.4 < found.value < 1
    assert patching_audit(hidden, task, **options).value < found.value
