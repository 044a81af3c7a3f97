"""What every editor promises, on every architecture and in both model classes.

It takes every kind of localization, or refuses it; the edit has the mask's matrices and finite numbers; inside, only
what the mask covers is changed, and outside the model is as it was, bit for bit; neither micro-batches nor the side of
the padding change the edit.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from conftest import HAS_HOOKED, shared
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
    learned_further,
    lora,
    mean_ablated,
    memit,
    rome,
    scaled,
    smallest_eigenvalues,
    task_vector,
    weight_mask,
    zeroed,
)
from mechunlearn.model import slots
from mechunlearn.weights import Edit, read, select

KINDS = {
    "head": ["L1H2"],
    "matrix of a head": ["L0H3.W_K", "L2H1.W_Q"],
    "attention layer": ["L1ATTN"],
    "MLP": ["L1MLP"],
    "matrix of an MLP": ["L1MLP.W_out"],
    "neuron": ["L1N3", "L1N40"],
    "all kinds": ["L1H2", "L0H3.W_K", "L0ATTN", "L1MLP.W_in", "L2MLP.W_out", "L1N3"],
}
TRAINED = {
    "steps": 2,
    "batch_size": 6,
    "text_batch_size": 4,
    "optimizer": torch.optim.SGD,
    "learning_rate": 0.3,
    "progress": False,
}
"""Adam divides by the gradient's size, so that one of pure rounding noise moves a weight too: SGD does not."""
WRITTEN = {"prefixes": ("w9 w8 w7",), "steps": 3, "progress": False}
MICRO_BATCHES = {"micro_batch_size": 4}
"""Of six prompts, whose answers have one token or three."""
LEARNED = {key: value for key, value in TRAINED.items() if key != "learning_rate"} | {"steps": 1}


def own_loop(model: Any, task: Any, mask: Any) -> Edit:
    with gradient_mask(model, mask) as training:
        forgetting(model, task).backward()
        torch.optim.SGD(training.parameters, lr=1.0).step()
    return training.edit()


def own_loop_of_numbers(model: Any, task: Any, mask: Any) -> Edit:
    with weight_mask(model, mask) as training:
        (-forgetting(model, task)).backward()
        torch.optim.SGD(training.parameters, lr=1.0).step()
    return training.learned().edit()


def forgetting(model: Any, task: Any) -> torch.Tensor:
    return -mu.losses.cross_entropy(task.forget.logits(model)[:, 0], task.forget.answers[:, 0]).mean()


def negated(model: Any, task: Any, mask: Any, **options: Any) -> Edit:
    return scaled(model, finetune(model, task, mask, forget_loss=mu.losses.cross_entropy, **TRAINED, **options), -1.0)


def masked(model: Any, task: Any, mask: Any, *, learn: Any, **options: Any) -> Edit:
    return learn(model, task, mask, **LEARNED, **options).edit()


def vector(model: Any, task: Any, mask: Any, **options: Any) -> Edit:
    return task_vector(model, task, mask, learn=partial(learned_further, **TRAINED, **options))


def in_free_directions(model: Any, task: Any, mask: Any) -> Edit:
    text = torch.randint(4, tiny.N_VOCAB, (20, 12), generator=torch.Generator().manual_seed(3))
    longer = replace(task, text=text)  # more tokens than neurons
    return alpha_edit(model, longer, mask, free=partial(smallest_eigenvalues, share=0.6), **WRITTEN)


EDITORS: dict[str, Callable[..., Edit]] = {
    "alpha_edit": in_free_directions,
    "dampened": partial(dampened, selection=1.0, dampening=0.5),
    "finetune": partial(finetune, **TRAINED),
    "ft_l": partial(ft_l, **{key: value for key, value in TRAINED.items() if key != "text_batch_size"}),
    "gradient_mask": own_loop,
    "learn_weight_mask": partial(masked, learn=learn_weight_mask),
    "learn_weight_mask_in_place": partial(masked, learn=learn_weight_mask_in_place),
    "learned_further": partial(learned_further, **TRAINED),
    "lora": partial(lora, rank=2, **TRAINED),
    "mean_ablated": mean_ablated,
    "memit": partial(memit, **WRITTEN),
    "rome": partial(rome, **WRITTEN),
    "scaled": negated,
    "task_vector": vector,
    "weight_mask": own_loop_of_numbers,
    "zeroed": lambda model, task, mask: zeroed(model, mask),
}
"""Name -> (model, task, mask) -> Edit. A new editor is one line."""

