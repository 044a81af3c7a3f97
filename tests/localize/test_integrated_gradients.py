"""Completeness, and a slow reference: one prompt, one component and one point of the path at a time."""

from dataclasses import replace

import pytest
import tiny
import torch
from state import left_as_it_was

from mechunlearn.components import Component, heads_and_mlps, matrices
from mechunlearn.localize import integrated_gradients, integrated_gradients_of_activations
from mechunlearn.metrics import answer_log_probability, logit_difference
from mechunlearn.model import preserved, recording, shape, site

KINDS = ("L1H2", "L1H2.W_Q", "L0H3.W_K", "L2H0.W_V", "L1ATTN", "L0MLP", "L1MLP.W_in", "L2MLP.W_out", "L1N7")
EMBEDDING = "blocks.0.hook_resid_pre"
METHODS = pytest.mark.parametrize("method", [integrated_gradients, integrated_gradients_of_activations])


def values_at(model, prompts, names):
    with torch.no_grad(), recording(model, names) as found:
        prompts.logits(model)
    return found


def expected_over_inputs(model, prompts, component, steps):
    """For one prompt, noising."""
    sizes, name = shape(model), site(component, shape(model))
    base, source = (values_at(model, run, [name, EMBEDDING]) for run in (prompts, prompts.corrupted()))
    unit = slice(None) if component.index is None else component.index
    if component.part == "H":
        unit = component.index * sizes.units(component.matrix or "W_O") // sizes.n_heads
    total = 0.0
    for k in range(steps):
        point, moved = (2 * k + 1) / (2 * steps), []

        def enter(value, hook, point=point):
            return (1 - point) * base[EMBEDDING] + point * source[EMBEDDING]

        def add(value, hook, moved=moved):
            moved.append(torch.zeros_like(value, requires_grad=True))
            return value + moved[0]

        values = logit_difference(prompts.logits(model, hooks=[(EMBEDDING, enter), (name, add)]), prompts)
        slope = torch.autograd.grad(values.sum(), moved[0])[0]
        total += float(((source[name] - base[name]) * slope)[:, :, unit].sum()) / steps
    return total


def test_over_inputs_is_the_mean_of_slopes_at_midpoints(model):
    prompts = tiny.prompts(model, n=2)
    scores = integrated_gradients(model, prompts, components=KINDS, steps=3)
    with preserved(model):
        for column, component in enumerate(scores):
            expected = expected_over_inputs(model, prompts[[1]], component, 3)
            assert float(scores.per_prompt[1, column]) == pytest.approx(expected, rel=1e-4, abs=1e-5), component


def test_over_inputs_the_embedding_explains_the_whole_difference(model):
    """To 1e-3 with 50 midpoints: the error falls with the square of their number."""
    prompts = tiny.prompts(model)
    settings = integrated_gradients(model, prompts, components=["L0MLP"], steps=50).settings
    ends = [logit_difference(run.logits(model), prompts).mean() for run in (prompts, prompts.corrupted())]
    assert settings["difference"] == pytest.approx(float(ends[1] - ends[0]), abs=1e-5)
    assert settings["explained"] == pytest.approx(settings["difference"], abs=1e-3)


def test_more_steps_explain_more(llama):
    prompts = tiny.prompts(llama)
    found = [integrated_gradients(llama, prompts, components=["L0MLP"], steps=s).settings for s in (1, 4, 16)]
    errors = [abs(settings["explained"] - settings["difference"]) for settings in found]
    print("error of completeness with 1, 4, 16 steps:", *(f"{error:.2g}" for error in errors))
    assert errors[1] < errors[0] / 4
    assert errors[2] < errors[1] / 4


def exact(model, prompts, name, direction):
    """Patching all of one hook point: metric after minus before."""
    patched, other = (prompts, prompts.corrupted()) if direction == "noising" else (prompts.corrupted(), prompts)
    source = values_at(model, other, [name])[name]
    with torch.no_grad():
        after = patched.logits(model, hooks=[(name, lambda value, hook: source)])
        return (logit_difference(after, patched) - logit_difference(patched.logits(model), patched)).double()


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_over_activations_layers_score_their_exact_effect(model, direction):
    """To 3e-3 with 20 midpoints, prompt by prompt."""
    prompts = tiny.prompts(model, n=2)
    some = ["L0MLP", "L1ATTN", "L2MLP"]
    scores = integrated_gradients_of_activations(model, prompts, components=some, steps=20, direction=direction)
    for column, component in enumerate(scores):
        expected = exact(model, prompts, site(component, scores.shape), direction)
        assert torch.allclose(scores.per_prompt[:, column], expected, atol=3e-3), component


