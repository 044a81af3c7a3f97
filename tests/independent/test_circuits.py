"""What circuits keep, with everything else resampled, zeroed or at its mean; RelP and AtP*."""

from functools import partial

import pytest
import torch
from independent.agreement import assert_agree
from independent.architectures import BOS
from independent.facts import FACTS, logit_difference, prompts_of
from independent.hooks import changing, gradients, put, run, site, values

import mechunlearn as mu


def every_node(raw):
    return [f"L{layer}{part}" for layer in range(len(raw.blocks)) for part in ("H0", "H1", "H2", "H3", "MLP")]


def resampled(raw, fact, sites):
    return values(raw, fact.other, sites)


def zeroed(raw, fact, sites):
    """Zeros, but for BOS, which keeps its own values."""
    return [kept_at_bos(fact, own, torch.zeros_like(own)) for own in values(raw, fact.tokens, sites)]


def averaged(raw, fact, sites):
    """The mean over all real tokens of the reference facts but BOS, which keeps its own values."""
    reference = [values(raw, other.tokens, sites) for other in FACTS[1:]]
    tokens = [torch.tensor(other.clean) != BOS for other in FACTS[1:]]
    kept = [[value[0, at] for value in row] for row, at in zip(reference, tokens, strict=True)]
    means = [torch.cat(rows).mean(0) for rows in zip(*kept, strict=True)]
    own = values(raw, fact.tokens, sites)
    return [kept_at_bos(fact, now, mean.expand_as(now)) for now, mean in zip(own, means, strict=True)]


def kept_at_bos(fact, own, new):
    return torch.where((fact.tokens == BOS)[..., None], own, new)


def replaced(raw, fact, labels, replacement):
    """The metric of the clean run with the outputs of all these components replaced at once."""
    sites = [site(raw, label) for label in labels]
    new = replacement(raw, fact, sites)
    changes = [(module, side, put(part, value)) for (module, side, part), value in zip(sites, new, strict=True)]
    return logit_difference(run(raw, fact.tokens, changes), fact)


REPLACEMENTS = {
    "resample": (mu.localize.resample, resampled),
    "zero": (mu.localize.zero, zeroed),
    "mean": (mu.localize.mean_over(prompts_of(FACTS[1:])), averaged),
}


@torch.no_grad()
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_faithfulness(pair, name):
    raw, circuit = pair.raw, ["L0H1", "L0MLP", "L1H2", "L2MLP", "L2H3"]
    theirs, mine = REPLACEMENTS[name]
    mask = mu.ComponentMask.of(circuit, mu.shape(pair.bridge))
    curves = mu.localize.faithfulness(pair.bridge, pair.prompts, mask, replacement=theirs, random_circuits=0)
    row = next(i for i, found in enumerate(curves.circuits) if len(found) == len(circuit))
    nodes = every_node(raw)
    rest = [label for label in nodes if label not in circuit]
    alone, without, nothing, whole = (
        torch.stack([replaced(raw, fact, labels, mine) for fact in pair.facts]) for labels in (rest, circuit, nodes, [])
    )
    assert_agree(curves.alone[:, row], alone)
    assert_agree(curves.without[:, row], without)
    assert_agree(curves.nothing, nothing)
    frame = curves.to_frame(draws=10).iloc[row]
    span = whole.mean() - nothing.mean()
    found = torch.tensor([frame["faithfulness"], frame["left"]]) * span
    parts = torch.stack([alone.mean() - nothing.mean(), without.mean() - nothing.mean()])
    assert_agree(found, parts, tolerance=1e-4)  # metrics are kept in float32, and the span is a small difference


@torch.no_grad()
@pytest.mark.parametrize("name", ["zero", "mean"])
def test_ablation_leaves_bos_as_it_is(pair, name):
    chosen = ["L0H1", "L2H0", "L1MLP", "L1N4"]
    theirs, mine = REPLACEMENTS[name]
    scores = mu.localize.activation_patching(pair.bridge, pair.prompts, components=chosen, replacement=theirs)
    before = torch.stack([replaced(pair.raw, fact, [], mine) for fact in pair.facts])
    expected = torch.tensor([[replaced(pair.raw, fact, [label], mine) for label in chosen] for fact in pair.facts])
    assert_agree([scores[label] for label in chosen], (expected - before[:, None]).mean(0))


