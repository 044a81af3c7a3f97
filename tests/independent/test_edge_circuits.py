"""Circuits of edges: what every destination reads, worked out while a plain model runs."""

import random

import torch
from independent.agreement import assert_agree
from independent.edges import reading
from independent.facts import logit_difference
from independent.hooks import recorded, run

import mechunlearn as mu


def all_edges(raw):
    """Every source and each destination after it; keys and values under the lowest head that reads them."""
    group = raw.heads.query // raw.heads.kv
    edges, sources = [], ["embed"]
    for layer in range(len(raw.blocks)):
        heads = [f"L{layer}H{h}" for h in range(raw.heads.query)]
        reads = [f"{head}.W_Q" for head in heads] + [f"{head}.{m}" for head in heads[::group] for m in ("W_K", "W_V")]
        edges += [(u, v) for u in sources for v in reads]
        sources = [*sources, *heads]
        edges += [(u, f"L{layer}MLP") for u in sources]
        sources = [*sources, f"L{layer}MLP"]
    return [*edges, *((u, "logits") for u in sources)]


def entered(raw, source, circuit):
    """Whether an edge of the circuit enters a head (by its query, or the key or value that it reads) or an MLP."""
    if "H" not in source:
        return source == "embed" or any(v == source for _, v in circuit)
    group, (layer, h) = raw.heads.query // raw.heads.kv, source.split("H")
    lowest = f"{layer}H{int(h) // group * group}"
    doors = {f"{source}.W_Q", f"{lowest}.W_K", f"{lowest}.W_V"}
    return any(v in doors for _, v in circuit)


def written(raw, tokens):
    """What sources have computed in a run: the embedding, what each `o` reads, what each MLP adds."""
    layers = [raw.at(layer) for layer in range(len(raw.blocks))]
    sites = [(raw.blocks[0], "in"), *((p.o, "in") for p in layers), *((p.mlp_adds, "out") for p in layers)]
    embedded, *rest = recorded(raw, tokens, sites)
    return {"embed": embedded, "z": rest[: len(layers)], "MLP": rest[len(layers) :]}


def missing(raw, own, other, sources):
    """The sum over sources of what they add in the other run less what they add in this one."""
    total = other["embed"] - own["embed"] if "embed" in sources else 0 * own["embed"]
    for layer in range(len(raw.blocks)):
        parts = raw.at(layer)
        if f"L{layer}MLP" in sources:
            total = total + other["MLP"][layer] - own["MLP"][layer]
        heads = [h for h in range(raw.heads.query) if f"L{layer}H{h}" in sources]
        if heads:
            z = own["z"][layer].clone()
            for h in heads:
                z[..., raw.head(h)] = other["z"][layer][..., raw.head(h)]
            before, after = parts.o.forward(own["z"][layer]), parts.o.forward(z)
            if raw.name == "gemma2":
                before, after = parts.attn_adds.forward(before), parts.attn_adds.forward(after)
            total = total + after - before
    return total


def keeping(raw, own, other, circuit):
    """Changes that note what sources compute in this run, and put in the other run's where no edge enters."""

    def embedded(value):
        own["embed"] = value
        return value

    def heads(layer):
        def function(z):
            z = z.clone()
            for h in range(raw.heads.query):
                if not entered(raw, f"L{layer}H{h}", circuit):
                    z[..., raw.head(h)] = other["z"][layer][..., raw.head(h)]
            own["z"][layer] = z
            return z

        return function

    def mlp(layer):
        def function(value):
            own["MLP"][layer] = value if entered(raw, f"L{layer}MLP", circuit) else other["MLP"][layer]
            return own["MLP"][layer]

        return function

    changes = [(raw.blocks[0], "in", embedded)]
    for layer in range(len(raw.blocks)):
        changes += [(raw.at(layer).o, "in", heads(layer)), (raw.at(layer).mlp_adds, "out", mlp(layer))]
    return changes


def metric_of(raw, fact, circuit):
    """The metric of the clean run in which edges outside the circuit carry the corrupt run."""
    other, own = written(raw, fact.other), {"z": {}, "MLP": {}}
    changes = keeping(raw, own, other, circuit)
    removed = {}
    for u, v in set(all_edges(raw)) - set(circuit):
        removed.setdefault(v, set()).add(u)
    for v, sources in removed.items():
        changes += reading(raw, v, lambda r, sources=sources: missing(raw, own, other, sources))
    return logit_difference(run(raw, fact.tokens, changes), fact)


@torch.no_grad()
def test_edge_faithfulness(pair):
    raw, edges = pair.raw, all_edges(pair.raw)
    shape = mu.shape(pair.bridge)
    assert {f"{u}->{v}" for u, v in edges} == set(map(str, mu.components.edges(shape)))
    circuit = random.Random(0).sample(edges, len(edges) // 2)
    circuit = [(u, v) for u, v in circuit if not v.startswith(("L1H2", "L2MLP"))]  # two that no edge enters
    rest = [edge for edge in edges if edge not in set(circuit)]
    mask = mu.EdgeMask.of([f"{u}->{v}" for u, v in circuit], shape)
    curves = mu.localize.edge_faithfulness(pair.bridge, pair.prompts, mask, random_circuits=0)
    row = next(i for i, found in enumerate(curves.circuits) if len(found) == len(circuit))
    alone, without = ([metric_of(raw, fact, kept) for fact in pair.facts] for kept in (circuit, rest))
    assert_agree(curves.alone[:, row], alone)
    assert_agree(curves.without[:, row], without)
    assert_agree(curves.nothing, [logit_difference(run(raw, fact.other), fact) for fact in pair.facts])
