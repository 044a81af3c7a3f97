"""The same weights in a TransformerBridge and in a HookedTransformer (TransformerLens 3.9 only)."""

import pytest
import tiny
import torch
from conftest import shared

import mechunlearn as mu
from mechunlearn.components import layers, matrices, neurons

LEVELS = {"heads and MLPs": mu.components.heads_and_mlps, "layers": layers, "matrices": matrices, "neurons": neurons}


@pytest.fixture
def pair(architecture):
    return shared("bridge", architecture), shared("hooked", architecture)


def test_both_have_the_same_fingerprint_and_shape(pair):
    bridge, hooked = pair
    assert mu.fingerprint(bridge) == mu.fingerprint(hooked)
    assert mu.shape(bridge) == mu.shape(hooked)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_both_give_the_same_attribution(pair, level):
    bridge, hooked = pair
    scores = [mu.localize.attribution_patching(m, tiny.prompts(m), components=level).tensor for m in (bridge, hooked)]
    assert torch.allclose(*scores, rtol=1e-4, atol=1e-6 * float(scores[0].abs().max()))


def test_an_edit_made_on_one_applies_to_the_other(pair):
    bridge, hooked = pair
    mask = mu.ComponentMask.of(["L1MLP", "L2H1", "L0H3.W_K", "L0N5"], mu.shape(bridge))
    edits = [mu.edit.finetune(m, tiny.task(m), mask, steps=2, progress=False) for m in (bridge, hooked)]
    for label, value in edits[0].values.items():
        assert torch.allclose(value, edits[1].values[label], atol=1e-4), label
    prompts = tiny.prompts(bridge)
    with edits[0].applied(bridge), edits[0].applied(hooked):
        results = [mu.evaluate.accuracy(m, prompts).probability.per_example for m in (bridge, hooked)]
    assert torch.allclose(*results, atol=1e-5)
