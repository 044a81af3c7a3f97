"""What is read off the residual stream: direct logit attribution, the logit lens, causal tracing."""

import pytest
import torch
from independent.agreement import assert_agree
from independent.hooks import changing, recorded, run

import mechunlearn as mu


def direction_of(raw, fact):
    """What a residual stream is multiplied by to give the logit difference: answer minus the mean of the others."""
    unembedding = raw.model.lm_head.weight
    return unembedding[fact.answer] - unembedding[fact.candidates[1:]].mean(0)


def with_held_scale(raw, norm, residual, addend):
    """The part of norm(residual), bias apart, that an addend of the residual stream makes up."""
    if raw.name == "gpt2":
        scale = (residual.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        return (addend - addend.mean(-1, keepdim=True)) / scale * norm.weight
    eps = norm.eps if raw.name == "gemma2" else norm.variance_epsilon
    scale = (residual.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return addend / scale * (norm.weight + (raw.name == "gemma2"))


def added_by_head(raw, tokens, layer, h):
    """What a head adds to the residual stream; behind a post-norm, with the scale of that norm held."""
    parts = raw.at(layer)
    z, written = recorded(raw, tokens, [(parts.o, "in"), (parts.o, "out")])
    contribution = z[..., raw.head(h)] @ raw.rows(parts.o)[raw.head(h)]
    return with_held_scale(raw, parts.attn_adds, written, contribution) if raw.name == "gemma2" else contribution


def added_by_neuron(raw, tokens, layer, n):
    parts = raw.at(layer)
    a, written = recorded(raw, tokens, [(parts.down, "in"), (parts.down, "out")])
    contribution = a[..., n : n + 1] @ raw.rows(parts.down)[n : n + 1]
    return with_held_scale(raw, parts.mlp_adds, written, contribution) if raw.name == "gemma2" else contribution


def added(raw, tokens, label):
    layer = int(label[1])
    if label[2] == "H":
        return added_by_head(raw, tokens, layer, int(label[3]))
    if label[2] == "N":
        return added_by_neuron(raw, tokens, layer, int(label[3:]))
    module = raw.at(layer).attn_adds if label.endswith("ATTN") else raw.at(layer).mlp_adds
    return recorded(raw, tokens, [(module, "out")])[0]


def direct(raw, fact, label):
    """The contribution at the last token, in nats."""
    (residual,) = recorded(raw, fact.tokens, [(raw.final_norm, "in")])
    part = with_held_scale(raw, raw.final_norm, residual, added(raw, fact.tokens, label))
    return (part @ direction_of(raw, fact))[0, -1]


def all_nodes(raw):
    per_layer = [*(f"H{h}" for h in range(4)), "MLP"]
    return [f"L{layer}{part}" for layer in range(len(raw.blocks)) for part in per_layer]


@torch.no_grad()
def test_direct_logit_attribution(pair):
    raw, nodes = pair.raw, all_nodes(pair.raw)
    scores = mu.localize.direct_logit_attribution(pair.bridge, pair.prompts)
    expected = torch.tensor([[direct(raw, fact, label) for label in nodes] for fact in pair.facts])
    assert list(map(str, scores)) == nodes
    assert_agree([scores[label] for label in nodes], expected.mean(0))

    normed = [recorded(raw, fact.tokens, [(raw.final_norm, "out")])[0][0, -1] for fact in pair.facts]
    whole = torch.stack([x @ direction_of(raw, fact) for x, fact in zip(normed, pair.facts, strict=True)])
    assert_agree([scores.settings["logit_difference"]], [whole.mean()])
    assert_agree([scores.settings["remainder"]], [(whole - expected.sum(1)).mean()])


@torch.no_grad()
def test_direct_logit_attribution_of_layers_and_neurons(pair):
    chosen = ["L0ATTN", "L2ATTN", "L1N3", "L2N30"]
    scores = mu.localize.direct_logit_attribution(pair.bridge, pair.prompts, components=chosen)
    expected = torch.tensor([[direct(pair.raw, fact, label) for label in chosen] for fact in pair.facts])
    assert_agree([scores[label] for label in chosen], expected.mean(0))


@torch.no_grad()
def test_logit_lens(pair):
    raw, depth = pair.raw, len(pair.raw.blocks)
    lens = mu.localize.logit_lens(pair.bridge, pair.prompts)
    cap = getattr(raw.model.config, "final_logit_softcapping", None)
    for i, fact in enumerate(pair.facts):
        entering = recorded(raw, fact.tokens, [(block, "in") for block in raw.blocks])
        logits = [raw.model.lm_head(raw.final_norm(residual))[0, -1] for residual in entering]
        logits = torch.stack([cap * torch.tanh(row / cap) if cap else row for row in logits])
        logits = torch.cat([logits, run(raw, fact.tokens)[0, -1:]])
        assert_agree(lens.log_probability[i, : depth + 1], logits.log_softmax(-1)[:, fact.answer])
        others = logits[:, fact.candidates[1:]].mean(1)
        assert_agree(lens.logit_difference[i, : depth + 1], logits[:, fact.answer] - others)
        above = (logits > logits[:, [fact.answer]]).sum(1)
        assert lens.rank[i, : depth + 1].tolist() == above.tolist()


@torch.no_grad()
def test_logit_lens_of_components(pair):
    chosen = ["L1H2", "L2MLP", "L0ATTN"]
    lens = mu.localize.logit_lens(pair.bridge, pair.prompts, components=chosen)
    columns = [lens.points.index(label) for label in chosen]
    for i, fact in enumerate(pair.facts):
        expected = torch.stack([direct(pair.raw, fact, label) for label in chosen])
        assert_agree(lens.logit_difference[i, columns], expected)


def first_norm(huggingface, name):
    """What reads the residual stream first, and so sees what has been added to embeddings."""
    return huggingface.transformer.h[0].ln_1 if name == "gpt2" else huggingface.model.layers[0].input_layernorm


def noises_in(inputs, clean, subjects):
    """The different noises of each prompt among inputs of the first norm: rows that differ at its subject alone."""
    found = [[] for _ in clean]
    for batch in inputs:
        for row in batch:
            for i, (embedded, subject) in enumerate(zip(clean, subjects, strict=True)):
                noise = row[: len(embedded)] - embedded if len(row) >= len(embedded) else embedded
                if (noise.abs() > 1e-6).any(-1).nonzero().flatten().tolist() == list(subject):
                    found[i].append(noise[list(subject)])
    return [unique(noises) for noises in found]


def unique(tensors):
    kept = []
    for tensor in tensors:
        if not any(torch.allclose(tensor, other) for other in kept):
            kept.append(tensor)
    return kept


def traced(pair, **options):
    """A trace, and the noise that it has put on each subject, as a torch hook on the bridge's first norm sees it."""
    inputs = []
    first = first_norm(pair.bridge.original_model, pair.raw.name)
    with changing([(first, "in", lambda value: inputs.append(value.detach().clone()) or value)]):
        trace = mu.localize.causal_tracing(pair.bridge, pair.prompts, **options)
    clean = [recorded(pair.raw, fact.tokens, [(pair.raw.blocks[0], "in")])[0][0] for fact in pair.facts]
    return trace, noises_in(inputs, clean, [fact.subject for fact in pair.facts]), clean


def probability(logits, fact):
    return logits[:, -1].softmax(-1)[:, fact.answer]


def restored_sites(raw, kind, layer, window):
    """The modules whose tensors are restored for one layer of a kind."""
    if kind == "residual":
        return [(raw.blocks[layer + 1] if layer + 1 < len(raw.blocks) else raw.final_norm, "in")]
    first, last = max(0, layer - window // 2), min(len(raw.blocks) - 1, layer + (window - 1) // 2)
    part = "mlp_adds" if kind == "MLP" else "attn_adds"
    return [(getattr(raw.at(i), part), "out") for i in range(first, last + 1)]


def restored(state, rows):
    """The clean state at one token of each row: rows are tokens times draws."""
    return lambda now: torch.where(rows[..., None], state, now)


def indirect_effects(raw, fact, noisy, sites):
    """For each token from the subject on, what the probability gains, over draws, with the clean state there."""
    length, draws = len(fact.clean), len(noisy)
    which = torch.arange(fact.subject[0], length).repeat_interleave(draws)
    rows, tokens = which[:, None] == torch.arange(length), fact.tokens.expand(len(which), -1)
    noise = [(raw.blocks[0], "in", lambda _: noisy.repeat(len(which) // draws, 1, 1))]
    states = recorded(raw, fact.tokens, sites)
    back = [(module, side, restored(state, rows)) for (module, side), state in zip(sites, states, strict=True)]
    gains = probability(run(raw, tokens, [*noise, *back]), fact) - probability(run(raw, tokens, noise), fact)
    return gains.reshape(-1, draws).mean(1)


@torch.no_grad()
def test_causal_tracing(pair):
    raw, window, draws = pair.raw, 2, 2
    trace, noises, clean = traced(pair, draws=draws, window=window)
    totals, expected, found = [], [], []
    for i, fact in enumerate(pair.facts):
        assert len(noises[i]) == draws
        noisy = clean[i].repeat(draws, 1, 1)
        noisy[:, list(fact.subject)] += torch.stack(noises[i])
        noise = [(raw.blocks[0], "in", lambda _, noisy=noisy: noisy)]
        low = probability(run(raw, fact.tokens.expand(draws, -1), noise), fact)
        totals.append(probability(run(raw, fact.tokens), fact)[0] - low.mean())
        for k, kind in enumerate(trace.kinds):
            for layer in range(len(raw.blocks)):
                expected.append(indirect_effects(raw, fact, noisy, restored_sites(raw, kind, layer, window)))
                found.append(trace.effects[i, k, layer, fact.subject[0] : len(fact.clean)])
    assert_agree(trace.total_effect, totals)
    assert_agree(torch.cat(found), torch.cat(expected))


@torch.no_grad()
def test_noise_of_causal_tracing(pair):
    """Three standard deviations of the subjects' embeddings; a subject's i-th token gets the same in every prompt."""
    options = {"draws": 24, "kinds": ("residual",)}
    _, noises, _ = traced(pair, **options)
    longest = max(noises, key=lambda found: found[0].numel())
    embedding = pair.raw.model.get_input_embeddings()
    of_subjects = torch.cat([embedding(fact.tokens)[0, list(fact.subject)] for fact in pair.facts])
    assert float(torch.stack(longest).std() / of_subjects.std()) == pytest.approx(3, rel=0.06)
    for found in noises:
        for noise in found:
            assert any(torch.allclose(noise, other[: len(noise)]) for other in longest)