BY_MICRO_BATCHES = (
    *("finetune", "ft_l", "learn_weight_mask", "learn_weight_mask_in_place"),
    *("learned_further", "lora", "scaled", "task_vector"),
)
"""Editors that take `micro_batch_size`."""

NO_EDITOR = {
    "generated_prefixes": "text for `rome`: test_contexts.py",
    "key_covariance": "a statistic for `rome`: test_key_covariance.py",
    "paper_settings": "a table: test_presets.py",
    "search": "runs an editor again and again: test_search.py",
    "sequence": "runs an editor for each task: test_sequence.py",
}
"""Public functions that take a model and make no edit of it by themselves, and where they are tested."""

ONLY = {name: {"MLP", "matrix of an MLP", "neuron"} for name in ("rome", "memit", "alpha_edit")} | {
    "mean_ablated": set(KINDS) - {"matrix of a head"},
}
"""The kinds that an editor takes, where it cannot take all; the others it has to refuse."""

every_editor = pytest.mark.parametrize("name", EDITORS)


def test_every_public_editor_is_in_the_contract():
    public = {name: getattr(mu.edit, name) for name in mu.edit.__all__}
    asked = {n for n, f in public.items() if inspect.isfunction(f) and "model" in inspect.signature(f).parameters}
    assert asked - set(EDITORS) - set(NO_EDITOR) == set(), "add a line to EDITORS"
    assert set(EDITORS) <= set(public)


def test_the_names_of_what_editors_refuse_are_names_of_editors():
    assert set(ONLY) <= set(EDITORS)
    assert all(kinds < set(KINDS) for kinds in ONLY.values())


@every_editor
def test_an_editor_keeps_its_contract(every_model: Any, name: str):
    kind = "all kinds" if "all kinds" in ONLY.get(name, KINDS) else "matrix of an MLP"
    mask = mu.ComponentMask.of(KINDS[kind], mu.shape(every_model))
    task, left = (tiny.task(every_model, answer=3, padding=side) for side in ("right", "left"))
    edit = edited(every_model, name, task, mask)
    more = MICRO_BATCHES if name in BY_MICRO_BATCHES else {}
    again = EDITORS[name](every_model, left, mask, **more)
    for label, value in edit.values.items():
        differs = (value - again.values[label]).abs() > 2e-5
        assert int(differs.sum()) <= (2 if name == "dampened" else 0), "a weight at the border of its selection"


@every_editor
@pytest.mark.parametrize("kind", KINDS)
def test_every_editor_takes_every_kind_of_localization_or_refuses_it(model: Any, kind: str, name: str):
    task, mask = tiny.task(model), mu.ComponentMask.of(KINDS[kind], mu.shape(model))
    if kind in ONLY.get(name, KINDS):
        edited(model, name, task, mask)
        return
    with left_as_it_was(model), pytest.raises(ValueError, match="expected"):
        EDITORS[name](model, task, mask)


def edited(model: Any, name: str, task: Any, mask: Any) -> Edit:
    """The edit, after a look at what it is and what it does to the model."""
    original = read(select(model, mask))
    with left_as_it_was(model):
        edit = EDITORS[name](model, task, mask)
        assert isinstance(edit, Edit)
        assert edit.mask == mask
        assert {label: value.shape for label, value in edit.values.items()} == {
            label: value.shape for label, value in original.items()
        }
        assert all(bool(torch.isfinite(value).all()) for value in edit.values.values())
        changed = changed_inside(model, edit)
    assert 0 < changed <= mask.n_parameters
    assert edit.size(model).changed == changed
    return edit


