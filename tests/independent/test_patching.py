"""Exact patching and its first-order estimates, recomputed prompt by prompt with hooks and autograd."""

from functools import partial

import pytest
import torch
from independent.agreement import assert_agree
from independent.facts import logit_difference
from independent.hooks import gradients, put, run, site, values

import mechunlearn as mu

NODES = ["L0H1", "L1H2", "L1H3", "L2H0", "L0ATTN", "L2ATTN", "L0MLP", "L1MLP", "L2MLP"]
PARTS = [
    "L0N3",
    "L1N30",
    "L2N7",
    "L0H1.W_Q",
    "L1H2.W_K",
    "L1H3.W_K",
    "L1H0.W_V",
    "L2H3.W_O",
    "L1MLP.W_in",
    "L2MLP.W_out",
]
DIRECTIONS = ["noising", "denoising"]


def labels(raw) -> list[str]:
    return [*NODES, *PARTS, *(["L1MLP.W_gate"] if raw.name != "gpt2" else [])]


def runs(fact, direction):
    """x, the run that is patched, and x', the run that the patch is from."""
    return (fact.tokens, fact.other) if direction == "noising" else (fact.other, fact.tokens)


def effects(raw, fact, sets, direction="noising", where=None):
    """For each set of labels: metric(x with their outputs as in x') - metric(x)."""
    x, other = runs(fact, direction)
    sites = [[site(raw, label) for label in members] for members in sets]
    new = iter(values(raw, other, [place for places in sites for place in places]))
    before, found = logit_difference(run(raw, x), fact), []
    for places in sites:
        changes = [(module, side, put(part, next(new), where)) for module, side, part in places]
        found.append(logit_difference(run(raw, x, changes), fact) - before)
    return torch.stack(found)


def alone(labels):
    return [[label] for label in labels]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_activation_patching(pair, direction):
    raw, chosen = pair.raw, labels(pair.raw)
    scores = mu.localize.activation_patching(pair.bridge, pair.prompts, components=chosen, direction=direction)
    with torch.no_grad():
        expected = torch.stack([effects(raw, fact, alone(chosen), direction) for fact in pair.facts])
    assert_agree([scores[label] for label in chosen], expected.mean(0))


def test_patching_at_each_role(pair):
    raw = pair.raw
    scores = mu.localize.activation_patching_by_position(pair.bridge, pair.prompts, components=NODES)
    masks = mu.localize.roles(pair.prompts)
    expected = torch.zeros(len(NODES), len(scores.positions))
    with torch.no_grad():
        for j, role in enumerate(scores.positions):
            for i, fact in enumerate(pair.facts):
                where = masks[role][i][: len(fact.clean)]
                if where.any():
                    expected[:, j] += effects(raw, fact, alone(NODES), where=where) / len(pair.facts)
    assert (expected != 0).any(0).sum() >= 3  # before the subject, both runs are the same
    by_label = torch.tensor([[scores.at(role)[label] for role in scores.positions] for label in NODES])
    assert_agree(by_label, expected)


def test_roles_are_what_they_are_called(pair):
    roles = {name: mask.nonzero().tolist() for name, mask in mu.localize.roles(pair.prompts).items()}
    last = [[i, fact.subject[-1]] for i, fact in enumerate(pair.facts)]
    assert roles["last of the subject"] == last
    assert sorted(place for places in roles.values() for place in places) == [
        [i, j] for i, fact in enumerate(pair.facts) for j in range(len(fact.clean))
    ]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_set_patching(pair, direction):
    raw, sets = pair.raw, {"some": ["L0H1", "L1N30", "L1N31", "L2MLP"], "others": ["L0MLP", "L1H2", "L1H3"]}
    frame = mu.localize.set_patching(pair.bridge, pair.prompts, sets, direction=direction).to_frame()
    with torch.no_grad():
        expected = torch.stack([effects(raw, fact, list(sets.values()), direction) for fact in pair.facts])
    assert_agree([frame.loc[name, "effect"] for name in sets], expected.mean(0))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_attribution_patching(pair, direction):
    raw, chosen = pair.raw, labels(pair.raw)
    sites = [site(raw, label) for label in chosen]
    expected = []
    for fact in pair.facts:
        x, other = runs(fact, direction)
        here, slopes = gradients(raw, x, sites, partial(logit_difference, fact=fact))
        there = values(raw, other, sites)
        expected.append([((b - a) * slope).sum() for a, b, slope in zip(here, there, slopes, strict=True)])
    scores = mu.localize.attribution_patching(pair.bridge, pair.prompts, components=chosen, direction=direction)
    found = torch.tensor([scores[label] for label in chosen])
    assert_agree(found, torch.tensor(expected).mean(0))


def test_integrated_gradients(pair):
    raw, steps, chosen = pair.raw, 3, labels(pair.raw)
    sites, entrance = [site(raw, label) for label in chosen], (raw.blocks[0], "in", slice(None))
    expected, explained = [], []
    for fact in pair.facts:
        differences = [
            b - a for a, b in zip(values(raw, fact.tokens, sites), values(raw, fact.other, sites), strict=True)
        ]
        (e,), (e_other,) = values(raw, fact.tokens, [entrance]), values(raw, fact.other, [entrance])
        total = [torch.zeros(())] * (len(sites) + 1)
        for k in range(steps):
            midpoint = (e + (k + 0.5) / steps * (e_other - e)).detach()
            between = [(raw.blocks[0], "in", put(slice(None), midpoint))]
            metric = partial(logit_difference, fact=fact)
            _, slopes = gradients(raw, fact.tokens, [*sites, entrance], metric, between)
            moved = zip(total, [*differences, e_other - e], slopes, strict=True)
            total = [so_far + (d * slope).sum() / steps for so_far, d, slope in moved]
        expected.append(total[:-1])
        explained.append(total[-1])
    scores = mu.localize.integrated_gradients(pair.bridge, pair.prompts, steps=steps, components=chosen)
    assert_agree([scores[label] for label in chosen], torch.tensor(expected).mean(0))
    assert_agree([scores.settings["explained"]], [torch.tensor(explained).mean()])
    other = mu.localize.integrated_gradients(
        pair.bridge, pair.prompts, steps=steps, components=chosen, direction="denoising"
    )
    assert_agree([other[label] for label in chosen], -torch.tensor(expected).mean(0))


def test_integrated_gradients_of_activations(pair):
    raw, steps, chosen = pair.raw, 2, ["L0H1", "L1H2", "L1MLP", "L2N7"]
    expected = []
    for fact in pair.facts:
        scores = []
        for label in chosen:
            module, side, part = site(raw, label)
            point = (module, side, slice(None))  # all heads or neurons of the layer move together
            (a,), (b,) = values(raw, fact.tokens, [point]), values(raw, fact.other, [point])
            total = torch.zeros(())
            for k in range(steps):
                midpoint = (a + (k + 0.5) / steps * (b - a)).detach()
                changes = [(module, side, put(slice(None), midpoint))]
                _, (slope,) = gradients(raw, fact.tokens, [point], partial(logit_difference, fact=fact), changes)
                total = total + ((b - a) * slope)[..., part].sum() / steps
            scores.append(total)
        expected.append(scores)
    found = mu.localize.integrated_gradients_of_activations(pair.bridge, pair.prompts, steps=steps, components=chosen)
    assert_agree([found[label] for label in chosen], torch.tensor(expected).mean(0))
