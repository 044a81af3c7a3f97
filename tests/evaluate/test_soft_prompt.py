"""Soft prompts: real input vectors, in their place, within their ball, trained on one half and tested on the other."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.evaluate.attacks.soft_prompt import VectorTraining, mean_norm, n_bos, soft_prompt, with_room, within
from mechunlearn.model import preserved, recording
from mechunlearn.model.running import embeddings, with_input_vectors
from mechunlearn.tasks import Format, Prompts
from mechunlearn.weights import read, select


def searching(model, task, **options):
    settings = {"n_vectors": 3, "start": 1, "radius": 4.0, "retain_coefficient": 1.0, "batch_size": 4} | options
    forgotten, retained = (with_room(model, p, settings["n_vectors"], 1) for p in (task.forget, task.retain))
    return VectorTraining(model, forgotten, retained, **settings)


def test_vectors_are_put_back_into_the_ball_by_hand():
    vectors = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(within(vectors, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_room_is_made_behind_bos_whatever_the_padding_by_hand(llama):
    """[BOS 5 6] and [BOS 7]: two tokens of any kind behind BOS, the text after them, padding on the right."""
    masks = torch.tensor([[[1, 1, 1], [1, 1, 0]], [[1, 1, 1], [0, 1, 1]]]).bool()
    right = Prompts.of([[1, 5, 6], [1, 7, 0]], [8, 9], attention_mask=masks[0])
    left = Prompts.of([[1, 5, 6], [0, 1, 7]], [8, 9], attention_mask=masks[1])
    for prompts in (right, left):
        made = with_room(llama, prompts, 2, n_bos(llama, prompts))
        assert made.tokens[0, [0, 3, 4]].tolist() == [1, 5, 6]
        assert made.tokens[1, [0, 3]].tolist() == [1, 7]
        assert made.attention_mask.tolist() == [[True] * 5, [True] * 4 + [False]]
        assert made.positions.tolist() == [[4], [3]]


def test_vectors_count_as_tokens_and_gradients_reach_them(model):
    """The embeddings of two tokens as vectors: the logits of the prompt with these tokens in it."""
    whole = torch.tensor([[1, 11, 12, 5, 6, 7], [1, 11, 12, 8, 9, 0]])
    mask = torch.tensor([[True] * 6, [True] * 5 + [False]])
    expected = Prompts.of(whole, [20, 21], attention_mask=mask).logits(model)
    short = Prompts.of(whole[:, [0, 3, 4, 5]], [20, 21], attention_mask=mask[:, [0, 3, 4, 5]])
    made = with_room(model, short, 2, n_bos(model, short))
    vectors = embeddings(model, whole, mask)[0, 1:3].clone().requires_grad_()
    with left_as_it_was(model), with_input_vectors(model, vectors, 1):
        found = made.logits(model)
        (gradient,) = torch.autograd.grad(found[:, 0, 20].sum(), [vectors])
    assert torch.allclose(found, expected, atol=1e-5)
    assert bool((gradient.norm(dim=1) > 1e-4).all())


def test_every_architecture_is_attacked(model):
    task = tiny.task(model)
    with left_as_it_was(model):
        found = soft_prompt(model, task, steps=3, every=2, restarts=1, batch_size=3)
    assert found.curve is not None
    assert found.curve.points == ("0", "2", "3")
    assert found.control is not None
    assert found.control.curve is not None
    assert found.control.curve.points == found.curve.points
    plain = mu.evaluate.accuracy(model, task.formats["trained prompt"].forget).probability
    assert torch.allclose(found.curve.per_prompt[:, 0], plain.per_example, atol=1e-5)


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_training_lowers_the_loss_within_the_ball(llama, coefficient):
    search = searching(llama, tiny.task(llama), retain_coefficient=coefficient)
    found = search.run(30, 10, 0.3, torch.optim.Adam, seed=0)
    start = within(search._tokens(torch.Generator().manual_seed(0)), 4.0)
    assert search.loss(found[30]) < search.loss(start) - 0.5
    assert all(float(vectors.norm(dim=1).max()) <= 4.0 + 1e-5 for vectors in found.values())
    assert float(found[30].norm(dim=1).max()) > 3.9


def test_the_radius_is_in_the_unit_of_the_first_layer(model):
    """With Gemma's scale, since the first layer sees it."""
    task = tiny.task(model)
    prompts = task.forget
    found = embeddings(model, prompts.tokens, prompts.attention_mask)[prompts.attention_mask]
    assert mean_norm(model, prompts) == pytest.approx(float(found.norm(dim=1).mean()), rel=1e-5)


