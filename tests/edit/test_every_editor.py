"""Every editor takes every kind of localization, and runs on every architecture and both model classes."""

from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from conftest import CASES, shared
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.edit import (
    alpha_edit,
    dampened,
    finetune,
    ft_l,
    gradient_mask,
    learn_weight_mask,
    learn_weight_mask_in_place,
    lora,
    mean_ablated,
    memit,
    rome,
    scaled,
    smallest_eigenvalues,
    task_vector,
    zeroed,
)
from mechunlearn.model import slots
from mechunlearn.weights import Edit

KINDS = {
    "head": ["L1H2"],
    "matrix of a head": ["L0H3.W_K", "L2H1.W_Q"],
    "attention layer": ["L1ATTN"],
    "MLP": ["L1MLP"],
    "matrix of an MLP": ["L1MLP.W_out"],
    "neuron": ["L1N3", "L1N40"],
    "all kinds": ["L1H2", "L0H3.W_K", "L0ATTN", "L1MLP.W_in", "L2MLP.W_out", "L1N3"],
}
FULLY = ("gpt2", "llama")
"""Architectures on which every kind runs by itself: fused and grouped attention, plain and gated MLPs."""
SHORT = {"steps": 1, "batch_size": 4, "text_batch_size": 2, "progress": False}


def own_loop(model, task, mask):
    with gradient_mask(model, mask) as training:
        mu.losses.cross_entropy(task.forget.logits(model)[:, 0], task.forget.answers[:, 0]).mean().backward()
        torch.optim.SGD(training.parameters, lr=1.0).step()
    return training.edit()


def negated(model, task, mask):
    return scaled(model, finetune(model, task, mask, forget_loss=mu.losses.cross_entropy, **SHORT), -1.0)


def discretized(model, task, mask, *, learn=learn_weight_mask):
    return learn(model, task, mask, learning_rate=100.0, **SHORT).discretize(k=5)


def vector(model, task, mask):
    return task_vector(model, task, mask, learn=partial(finetune, forget_loss=mu.losses.cross_entropy, **SHORT))


def in_free_directions(model, task, mask):
    text = torch.randint(4, tiny.N_VOCAB, (20, 12), generator=torch.Generator().manual_seed(3))
    longer = replace(task, text=text)  # more tokens than neurons
    return alpha_edit(model, longer, mask, free=partial(smallest_eigenvalues, share=0.6), **WRITE)


WRITE = {"prefixes": ("w9 w8 w7",), "steps": 3, "progress": False}


EDITORS = {
    "finetune": partial(finetune, **SHORT),
    "gradient_mask": own_loop,
    "learn_weight_mask": discretized,
    "zeroed": lambda model, task, mask: zeroed(model, mask),
    "scaled": negated,
    "learn_weight_mask_in_place": partial(discretized, learn=learn_weight_mask_in_place),
    "lora": partial(lora, rank=2, **SHORT),
    "task_vector": vector,
    "dampened": partial(dampened, selection=1.0, dampening=0.5),
    "mean_ablated": mean_ablated,
    "ft_l": partial(ft_l, steps=1, progress=False),
    "rome": partial(rome, **WRITE),
    "memit": partial(memit, **WRITE),
    "alpha_edit": in_free_directions,
}
"""Name -> (model, task, mask) -> Edit. A new editor is one line."""

ONLY = {name: {"MLP", "matrix of an MLP", "neuron"} for name in ("rome", "memit", "alpha_edit")} | {
    "mean_ablated": set(KINDS) - {"matrix of a head"},
}
"""The kinds that an editor takes, where it cannot take all; the others it has to refuse."""


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in CASES for kind in KINDS if case[1] in FULLY or kind == "all kinds"],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_editor_runs_on_every_kind_of_localization(case, kind, name):
    model = shared(*case)
    task, mask = tiny.task(model), mu.ComponentMask.of(KINDS[kind], mu.shape(model))
    if kind not in ONLY.get(name, KINDS):
        with left_as_it_was(model), pytest.raises(ValueError, match="expected"):
            EDITORS[name](model, task, mask)
        return
    with left_as_it_was(model):
        edit = EDITORS[name](model, task, mask)
        assert isinstance(edit, Edit)
        before = {key: slot.parameter.detach().clone() for key, slot in slots(model).items()}
        covered = mask.shape.entries(mask)
        changed = 0
        with edit.applied(model):
            for key, slot in slots(model).items():
                moved = slot.view(slot.parameter.detach() != before[key])
                changed += int(moved.sum())
                assert not moved[~covered.get(key, torch.zeros(len(moved), dtype=torch.bool))].any(), key
    assert 0 < changed <= mask.n_parameters
    assert edit.size(model).changed == changed


def test_the_names_of_what_editors_refuse_are_names_of_editors():
    assert set(ONLY) <= set(EDITORS)
    assert all(kinds < set(KINDS) for kinds in ONLY.values())
