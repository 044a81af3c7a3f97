"""Noise on the weights: its size, where it goes, and nothing left behind."""

from functools import partial

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.evaluate.attacks.exam import Asked
from mechunlearn.evaluate.attacks.weights import noised, with_noise
from mechunlearn.metrics import candidate_probability
from mechunlearn.weights import read, select
from mechunlearn.weights.rounding import every_entry, rewritten


def masked(model, *labels):
    return select(model, mu.ComponentMask.of(labels, mu.shape(model)))


def test_noise_is_relative_to_the_root_mean_square_of_the_matrix(llama):
    """One head's entries get noise of the size of the whole W_O: the same draws, scaled by hand."""
    [entries] = masked(llama, "L1H2.W_O")
    whole = entries.slot.parameter.detach()
    rms = float((whole**2).sum() / whole.numel()) ** 0.5
    drawn = torch.randn(entries.read(whole).shape, generator=torch.Generator().manual_seed(3))
    found = with_noise(entries, 0.5, torch.Generator().manual_seed(3))
    assert torch.allclose(found, entries.read(whole) + 0.5 * rms * drawn, atol=1e-6)


def test_only_what_the_mask_covers_is_changed(model):
    entries, everything = masked(model, "L1H2", "L2MLP.W_out"), every_entry(model)
    before = read(everything)
    generator = torch.Generator().manual_seed(0)
    with left_as_it_was(model), rewritten(model, entries, lambda e: with_noise(e, 0.1, generator)):
        after = read(everything)
        outside = {e.label: e.outside() for e in entries}
        for e in everything:
            changed = (after[e.label] != before[e.label]).flatten(1).any(1)
            units = ~outside[e.label].units if e.label in outside else torch.zeros_like(changed)
            assert torch.equal(changed, units), e.label


def test_a_point_is_the_mean_over_draws(llama):
    task, entries = tiny.task(llama), every_entry(llama)
    found = noised(llama, task, scales=(0.1,), draws=2, seed=4)
    asked = Asked.of(llama, task, task.formats["trained prompt"].forget, metric=candidate_probability, seed=4)
    each = []
    for draw in (4000, 4001):
        generator = torch.Generator().manual_seed(draw)
        with rewritten(llama, entries, lambda e, g=generator: with_noise(e, 0.1, g)):
            each.append(asked.scores_of(llama)[0])
    assert found.curve is not None
    assert found.curve.points == ("0", "0.1")
    assert not torch.allclose(each[0], each[1], atol=1e-3)
    assert torch.allclose(found.curve.per_prompt[:, 1], (each[0] + each[1]) / 2, atol=1e-6)


def test_the_unchanged_model_comes_first_and_more_noise_changes_more(model):
    task = tiny.task(model)
    with left_as_it_was(model):
        found = noised(model, task, scales=(0.3, 0.01), draws=1)
    assert found.curve is not None
    assert found.curve.points == ("0", "0.01", "0.3")
    plain = mu.evaluate.accuracy(model, task.formats["trained prompt"].forget).probability
    assert torch.allclose(found.curve.per_prompt[:, 0], plain.per_example, atol=1e-5)
    distance = (found.curve.per_prompt - found.curve.per_prompt[:, :1]).abs().mean(0)
    assert 0 < float(distance[1]) < float(distance[2])


def test_seeds_repeat_and_differ(llama):
    task = tiny.task(llama)
    found = [noised(llama, task, scales=(0.3,), draws=1, seed=seed).curve for seed in (1, 1, 2)]
    one, again, other = (curve.per_prompt for curve in found if curve is not None)
    assert torch.equal(one, again)
    assert not torch.allclose(one[:, 1], other[:, 1], atol=1e-3)


def test_a_metric_that_fails_under_noise_leaves_no_trace(llama):
    seen = []

    def failing(logits, prompts):
        seen.append(len(prompts))
        if len(seen) > 3:
            raise KeyboardInterrupt
        return candidate_probability(logits, prompts)

    with left_as_it_was(llama), pytest.raises(KeyboardInterrupt):
        noised(llama, tiny.task(llama), metric=failing)


def test_noise_that_makes_no_sense_is_refused(llama):
    for attack in (partial(noised, draws=0), partial(noised, scales=(-0.1,))):
        with pytest.raises(ValueError, match="expected scales of 0 or more and at least one draw"):
            attack(llama, tiny.task(llama))
