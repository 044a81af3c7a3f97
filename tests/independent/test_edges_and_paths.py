"""Edges and paths: destinations that alone read a changed residual stream, recomputed by hooks and autograd."""

import pytest
import torch
from independent.agreement import assert_agree
from independent.edges import gain, leaves_at, reading, slope_gain
from independent.facts import logit_difference
from independent.hooks import put, recorded, run, values

import mechunlearn as mu

EDGES = [
    *("embed->L0H1.W_Q", "embed->L0H2.W_K", "embed->L1MLP", "embed->logits", "L0H1->L1H2.W_Q", "L0H3->L2H2.W_V"),
    *("L0H0->L1H0.W_K", "L1H1->L1MLP", "L0MLP->L2MLP", "L0MLP->L1H3.W_Q", "L1MLP->L2H0.W_V", "L2H1->L2MLP"),
    *("L1H2->logits", "L2H3->logits", "L0MLP->logits", "L2MLP->logits"),
]


def ends(raw, fact, direction="noising"):
    return (fact.tokens, fact.other) if direction == "noising" else (fact.other, fact.tokens)


def slopes_at(raw, x, fact, destinations, changes=()):
    leaves, reads = leaves_at(raw, destinations, torch.zeros(1, x.shape[1], 24, dtype=torch.float64))
    logit_difference(run(raw, x, [*changes, *reads]), fact).backward()
    raw.model.zero_grad()
    return {destination: leaf.grad for destination, leaf in leaves.items()}


def split(edge):
    return tuple(edge.split("->"))


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_edge_patching(pair, direction):
    raw = pair.raw
    scores = mu.localize.edge_patching(pair.bridge, pair.prompts, edges=EDGES, direction=direction)
    expected = torch.zeros(len(pair.facts), len(EDGES))
    with torch.no_grad():
        for i, fact in enumerate(pair.facts):
            x, other = ends(raw, fact, direction)
            before = logit_difference(run(raw, x), fact)
            gains = {source: gain(raw, x, other, source) for source in {split(edge)[0] for edge in EDGES}}
            for j, (source, destination) in enumerate(map(split, EDGES)):
                patched = run(raw, x, reading(raw, destination, lambda r, delta=gains[source]: delta))
                expected[i, j] = logit_difference(patched, fact) - before
    assert_agree([scores[edge] for edge in EDGES], expected.mean(0))


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_edge_attribution_patching(pair, direction):
    raw, destinations = pair.raw, sorted({split(edge)[1] for edge in EDGES})
    scores = mu.localize.edge_attribution_patching(pair.bridge, pair.prompts, edges=EDGES, direction=direction)
    expected = torch.zeros(len(pair.facts), len(EDGES))
    for i, fact in enumerate(pair.facts):
        x, other = ends(raw, fact, direction)
        slopes = slopes_at(raw, x, fact, destinations)
        moved = {source: slope_gain(raw, x, other, source) for source in {split(edge)[0] for edge in EDGES}}
        for j, (source, destination) in enumerate(map(split, EDGES)):
            expected[i, j] = (moved[source] * slopes[destination]).sum()
    assert_agree([scores[edge] for edge in EDGES], expected.mean(0))


def moved_through_the_norm(raw, fact, source):
    """What a source adds in x' less what it adds in x, a post-norm taken by the mean of its slopes in both."""
    if source[2:3] != "H":
        return slope_gain(raw, fact.tokens, fact.other, source)
    o = raw.at(int(source[1])).o
    points = [recorded(raw, tokens, [(o, "out")])[0] for tokens in (fact.tokens, fact.other)]
    return sum(slope_gain(raw, fact.tokens, fact.other, source, point) for point in points) / 2


def test_edge_integrated_gradients(pair):
    raw, steps, destinations = pair.raw, 2, sorted({split(edge)[1] for edge in EDGES})
    scores = mu.localize.edge_integrated_gradients(pair.bridge, pair.prompts, edges=EDGES, steps=steps)
    expected = torch.zeros(len(pair.facts), len(EDGES))
    for i, fact in enumerate(pair.facts):
        ((e,), (e_other,)) = (recorded(raw, tokens, [(raw.blocks[0], "in")]) for tokens in (fact.tokens, fact.other))
        moved = {source: moved_through_the_norm(raw, fact, source) for source in {split(edge)[0] for edge in EDGES}}
        for k in range(steps):
            midpoint = (e + (k + 0.5) / steps * (e_other - e)).detach()
            between = [(raw.blocks[0], "in", put(slice(None), midpoint))]
            slopes = slopes_at(raw, fact.tokens, fact, destinations, between)
            for j, (source, destination) in enumerate(map(split, EDGES)):
                expected[i, j] += (moved[source] * slopes[destination]).sum().detach() / steps
    assert_agree([scores[edge] for edge in EDGES], expected.mean(0))


