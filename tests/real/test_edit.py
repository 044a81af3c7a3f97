"""Every editor once on a real pretrained model, a few steps of it: only what the mask covers moves, and only inside."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.model import slots

pytestmark = pytest.mark.real

HIGH = ["L28MLP.W_out", "L29H1"]
"""High layers, so that a step runs few of them backwards."""
STEPS: dict[str, Any] = {"batch_size": 2, "learning_rate": 1e-4, "progress": False}
TRAINED: dict[str, Any] = {**STEPS, "steps": 2, "text_batch_size": 1}
WRITTEN: dict[str, Any] = {"prefixes": (), "steps": 2, "progress": False}


def own_loop(model: Any, task: mu.Task, mask: mu.ComponentMask) -> mu.Edit:
    prompts = task.forget[:2]
    with mu.edit.gradient_mask(model, mask) as training:
        mu.losses.cross_entropy(prompts.logits(model)[:, 0], prompts.answers[:, 0]).mean().backward()
        torch.optim.SGD(training.parameters, lr=0.1).step()
    return training.edit()


def own_loop_of_numbers(model: Any, task: mu.Task, mask: mu.ComponentMask) -> mu.Edit:
    prompts = task.forget[:2]
    with mu.edit.weight_mask(model, mask) as training:
        (-mu.losses.cross_entropy(prompts.logits(model)[:, 0], prompts.answers[:, 0]).mean()).backward()
        torch.optim.SGD(training.parameters, lr=1.0).step()
    return training.learned().edit()


def one_fact(task: mu.Task) -> mu.Task:
    """One fact, little text: what writes a fact searches for each."""
    assert task.injection is not None
    return replace(
        task, forget=task.forget[:1], retain=task.retain[:2], injection=task.injection[:1], text=task.text[:30]
    )


EDITORS: dict[str, Callable[[Any, mu.Task, Any], mu.Edit]] = {
    "alpha_edit": lambda m, t, w: mu.edit.alpha_edit(m, one_fact(t), w, **WRITTEN),
    "dampened": lambda m, t, w: mu.edit.dampened(m, one_fact(t), w, selection=1.0, dampening=0.5),
    "finetune": lambda m, t, w: mu.edit.finetune(m, t, w, **TRAINED),
    "ft_l": lambda m, t, w: mu.edit.ft_l(m, t, w, steps=2, **STEPS),
    "gradient_mask": own_loop,
    "learn_weight_mask": lambda m, t, w: mu.edit.learn_weight_mask(m, t, w, **TRAINED).edit(),
    "learn_weight_mask_in_place": lambda m, t, w: mu.edit.learn_weight_mask_in_place(m, t, w, **TRAINED).edit(),
    "learned_further": lambda m, t, w: mu.edit.learned_further(m, t, w, **TRAINED),
    "lora": lambda m, t, w: mu.edit.lora(m, t, w, rank=2, **TRAINED),
    "mean_ablated": lambda m, t, w: mu.edit.mean_ablated(m, one_fact(t), w),
    "memit": lambda m, t, w: mu.edit.memit(m, one_fact(t), w, **WRITTEN),
    "rome": lambda m, t, w: mu.edit.rome(m, one_fact(t), w, **WRITTEN),
    "scaled": lambda m, t, w: mu.edit.scaled(m, mu.edit.finetune(m, t, w, **TRAINED), 0.5),
    "task_vector": lambda m, t, w: mu.edit.task_vector(m, t, w, learn=learned_further),
    "weight_mask": own_loop_of_numbers,
    "zeroed": lambda m, t, w: mu.edit.zeroed(m, w),
}
ELSEWHERE = {"generated_prefixes", "key_covariance", "paper_settings", "search", "sequence"}
"""They edit nothing by themselves: see the contract of all editors."""
MLPS_ALONE = {"alpha_edit", "memit", "rome"}


def learned_further(model: Any, task: mu.Task, mask: mu.ComponentMask) -> mu.Edit:
    return mu.edit.learned_further(model, task, mask, **TRAINED)


def test_every_public_editor_is_run():
    public = {name: getattr(mu.edit, name) for name in mu.edit.__all__}
    asked = {n for n, f in public.items() if inspect.isfunction(f) and "model" in inspect.signature(f).parameters}
    assert asked - ELSEWHERE <= set(EDITORS) <= set(public)


EVERY_EDITOR = [pytest.param(n, marks=pytest.mark.nightly if n == "mean_ablated" else ()) for n in EDITORS]


@pytest.mark.parametrize("name", EVERY_EDITOR)
def test_an_editor_changes_what_its_mask_covers_and_leaves_the_model_as_it_was(smol: Any, capitals: mu.Task, name: str):
    mask = mu.ComponentMask.of(HIGH[:1] if name in MLPS_ALONE else HIGH, mu.shape(smol))
    with left_as_it_was(smol):
        edit = EDITORS[name](smol, capitals, mask)
        assert 0 < edit.size(smol).changed <= mask.n_parameters
        before = {key: slot.parameter.detach().clone() for key, slot in slots(smol).items()}
        covered = mask.shape.entries(mask)
        with edit.applied(smol):
            for key, slot in slots(smol).items():
                moved = slot.view(slot.parameter.detach() != before[key])
                assert not moved[~covered.get(key, torch.zeros(len(moved), dtype=torch.bool))].any(), key


@pytest.mark.nightly
def test_the_trained_edit_erases_in_the_chat_template_too_and_spares_retained_facts_more(smol: Any, capitals: mu.Task):
    where = mu.ComponentMask.of([f"L{layer}MLP" for layer in range(25, 30)], mu.shape(smol))
    options: dict[str, Any] = {"batch_size": 12, "text_batch_size": 1, "learning_rate": 1e-4, "progress": False}
    edit = mu.edit.finetune(smol, capitals, where, steps=10, **options)

    def probability(format: str, side: Any) -> float:
        options: dict[str, Any] = {"name": format, "side": side, "metric": mu.metrics.answer_probability}
        return mu.evaluate.in_format(smol, capitals, **options).value

    before = {(f, s): probability(f, s) for f in capitals.formats for s in ("forget", "retain")}
    with edit.applied(smol):
        after = {key: probability(*key) for key in before}
    assert after["trained prompt", "forget"] < 0.1 < 0.4 < before["trained prompt", "forget"]
    assert after["chat", "forget"] < 0.5 * before["chat", "forget"]
    left = {side: after["trained prompt", side] / before["trained prompt", side] for side in ("forget", "retain")}
    assert left["retain"] > 3 * left["forget"]
