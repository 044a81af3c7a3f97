"""The slow, obvious reference: one prompt at a time, a plain backward pass, every weight of the component looked up."""

import pytest
import tiny
import torch
from state import left_as_it_was

from mechunlearn.components import Component, layers, matrices
from mechunlearn.localize import fisher, gradient_times_weight, snip, wagle
from mechunlearn.losses import cross_entropy, log_one_minus_probability
from mechunlearn.metrics import answer_log_probability
from mechunlearn.model import preserved, shape, slots

KINDS = ("L1H2", "L0H3.W_Q", "L1H3.W_K", "L2H0.W_V", "L2H1.W_O", "L1ATTN", "L0MLP", "L1MLP.W_in", "L2MLP.W_out", "L1N7")
OF_PROMPTS = pytest.mark.parametrize("method", [gradient_times_weight, fisher, snip])


def prompt_gradients(model, prompts):
    """One list of (layer, matrix) -> gradient for each prompt, of -log p of its answer, one token long."""
    found = []
    with preserved(model):
        for slot in slots(model).values():
            slot.parameter.requires_grad_(True)
        for i in range(len(prompts)):
            loss = -answer_log_probability(prompts[[i]].logits(model), prompts[[i]]).sum()
            loss.backward()
            found.append({key: slot.parameter.grad.clone() for key, slot in slots(model).items()})
            for slot in slots(model).values():
                slot.parameter.grad = None
    return found


def entries(model, component, tensors):
    """The component's entries of (layer, matrix) -> tensor, one by one."""
    sizes, found = shape(model), slots(model)
    parts = sizes.units_of(component).items()
    return torch.cat(
        [found[component.layer, m].view(tensors[component.layer, m])[units].flatten() for m, units in parts]
    )


def weights(model):
    return {key: slot.parameter.detach() for key, slot in slots(model).items()}


def test_scores_are_sums_over_the_components_entries(model):
    prompts = tiny.prompts(model, n=4)
    alone, w = prompt_gradients(model, prompts), weights(model)
    mean = {key: sum(gradient[key] for gradient in alone) / 4 for key in w}
    signed, squared, sizes = (m(model, prompts, components=KINDS) for m in (gradient_times_weight, fisher, snip))
    close = {"rtol": 1e-3, "atol": 1e-5}
    for column, component in enumerate(signed):
        g, theta = [entries(model, component, gradient) for gradient in alone], entries(model, component, w)
        expected = torch.stack([(gradient * theta).sum() for gradient in g]).double()
        assert torch.allclose(signed.per_prompt[:, column], expected, **close), component
        expected = torch.stack([(gradient**2).sum() for gradient in g]).double()
        assert torch.allclose(squared.per_prompt[:, column], expected, **close), component
        expected = float((entries(model, component, mean) * theta).abs().sum())
        assert sizes[component] == pytest.approx(expected, rel=1e-3, abs=1e-5), component


def test_wagle_is_its_formula(model):
    forget, retain = tiny.prompts(model, n=3), tiny.prompts(model, n=2, seed=5)
    w = weights(model)
    g_f, g_r = (
        {key: sum(gradient[key] for gradient in alone) / len(alone) for key in w}
        for alone in (prompt_gradients(model, forget), prompt_gradients(model, retain))
    )
    scores = wagle(model, forget, retain, gamma=0.5, components=KINDS)
    for component in scores:
        f, r, theta = (entries(model, component, tensors) for tensors in (g_f, g_r, w))
        expected = float((theta * f - r * f / 0.5).abs().sum())
        assert scores[component] == pytest.approx(expected, rel=1e-3), component


def test_wagle_without_curvature_is_snip(llama):
    forget, retain = tiny.prompts(llama), tiny.prompts(llama, seed=5)
    scores = wagle(llama, forget, retain, gamma=1e9, components=matrices)
    assert torch.allclose(scores.tensor, snip(llama, forget, components=matrices).tensor, rtol=1e-4)
    assert not torch.allclose(scores.tensor, wagle(llama, forget, retain, components=matrices).tensor, rtol=1e-1)


def scaled_loss(model, prompts, component, factor):
    """The loss with the component's weights scaled in place."""
    found, sizes = slots(model), shape(model)
    with torch.no_grad():
        before = {key: slot.parameter.clone() for key, slot in found.items()}
        for matrix, units in sizes.units_of(component).items():
            slot = found[component.layer, matrix]
            slot.view(slot.parameter)[units] *= factor
        loss = -answer_log_probability(prompts.logits(model), prompts).mean()
        for key, slot in found.items():
            slot.parameter.copy_(before[key])
    return float(loss)


