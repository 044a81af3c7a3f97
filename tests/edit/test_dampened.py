from dataclasses import replace

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.edit import dampened
from mechunlearn.model import preserved, shape
from mechunlearn.weights import read, select

LABELS = ("L1H2", "L2N3", "L2N9", "L0MLP.W_out")


def masked(model, *labels):
    return mu.ComponentMask.of(labels or LABELS, shape(model))


def importance(model, prompts, mask):
    """The slow way: one prompt, one backward pass of the mean of its -log p."""
    entries, total = select(model, mask), {}
    with preserved(model):
        for e in entries:
            e.slot.parameter.requires_grad_(True)
        for row in range(len(prompts)):
            prompt = prompts[[row]]
            logs = prompt.logits(model).log_softmax(-1)[0]
            tokens = [int(t) for t in prompt.answers[0] if t >= 0]
            loss = -sum(logs[place, token] for place, token in enumerate(tokens)) / len(tokens)
            gradients = torch.autograd.grad(loss, [e.slot.parameter for e in entries])
            for e, gradient in zip(entries, gradients, strict=True):
                total[e.label] = total.get(e.label, 0) + e.read(gradient) ** 2 / len(prompts)
    return total


def test_weights_shrink_by_the_formula(model):
    task, mask = tiny.task(model, answer=2), masked(model)
    with left_as_it_was(model):
        edit = dampened(model, task, mask, selection=3.0, dampening=0.5)
    forget, retain = importance(model, task.forget, mask), importance(model, task.retain, mask)
    selected = 0
    for label, weight in read(select(model, mask)).items():
        expected = weight.clone()
        ratio = retain[label] / forget[label]
        chosen = ratio < 1 / 3.0
        expected[chosen] *= (0.5 * ratio[chosen]).clamp(max=1.0)
        sure = (ratio - 1 / 3.0).abs() > 1e-4  # rounding may decide the others either way
        assert torch.allclose(edit.values[label][sure], expected[sure], atol=1e-5), label
        selected += int(chosen.sum())
    assert edit.provenance["selected"] == pytest.approx(selected, abs=5)
    assert 0 < selected < mask.n_parameters
    with left_as_it_was(model), edit.applied(model):
        pass


def test_importance_adds_up_to_the_fisher_score_of_a_component(llama):
    task, mask = tiny.task(llama), masked(llama, "L1MLP")
    score = mu.localize.fisher(llama, task.forget, components=["L1MLP"])["L1MLP"]
    assert sum(float(v.sum()) for v in importance(llama, task.forget, mask).values()) == pytest.approx(score, rel=1e-4)


def test_a_factor_is_never_above_one(llama):
    edit = dampened(llama, tiny.task(llama), masked(llama), selection=0.01, dampening=50.0)
    for label, weight in read(select(llama, edit.mask)).items():
        assert (edit.values[label].abs() <= weight.abs()).all()
        assert (edit.values[label] == weight).any()


def test_what_matters_to_both_sides_alike_stays(llama):
    task = tiny.task(llama)
    with left_as_it_was(llama), pytest.raises(ValueError, match=r"expected some weights that matter more than 10.0"):
        dampened(llama, replace(task, retain=task.forget), masked(llama))


def test_bad_input(llama):
    task = tiny.task(llama)
    with pytest.raises(ValueError, match=r"expected selection > 0 and dampening >= 0, got 0.0 and 1.0"):
        dampened(llama, task, masked(llama), selection=0.0, dampening=1.0)
    with pytest.raises(ValueError, match=r"expected a loss of logits and targets, got npo"):
        dampened(llama, task, masked(llama), loss=mu.losses.npo)
    with left_as_it_was(llama), pytest.raises(ValueError, match="expected a mask that selects something"):
        dampened(llama, task, masked(llama) - masked(llama))
