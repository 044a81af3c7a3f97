"""Directions: found where the models differ, and really gone from the residual stream."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.evaluate.attacks.directions import direction_ablation, is_usual, mean_difference, principal_difference
from mechunlearn.model.running import project_out, residual_before, without_directions
from mechunlearn.weights import read, select, write

ORIGINALS: dict[mu.Edit, dict[str, torch.Tensor]] = {}
"""What each edit replaces."""


def hidden_behind_a_direction(model, layer, size, seed=0):
    """An edit of one W_out by a rank-one matrix: the layer adds a random direction, much or little of it per token."""
    mask = mu.ComponentMask.of([f"L{layer}MLP.W_out"], mu.shape(model))
    [(label, value)] = read(select(model, mask)).items()
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(value.shape[-1], generator=generator)
    direction /= direction.norm()
    amounts = size * torch.randn(len(value), 1, 1, generator=generator)
    edit = mu.Edit(mask, {label: value + amounts * direction}, mu.fingerprint(model))
    ORIGINALS[edit] = {label: value}
    return edit, direction


def test_projection_by_hand():
    value = torch.tensor([[[3.0, 4.0], [1.0, 1.0]]])
    assert torch.allclose(project_out(torch.tensor([1.0, 0.0]), value), torch.tensor([[[0.0, 4.0], [0.0, 1.0]]]))
    diagonal = torch.tensor([0.6, 0.8])
    assert torch.allclose(project_out(diagonal, value)[0, 0], torch.zeros(2), atol=1e-6)
    assert torch.equal(project_out(torch.zeros(2), value), value)


def test_directions_by_hand():
    """The mean of (2, 0), (0, 1), (1, 2); and the axis along which (3, 0), (-3, 0), (0, 1) are longest."""
    assert torch.equal(mean_difference(torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 2.0]])), torch.ones(2))
    axis = principal_difference(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0]]))
    assert torch.allclose(axis.abs(), torch.tensor([1.0, 0.0]), atol=1e-6)


def test_a_token_far_longer_than_the_others_is_an_outlier():
    """Of 20 tokens of norm 1 and one of norm 11: mean 1.48, deviation 2.13, so only the last is 3 above."""
    activations = torch.zeros(21, 2)
    activations[:, 0] = 1.0
    activations[-1, 0] = -11.0
    assert is_usual(activations, 3.0).tolist() == [True] * 20 + [False]
    assert bool(is_usual(activations, 5.0).all())


def test_inside_the_direction_is_gone_from_every_layer(model):
    prompts = tiny.prompts(model)
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    rows /= rows.norm(dim=1, keepdim=True)
    with left_as_it_was(model), without_directions(model, rows):
        for layer in (0, 2):
            found = residual_before(model, layer, prompts.tokens, prompts.attention_mask)
            assert float((found @ rows[layer]).abs().max()) < 1e-4
            assert float((found @ rows[1]).abs().max()) > 1e-2
        inside = prompts.logits(model)
    with without_directions(model, torch.cat([torch.zeros_like(rows[:3]), rows[3:]])):
        last = prompts.logits(model)
    plain = prompts.logits(model)
    assert not torch.allclose(inside, last, atol=1e-3)
    assert not torch.allclose(last, plain, atol=1e-3)


def test_a_late_edit_has_directions_behind_its_layer_only(model):
    edit, _ = hidden_behind_a_direction(model, 1, 3.0)
    with edit.applied(model), left_as_it_was(model):
        found = direction_ablation(model, tiny.task(model), original=partial(taken_back, model, edit))
    assert found.curve is not None
    assert found.curve.points == ("0", "after L1", "after L2", "each")
    assert not torch.allclose(found.curve.per_prompt[:, 0], found.curve.per_prompt[:, 3], atol=1e-4)


def test_what_is_behind_the_edited_layer_is_the_direction_of_the_edit(llama):
    """A direction that only W_out of the last layer adds: without it, the edited model is the original without it."""
    edit, direction = hidden_behind_a_direction(llama, 2, 3.0)
    task = tiny.task(llama)
    with edit.applied(llama):
        found = direction_ablation(llama, task, original=partial(taken_back, llama, edit))
    last = torch.zeros(4, 32)
    last[3] = direction
    with without_directions(llama, last):
        expected = mu.evaluate.accuracy(llama, task.formats["trained prompt"].forget).probability.per_example
    assert found.curve is not None
    assert found.curve.points == ("0", "after L2", "each")
    assert torch.allclose(found.curve.per_prompt[:, 2], expected, atol=1e-4)


@pytest.mark.parametrize("direction", [mean_difference, principal_difference])
def test_facts_hidden_behind_a_direction_come_back(shipped, direction):
    """Layer 4 drowns the residual stream in one direction; four athletes show which, the other four are known again."""
    task = mu.tasks.sports_facts(shipped, forget=8)
    edit, _ = hidden_behind_a_direction(shipped, 4, 500.0)
    with edit.applied(shipped):
        found = direction_ablation(shipped, task, original=partial(taken_back, shipped, edit), direction=direction)
    assert found.curve is not None
    before, after = float(found.curve.mean[0]), dict(zip(found.curve.points, found.curve.mean.tolist(), strict=True))
    assert before < 0.6
    assert after["after L4"] > 0.9
    assert len(found.names) == 4


def test_the_original_has_no_direction(llama):
    found = direction_ablation(llama, tiny.task(llama), original=lambda: nullcontext(llama))
    assert found.curve is not None
    assert found.curve.points == ("0",)


def test_without_the_original_it_is_refused(llama):
    with (
        left_as_it_was(llama),
        pytest.raises(ValueError, match="expected the original model, got none"),
    ):
        direction_ablation(llama, tiny.task(llama))


def test_a_direction_that_fails_leaves_no_trace(llama):
    def failing(differences):
        raise KeyboardInterrupt

    edit, _ = hidden_behind_a_direction(llama, 1, 3.0)
    with edit.applied(llama), left_as_it_was(llama), pytest.raises(KeyboardInterrupt):
        direction_ablation(llama, tiny.task(llama), original=partial(taken_back, llama, edit), direction=failing)


@contextmanager
def taken_back(model, edit):
    """The original in place of the edited model, as `compare` gives it."""
    entries = select(model, edit.mask)
    edited = read(entries)
    write(entries, ORIGINALS[edit])
    try:
        yield model
    finally:
        write(entries, edited)