def changed_inside(model: Any, edit: Edit) -> int:
    """How many weights the edit changes; none of them lies outside its mask."""
    before = {key: slot.parameter.detach().clone() for key, slot in slots(model).items()}
    covered, changed = edit.mask.shape.entries(edit.mask), 0
    with edit.applied(model):
        for key, slot in slots(model).items():
            moved = slot.view(slot.parameter.detach() != before[key])
            changed += int(moved.sum())
            assert not moved[~covered.get(key, torch.zeros(len(moved), dtype=torch.bool))].any(), key
    return changed


@every_editor
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES if HAS_HOOKED else [])
def test_both_classes_give_the_same_edit(architecture: str, name: str):
    models = shared("bridge", architecture), shared("hooked", architecture)
    kind = "all kinds" if "all kinds" in ONLY.get(name, KINDS) else "matrix of an MLP"
    mask = mu.ComponentMask.of(KINDS[kind], mu.shape(models[0]))
    edits = [EDITORS[name](model, tiny.task(model), mask) for model in models]
    for label, value in edits[0].values.items():
        differs = (value - edits[1].values[label]).abs() > 1e-4
        assert int(differs.sum()) <= (2 if name == "dampened" else 0), label


def tried(model: Any, task: Any, name: str) -> Edit | None:
    """The edit, or None where the editor refuses what is around it; any other error is one."""
    try:
        return EDITORS[name](model, task, mu.ComponentMask.of(["L1MLP"], mu.shape(model)))
    except ValueError as error:
        if not re.search("expected (to compute in the model's own|torch's default|a model without grad)", str(error)):
            raise
        return None


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    model.original_model.gradient_checkpointing_enable()
    try:
        yield
    finally:
        model.original_model.gradient_checkpointing_disable()


@contextmanager
def default(value: Any) -> Iterator[None]:
    setting = torch.set_default_dtype if isinstance(value, torch.dtype) else torch.set_default_device
    setting(value)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


SURROUNDINGS = {
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16),
    "gradient checkpointing": checkpointed,
    "default device": lambda model: default("meta"),
    "default dtype": lambda model: default(torch.float64),
    "no gradients": lambda model: torch.no_grad(),
}


@pytest.mark.parametrize("around", SURROUNDINGS.values(), ids=SURROUNDINGS)
@every_editor
def test_what_is_around_an_editor_does_not_change_its_edit_or_is_refused(llama: Any, name: str, around: Any):
    if name in ("gradient_mask", "weight_mask"):
        pytest.skip("the loop is the user's")
    task = tiny.task(llama)
    expected = tried(llama, task, name)
    assert expected is not None
    with around(llama), left_as_it_was(llama):
        found = tried(llama, task, name)
    assert found is None or all(torch.equal(found.values[label], expected.values[label]) for label in expected.values)


@every_editor
def test_a_task_without_text_is_enough_where_text_does_not_count(llama: Any, name: str):
    edit, task = EDITORS[name], tiny.task(llama)
    mask = mu.ComponentMask.of(["L1MLP"], mu.shape(llama))
    without = replace(task, text=None, text_test=None)
    if name in ("rome", "memit", "alpha_edit"):
        text = torch.randint(4, tiny.N_VOCAB, (20, 12), generator=torch.Generator().manual_seed(3))
        edit = partial(getattr(mu.edit, name), covariance=mu.edit.key_covariance(llama, mask, text), **WRITTEN)
    elif name == "mean_ablated":
        with pytest.raises(ValueError, match=r"expected a task with text, .* got None: replace.task, text="):
            edit(llama, without, mask)
        return
    elif name in BY_MICRO_BATCHES and name != "ft_l":
        if name != "task_vector":  # which has a coefficient of 0
            with left_as_it_was(llama), pytest.raises(ValueError, match="expected a task with text"):
                edit(llama, without, mask, text_coefficient=1.0)
        edit = partial(edit, text_coefficient=0.0)
    expected, found = edit(llama, task, mask), edit(llama, without, mask)
    assert all(torch.equal(found.values[label], expected.values[label]) for label in expected.values)