@torch.no_grad()
def test_incompleteness(pair):
    raw, circuit = pair.raw, ["L0H1", "L0MLP", "L1H2", "L2MLP"]
    mask = mu.ComponentMask.of(circuit, mu.shape(pair.bridge))
    found = mu.localize.incompleteness(pair.bridge, pair.prompts, mask, knockouts=3)
    rest = [label for label in every_node(raw) if label not in circuit]
    for k, knockout in enumerate(found.knockouts):
        removed = list(map(str, knockout))
        a = torch.stack([replaced(raw, fact, [*rest, *removed], resampled) for fact in pair.facts]).mean()
        b = torch.stack([replaced(raw, fact, removed, resampled) for fact in pair.facts]).mean()
        assert_agree([found.circuit_without[:, k].mean(), found.model_without[:, k].mean()], [a, b])
    sizes = [len(knockout) for knockout in found.knockouts]
    assert {0, len(circuit)} <= set(sizes)
    assert len(sizes) == 5
    assert_agree(found.tensor, (found.circuit_without - found.model_without).mean(0).abs())


# RelP: the same values, other slopes.


class HeldNorm:
    """A norm that divides by the scale of the run itself, as a constant."""

    def __init__(self, raw, norm):
        self.eps = norm.variance_epsilon if raw.name == "llama" else norm.eps
        self.weight = norm.weight + (raw.name == "gemma2")
        self.bias, self.centred = getattr(norm, "bias", None), raw.name == "gpt2"

    def __call__(self, x):
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        scale = (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt().detach()
        return x / scale * self.weight + (0 if self.bias is None else self.bias)


def held_norms(raw):
    """Changes that put in place of each norm's output one with the same value and the slope of the LN rule."""
    norms = [m for m in raw.model.modules() if "Norm" in type(m).__name__]
    stream = {}

    def remember(norm):
        return lambda x: stream.setdefault(norm, []).append(x) or x

    def held(norm):
        return lambda out: HeldNorm(raw, norm)(stream[norm].pop())

    return [c for norm in norms for c in ((norm, "in", remember(norm)), (norm, "out", held(norm)))]


def held_patterns(raw):
    """The AH rule: queries and keys have no slope, so that patterns are constants."""
    changes = []
    for layer in range(len(raw.blocks)):
        for matrix in ("W_Q", "W_K"):
            for h in range(raw.heads.query):
                module, part = raw.reads(layer, matrix, h)
                changes.append((module, "out", lambda out, part=part: put(part, out[..., part].detach())(out)))
    return changes


def held_activations(raw):
    """The identity and the half rule: what `down` reads has the slope act(h) / h, and half of it where gated.

    In two parts: what is put in place of an output, and what only looks at one.
    """
    rules, looks = [], []
    for parts in map(raw.at, range(len(raw.blocks))):
        box = {}

        def look(name, box=box):
            return lambda value: box.__setitem__(name, value) or value

        def ruled(value, box=box, act=parts.block.mlp.act if raw.name == "gpt2" else parts.block.mlp.act_fn):
            h = box["up"] if raw.name == "gpt2" else box["gate"]
            same = h * (act(h) / h).detach()
            if raw.name == "gpt2":
                return same
            both = same * box["up"]
            return (both + both.detach()) / 2

        rules.append((parts.down, "in", ruled))
        looks.append((parts.up, "out", look("up")))
        looks += [(parts.gate, "out", look("gate"))] if raw.name != "gpt2" else []
    return rules, looks


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_relp(pair, direction):
    raw = pair.raw
    chosen = ["L0H1", "L1H2", "L2H0", "L0MLP", "L1MLP", "L0N3", "L1N30", "L1H0.W_V", "L1MLP.W_in"]
    chosen += ["L1MLP.W_gate"] if raw.name != "gpt2" else []
    sites, expected = [site(raw, label) for label in chosen], []
    rules, looks = held_activations(raw)
    ruled = [*held_norms(raw), *held_patterns(raw), *rules]
    for fact in pair.facts:
        x, other = (fact.tokens, fact.other) if direction == "noising" else (fact.other, fact.tokens)
        here, relevance = gradients(raw, x, sites, partial(logit_difference, fact=fact), ruled, looks)
        there = values(raw, other, sites)
        expected.append([((b - a) * r).sum() for a, b, r in zip(here, there, relevance, strict=True)])
    scores = mu.localize.relp(pair.bridge, pair.prompts, components=chosen, direction=direction)
    assert_agree([scores[label] for label in chosen], torch.tensor(expected).mean(0))


@torch.no_grad()
def test_the_rules_of_relp_change_no_value(pair):
    rules, looks = held_activations(pair.raw)
    ruled = [*held_norms(pair.raw), *held_patterns(pair.raw), *rules, *looks]
    assert_agree(run(pair.raw, FACTS[0].tokens, ruled), run(pair.raw, FACTS[0].tokens))


def test_atp_star_with_grad_drop(pair):
    """The mean size over layers whose contributions, attention and MLP, pass no gradient; one less than there are."""
    raw = pair.raw
    chosen = ["L0H1", "L1H2", "L2H0", "L0MLP", "L1MLP", "L2MLP"]
    sites, expected = [site(raw, label) for label in chosen], []
    for fact in pair.facts:
        there, sizes = values(raw, fact.other, sites), torch.zeros(len(sites), dtype=torch.float64)
        for layer in range(len(raw.blocks)):
            metric = partial(logit_difference, fact=fact)
            here, slopes = gradients(raw, fact.tokens, sites, metric, after=dropped(raw, layer))
            estimates = [((b - a) * s).sum() for a, b, s in zip(here, there, slopes, strict=True)]
            sizes += torch.stack(estimates).detach().abs()
        expected.append(sizes / (len(raw.blocks) - 1))
    scores = mu.localize.atp_star(pair.bridge, pair.prompts, components=chosen)
    assert_agree([scores[label] for label in chosen], torch.stack(expected).mean(0))


def dropped(raw, layer):
    """No gradient flows through what a layer adds to the residual stream."""
    parts = raw.at(layer)
    stop = lambda value: value.detach()  # noqa: E731
    return [(parts.attn_adds, "out", stop), (parts.mlp_adds, "out", stop)]


def patterns(raw, tokens, changes=()):
    """The attention patterns of each layer, [head, query, key], and the logits."""
    with changing(changes):
        out = raw.model(tokens, use_cache=False, output_attentions=True)
    return out.attentions, out.logits


def pattern_change(raw, fact, label, where):
    """What the pattern of a label's layer gains with its query or key as in x', at some tokens alone."""
    module, side, part = site(raw, label)
    (value,) = values(raw, fact.other, [(module, side, part)])
    layer = int(label[1])
    with torch.no_grad():
        before, after = (
            patterns(raw, fact.tokens, c)[0][layer] for c in ([], [(module, side, put(part, value, where))])
        )
    return after - before


def test_qk_fix_of_atp_star(pair):
    """The pattern changes exactly, by a query at all positions or a key at one after the other; the rest is linear."""
    raw, chosen, expected = pair.raw, ["L0H1.W_Q", "L1H3.W_Q", "L2H0.W_Q", "L0H2.W_K", "L1H0.W_K"], []
    for fact in pair.facts:
        found, logits = patterns(raw, fact.tokens)
        slopes = torch.autograd.grad(logit_difference(logits, fact), found)
        positions = torch.eye(len(fact.clean)).bool()
        scores = []
        for label in chosen:
            at = positions if label.endswith("K") else [torch.ones(len(fact.clean)).bool()]
            scores.append(sum((pattern_change(raw, fact, label, where) * slopes[int(label[1])]).sum() for where in at))
        expected.append(scores)
    scores = mu.localize.atp_star(pair.bridge, pair.prompts, components=chosen, grad_drop=False)
    assert_agree([scores[label] for label in chosen], torch.tensor(expected).mean(0))