@pytest.mark.parametrize("matrix", ["W_Q", "W_K", "W_V", "W_O"])
def test_over_activations_heads_share_the_exact_effect_of_their_hook_point(model, matrix):
    prompts = tiny.prompts(model, n=2)
    group = 4 // shape(model).units(matrix)
    heads = [Component(1, "H", head, matrix) for head in range(0, 4, group)]
    scores = integrated_gradients_of_activations(model, prompts, components=heads, steps=20)
    expected = exact(model, prompts, site(heads[0], scores.shape), "noising")
    assert torch.allclose(scores.per_prompt.sum(1), expected, atol=3e-3)


def test_neurons_share_the_effect_of_all_neurons(llama):
    prompts = tiny.prompts(llama, n=3)
    neurons = [Component(2, "N", neuron) for neuron in range(64)]
    scores = integrated_gradients_of_activations(llama, prompts, components=neurons, steps=50)
    assert torch.allclose(
        scores.per_prompt.sum(1), exact(llama, prompts, "blocks.2.mlp.hook_post", "noising"), atol=1e-3
    )


def test_over_inputs_noising_is_minus_denoising(model):
    prompts = tiny.prompts(model)
    there, back = (integrated_gradients(model, prompts, direction=d) for d in ("noising", "denoising"))
    assert torch.allclose(there.per_prompt, -back.per_prompt, atol=1e-5)


@METHODS
def test_the_model_is_left_as_it_was(model, method):
    def fails(logits, prompts):
        if logits.requires_grad:
            raise KeyboardInterrupt
        return logit_difference(logits, prompts)

    prompts = tiny.prompts(model)
    with left_as_it_was(model):
        method(model, prompts, components=matrices, steps=1)
    with left_as_it_was(model), pytest.raises(KeyboardInterrupt):
        method(model, prompts, metric=fails)


@METHODS
def test_answers_of_several_tokens_are_scored(llama, method):
    scores = method(llama, tiny.prompts(llama, answer=3), metric=answer_log_probability)
    assert float(scores.tensor.abs().min()) > 0


def test_passes_are_counted(llama):
    passes = []
    handles = [
        llama.blocks[layer].mlp.register_forward_hook(lambda *_, layer=layer: passes.append(layer)) for layer in (0, 2)
    ]
    try:
        integrated_gradients(llama, tiny.prompts(llama), steps=4)
        assert passes == [0, 2] * 6
        passes.clear()
        integrated_gradients_of_activations(llama, tiny.prompts(llama), steps=4, components=["L2MLP", "L2H0"])
        assert passes == [0, 2] * 2 + [2] * 8, "layers below the hook point do not run"
    finally:
        for handle in handles:
            handle.remove()


@METHODS
def test_settings_say_how_it_was_made(llama, method):
    scores = method(llama, tiny.prompts(llama), direction="denoising", batch_size=3, components=heads_and_mlps, steps=2)
    expected = {"direction": "denoising", "steps": 2, "rule": "midpoint", "batch_size": 3, "prompts": 6}
    assert scores.method == method.__name__
    assert expected.items() <= scores.settings.items()


@METHODS
def test_bad_input_is_refused(llama, unchecked, method):
    prompts = tiny.prompts(llama)
    with left_as_it_was(llama):
        with pytest.raises(ValueError, match="expected at least one step, got 0"):
            method(llama, prompts, steps=0)
        with pytest.raises(ValueError, match="expected prompts with a corrupted counterpart"):
            method(llama, replace(prompts, corrupt=None))
        with pytest.raises(ValueError, match='expected direction "noising" or "denoising"'):
            method(llama, prompts, direction="there")
        with pytest.raises(ValueError, match="expected a metric with a gradient"):
            method(llama, prompts, metric=lambda logits, prompts: logits.detach()[:, 0, 0])