SENDERS = ["L0H1", "L0H2", "L0MLP", "L1H0", "L1MLP", "L2H3", "L0ATTN"]


def path_by_hand(raw, fact, senders, receivers):
    """metric(x, where the receivers alone read what the sender adds in x') - metric(x)."""
    delta = sum(gain(raw, fact.tokens, fact.other, sender) for sender in senders)
    changes = [c for receiver in receivers for c in reading(raw, receiver, lambda r: delta)]
    return logit_difference(run(raw, fact.tokens, changes), fact) - logit_difference(run(raw, fact.tokens), fact)


@torch.no_grad()
def test_path_patching_to_the_logits(pair):
    senders = [sender for sender in SENDERS if not sender.endswith("ATTN")]
    scores = mu.localize.path_patching(pair.bridge, pair.prompts, senders=senders)
    expected = torch.tensor(
        [[path_by_hand(pair.raw, fact, [sender], ["logits"]) for sender in senders] for fact in pair.facts]
    )
    assert_agree([scores[sender] for sender in senders], expected.mean(0))


@torch.no_grad()
@pytest.mark.parametrize("receivers", [["L2H2.W_V", "L2H0.W_K"], ["L2MLP"], ["L1H2.W_Q", "L2H1.W_Q"]])
def test_path_patching_to_components(pair, receivers):
    senders = ["L0H1", "L0H2", "L0MLP", "L1H0", "L1MLP"]
    scores = mu.localize.path_patching(pair.bridge, pair.prompts, senders=senders, receivers=receivers)
    held = [[held_path(pair.raw, fact, sender, receivers) for sender in senders] for fact in pair.facts]
    assert_agree([scores[sender] for sender in senders], torch.tensor(held).mean(0))


def held_path(raw, fact, sender, receivers, through_mlps=False):
    """In two runs: what the receivers would read, all else held as in x; then x with that input and all else free."""
    streams = responding_streams(raw, fact, sender, receivers, through_mlps)
    changes = []
    for receiver, stream in streams.items():
        changes += reading(raw, receiver, lambda r, stream=stream: stream - r)
    return logit_difference(run(raw, fact.tokens, changes), fact) - logit_difference(run(raw, fact.tokens), fact)


def responding_streams(raw, fact, sender, receivers, through_mlps):
    """The residual stream that each receiver reads while the sender writes as in x' and other components as in x."""
    layers = [raw.at(layer) for layer in range(len(raw.blocks))]
    held = [(parts.o, "in") for parts in layers]
    held += [] if through_mlps else [(parts.mlp_adds, "out") for parts in layers]
    states = recorded(raw, fact.tokens, held)
    changes = [(module, side, put(slice(None), state)) for (module, side), state in zip(held, states, strict=True)]
    parts = raw.at(int(sender[1]))
    place = (
        (parts.mlp_adds, "out", slice(None)) if sender.endswith("MLP") else (parts.o, "in", raw.head(int(sender[3:])))
    )
    changes.append((*place[:2], put(place[2], values(raw, fact.other, [place])[0])))
    points = [entrance(raw, receiver) for receiver in receivers]
    return dict(zip(receivers, recorded(raw, fact.tokens, points, changes), strict=True))


def entrance(raw, receiver):
    if receiver == "logits":
        return raw.final_norm, "in"
    parts = raw.at(int(receiver[1]))
    return (parts.mlp_norm, "in") if receiver.endswith("MLP") else (parts.block, "in")


@torch.no_grad()
@pytest.mark.parametrize("receivers", [["L2H1.W_Q", "L2H2.W_V"], ["logits"]])
def test_path_patching_through_mlps(pair, receivers):
    senders = ["L0H1", "L0MLP", "L1H0"]
    options = {"receivers": "logits" if receivers == ["logits"] else receivers, "through_mlps": True}
    scores = mu.localize.path_patching(pair.bridge, pair.prompts, senders=senders, **options)
    held = [[held_path(pair.raw, fact, sender, receivers, True) for sender in senders] for fact in pair.facts]
    assert_agree([scores[sender] for sender in senders], torch.tensor(held).mean(0))