def test_the_restart_is_chosen_on_what_it_was_trained_on(llama, monkeypatch):
    """With a loss that prefers the second restart, its curve is the one of that restart."""
    task = tiny.task(llama)
    second = searching(llama, task, n_vectors=4, radius=mean_norm(llama, task.forget), batch_size=3)
    wanted = second.run(2, 2, 0.03, torch.optim.Adam, seed=1)[2]
    losses = iter([1.0, 0.5])
    monkeypatch.setattr(VectorTraining, "loss", lambda self, vectors: next(losses))
    found = soft_prompt(llama, task, restarts=2, steps=2, every=2, batch_size=3)
    tested = with_room(llama, task.formats["trained prompt"].forget, 4, 1)
    with with_input_vectors(llama, wanted, 1):
        expected = mu.evaluate.accuracy(llama, tested).probability.per_example
    assert found.curve is not None
    assert torch.allclose(found.curve.per_prompt[:, 1], expected, atol=1e-5)


def test_padding_does_not_matter_and_seeds_repeat(llama):
    attack = partial(soft_prompt, llama, steps=2, every=2, restarts=1, batch_size=3)
    found = [attack(tiny.task(llama, padding=side)).curve for side in ("right", "left", "right")]
    right, left, again = (curve.per_prompt for curve in found if curve is not None)
    assert torch.allclose(right, left, atol=1e-5)
    assert torch.equal(right, again)


def test_the_original_answers_behind_a_soft_prompt_too(shipped):
    task = mu.tasks.sports_facts(shipped, forget=8)
    found = soft_prompt(shipped, task, steps=12, every=12, restarts=1, batch_size=8)
    assert found.curve is not None
    assert float(found.curve.mean[-1]) > 0.9


def test_what_the_last_layer_hides_comes_back(shipped):
    """The last MLP speaks against basketball, always; 16 steps on other athletes undo it, and not for nobody."""
    whole = mu.tasks.sports_facts(shipped, forget="basketball")
    asked = whole.formats["trained prompt"]
    few = {"trained prompt": Format(asked.forget[:16], asked.retain[:16])}
    task = replace(whole, forget=whole.forget[:48], retain=whole.retain[:96], formats=few)
    edit = speaking_against(shipped, task.forget, 90.0)
    with edit.applied(shipped):
        retained = mu.evaluate.accuracy(shipped, few["trained prompt"].retain).probability.value
        found = soft_prompt(shipped, task, steps=16, every=16, restarts=1)
    assert found.curve is not None
    assert found.control is not None
    assert float(found.curve.mean[0]) < 0.2
    assert retained > 0.9
    assert found.value > 0.7
    assert found.control.value < found.value - 0.3


def speaking_against(model, prompts, size):
    """An edit of the last W_out that adds the same to every prompt: less of the right answer, more of the others."""
    layer = mu.shape(model).n_layers - 1
    name = f"blocks.{layer}.mlp.hook_post"
    with preserved(model), torch.no_grad(), recording(model, [name]) as found:
        prompts.logits(model)
    inner = found[name][torch.arange(len(prompts)), prompts.positions[:, 0]]
    amounts = torch.linalg.lstsq(inner, torch.ones(len(prompts), 1), driver="gelsd").solution
    columns = model.unembed.W_U.detach()[:, prompts.candidates[0]]
    direction = columns[:, 0] - columns[:, 1:].mean(1)
    mask = mu.ComponentMask.of([f"L{layer}MLP.W_out"], mu.shape(model))
    [(label, value)] = read(select(model, mask)).items()
    changed = value - size * amounts[:, :, None] * direction / direction.norm()
    return mu.Edit(mask, {label: changed}, mu.fingerprint(model))


def test_an_interruption_leaves_no_trace(llama):
    def failing(parameters, *, lr):
        optimizer = torch.optim.Adam(parameters, lr=lr)
        optimizer.step = interrupted  # type: ignore[method-assign]  # to fail in the middle
        return optimizer

    def interrupted(*_):
        raise KeyboardInterrupt

    with left_as_it_was(llama), pytest.raises(KeyboardInterrupt):
        soft_prompt(llama, tiny.task(llama), optimizer=failing, restarts=1, steps=2)


def test_options_and_prompts_that_do_not_fit_are_refused(llama):
    task = tiny.task(llama)
    for name in ("n_vectors", "steps", "restarts", "batch_size", "every", "radius"):
        options: dict[str, Any] = {name: 0.0 if name == "radius" else 0}
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            soft_prompt(llama, task, **options)
    with pytest.raises(ValueError, match="expected prompts, with 60 vectors before them, of at most 64 tokens"):
        soft_prompt(llama, task, n_vectors=60)