def test_gradient_times_weight_is_the_slope_of_scaling_the_weights():
    """Finite differences in float64."""
    double = tiny.bridge("gpt2").to(torch.float64)
    prompts = tiny.prompts(double)
    scores = gradient_times_weight(double, prompts, components=KINDS)
    for component in scores:
        ends = [scaled_loss(double, prompts, component, factor) for factor in (1 + 1e-5, 1 - 1e-5)]
        assert scores[component] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-7), component


def test_weights_that_heads_share_are_counted_once(llama):
    """`matrices` partition the weights, and so do `layers`."""
    prompts = tiny.prompts(llama)
    for method in (gradient_times_weight, fisher, snip):
        fine, coarse = (method(llama, prompts, components=level).tensor.sum() for level in (matrices, layers))
        assert float(fine) == pytest.approx(float(coarse), rel=1e-4)
    pair = fisher(llama, prompts, components=["L1H2.W_K", "L1H3.W_K"])
    assert pair["L1H2.W_K"] == pair["L1H3.W_K"]


def test_the_fisher_is_of_prompts_not_of_batches(llama):
    """Two prompts whose gradients partly cancel: the square of the mean is smaller than the mean of the squares."""
    prompts = tiny.prompts(llama)
    batch = {key: sum(g[key] for g in prompt_gradients(llama, prompts)) / 6 for key in weights(llama)}
    component = Component.parse("L1MLP")
    of_mean = float((entries(llama, component, batch) ** 2).sum())
    assert fisher(llama, prompts, components=[component])[component] > 1.5 * of_mean


def test_the_loss_of_a_prompt_is_the_mean_over_its_answer_tokens(llama):
    prompts = tiny.prompts(llama, answer=3)
    lengths = prompts.answer_mask.sum(1)
    assert set(lengths.tolist()) == {1, 3}

    def per_token(logits, targets):
        return cross_entropy(logits, targets)

    scores = gradient_times_weight(llama, prompts, loss=per_token, components=["L1MLP"])
    for i, length in enumerate(lengths.tolist()):
        alone = prompt_gradients(llama, prompts[[i]])[0]
        component = Component.parse("L1MLP")
        expected = float((entries(llama, component, alone) * entries(llama, component, weights(llama))).sum()) / length
        assert float(scores.per_prompt[i, 0]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_any_loss_can_be_used(llama):
    prompts = tiny.prompts(llama)
    erase = gradient_times_weight(llama, prompts, loss=log_one_minus_probability)
    assert not torch.allclose(erase.tensor, gradient_times_weight(llama, prompts).tensor, rtol=0.1)
    assert erase.metric == "log_one_minus_probability"


def test_the_model_is_left_as_it_was(model):
    prompts = tiny.prompts(model, n=2)

    def fails(logits, targets):
        raise KeyboardInterrupt

    with left_as_it_was(model):
        for method in (gradient_times_weight, fisher, snip):
            method(model, prompts, components=matrices)
        wagle(model, prompts, prompts, components=matrices)
    with left_as_it_was(model), pytest.raises(KeyboardInterrupt):
        snip(model, prompts, loss=fails)


def test_settings_say_how_it_was_made(llama):
    prompts = tiny.prompts(llama)
    scores = wagle(llama, prompts, prompts[:2], retain_loss=log_one_minus_probability, gamma=0.1)
    losses = {"forget_loss": "cross_entropy", "retain_loss": "log_one_minus_probability"}
    numbers = {"gamma": 0.1, "forget_prompts": 6, "retain_prompts": 2, "batch_size": 16}
    assert (scores.method, scores.metric, scores.settings) == ("wagle", "cross_entropy", losses | numbers)
    assert fisher(llama, prompts).settings == {"loss": "cross_entropy", "prompts": 6}


def test_bad_input_is_refused(llama, unchecked):
    prompts = tiny.prompts(llama)

    def detached(logits, targets):
        return cross_entropy(logits, targets).detach()

    with left_as_it_was(llama):
        with pytest.raises(ValueError, match="expected a loss with a gradient, got one without from detached"):
            fisher(llama, prompts, loss=detached)
        with pytest.raises(ValueError, match=r"expected a positive gamma .* got 0"):
            wagle(llama, prompts, prompts, gamma=0)
        with pytest.raises(ValueError, match="expected a batch_size of at least 1, got 0"):
            snip(llama, prompts, batch_size=0)


def test_processed_weights_are_refused():
    processed = tiny.bridge("gpt2")
    processed.enable_compatibility_mode()
    with pytest.raises(ValueError, match="expected unprocessed weights"):
        snip(processed, tiny.prompts(processed))
