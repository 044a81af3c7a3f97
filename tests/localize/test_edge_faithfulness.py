"""The references: exact edge patching for single edges; for circuits, the model written out reader by reader."""

from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch
from full_pass import with_replaced
from one_edge import at, change_to, site_of, some_edges, with_one_edge_moved
from state import left_as_it_was
from torch.nn.functional import rms_norm, silu

import mechunlearn as mu
from mechunlearn.components import (
    Component,
    ComponentMask,
    Edge,
    EdgeMask,
    EdgeScores,
    destinations,
    edges,
    heads_and_mlps,
    sources,
)
from mechunlearn.localize import attribution_patching, edge_attribution_patching, edge_faithfulness, edge_patching
from mechunlearn.localize.replacement import mean_over, resample, zero
from mechunlearn.metrics import answer_log_probability, logit_difference
from mechunlearn.model import shape, slots
from mechunlearn.model.edges import edges_of, is_parallel


def everything(model):
    return edges(shape(model), parallel=is_parallel(model))


def random_circuit(model, share, seed=0):
    chosen = everything(model)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    return EdgeMask.of([chosen[i] for i in order[: int(share * len(chosen))]], shape(model))


@torch.no_grad()
def test_without_any_edge_it_is_the_corrupt_run(model):
    prompts = tiny.prompts(model)
    found = edge_faithfulness(model, prompts, random_circuit(model, 0.5), random_circuits=0)
    corrupt = logit_difference(prompts.corrupted().logits(model), prompts).double()
    assert torch.allclose(found.nothing, corrupt, atol=1e-5)
    assert torch.allclose(found.whole, logit_difference(prompts.logits(model), prompts).double(), atol=1e-6)
    assert found.to_frame().loc[[0, 2], "faithfulness"].tolist() == [0, 1]


def test_without_one_edge_it_has_the_effect_of_exact_edge_patching(model):
    prompts = tiny.prompts(model, n=3, padding="left")
    chosen = everything(model)[:: 7 if model.cfg.n_layers == 3 else 1]
    exact = edge_patching(model, prompts, edges=chosen)
    singles = [EdgeMask.of([edge], shape(model)) for edge in chosen]
    found = edge_faithfulness(model, prompts, singles, random_circuits=0)
    for place, circuit in enumerate(found.circuits[1:-1], 1):
        (edge,) = circuit
        row, column = sources(exact.shape).index(edge.source), destinations(exact.shape).index(edge.destination)
        effect = found.without[:, place] - found.whole
        assert torch.allclose(effect, exact.per_prompt[:, row, column].double(), atol=2e-5), edge
    assert exact.tensor.abs().max() > 1e-2


class ByHand:
    """A tiny Llama, one reader after the other, on one unpadded prompt; heads read and write one by one."""

    def __init__(self, model):
        self.sizes, self.slots, self.model = shape(model), slots(model), model

    def weight(self, layer, matrix, unit):
        slot = self.slots[layer, matrix]
        return slot.view(slot.parameter.detach())[unit]

    def norm(self, module, x):
        return rms_norm(x, x.shape[-1:], next(module.parameters()).detach(), self.model.cfg.eps)

    def rotated(self, x):
        half = x.shape[-1] // 2
        angles = torch.arange(len(x))[:, None] / 10000 ** (torch.arange(half) / half)[None]
        cos, sin = torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1)
        return x * cos + torch.cat([-x[:, half:], x[:, :half]], 1) * sin

    def pruned(self, kept):
        """Without the edges from sources that none enters, again and again."""
        readers = {f"L{i}MLP": (f"L{i}MLP",) for i in range(self.sizes.n_layers)}
        for i, head in product(range(self.sizes.n_layers), range(self.sizes.n_heads)):
            shared = head - head % (self.sizes.n_heads // self.sizes.n_kv_heads)
            readers[f"L{i}H{head}"] = f"L{i}H{head}.W_Q", f"L{i}H{shared}.W_K", f"L{i}H{shared}.W_V"
        entered = {edge.split("->")[1] for edge in kept}
        left = {e for e in kept if e.startswith("embed") or entered & set(readers[e.split("->")[0]])}
        return left if left == kept else self.pruned(left)

    def run(self, tokens, kept=None, other=None):
        """What every source adds, and what the final norm reads."""
        kept = None if kept is None else self.pruned(kept)
        added = {"embed": self.model.embed(tokens[None])[0].detach()}

        def read(destination, before):
            carried = [
                added[u] if kept is None or f"{u}->{destination}" in kept else other[u] for u in before
            ]  # no biases in this model
            return torch.stack(carried).sum(0)

        for layer, block in enumerate(self.model.blocks):
            before = list(added)
            for head in range(self.sizes.n_heads):
                kv = head * self.sizes.n_kv_heads // self.sizes.n_heads
                first = kv * self.sizes.n_heads // self.sizes.n_kv_heads
                q, k, v = (
                    self.norm(block.ln1, read(f"L{layer}H{h}.{m}", before)) @ self.weight(layer, m, unit).T
                    for m, h, unit in (("W_Q", head, head), ("W_K", first, kv), ("W_V", first, kv))
                )
                scores = self.rotated(q) @ self.rotated(k).T / q.shape[1] ** 0.5
                pattern = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(1)
                added[f"L{layer}H{head}"] = pattern @ v @ self.weight(layer, "W_O", head)
            x = self.norm(block.ln2, read(f"L{layer}MLP", list(added)))
            gate, up = (x @ self.weight(layer, m, slice(None))[:, 0].T for m in ("W_gate", "W_in"))
            added[f"L{layer}MLP"] = (silu(gate) * up) @ self.weight(layer, "W_out", slice(None))[:, 0]
        return added, self.model.unembed(self.norm(self.model.ln_final, read("logits", list(added)))[None])[0]


@torch.no_grad()
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_a_circuit_is_the_model_in_which_every_reader_gets_its_own_input(llama, share):
    prompts, hand, circuit = tiny.prompts(llama)[[1]], ByHand(llama), random_circuit(llama, share)
    assert torch.allclose(hand.run(prompts.tokens[0])[1][-1], prompts.logits(llama)[0, 0], atol=1e-5)
    other, _ = hand.run(prompts.corrupt[0])
    kept = set(map(str, circuit))
    _, logits = hand.run(prompts.tokens[0], kept, other)
    found = edge_faithfulness(llama, prompts, circuit, random_circuits=0)
    alone = logit_difference(logits[-1][None, None], prompts)
    _, rest = hand.run(prompts.tokens[0], set(map(str, everything(llama))) - kept, other)
    without = logit_difference(rest[-1][None, None], prompts)
    assert found.alone[0, 1] == pytest.approx(float(alone), abs=2e-5)
    assert found.without[0, 1] == pytest.approx(float(without), abs=2e-5)
    assert abs(float(alone - without)) > 1e-3


# A reader all of whose sources are zero reads rounding errors, which RMSNorm divides by sqrt(eps) = 1e-3.
NORMED_ROUNDING = 3e-3
REPLACEMENTS = pytest.mark.parametrize("replacement", [zero, "mean"], ids=["zero", "mean"])


def given(replacement, model, **options):
    """`mean_over` other prompts in place of its name."""
    return mean_over(tiny.prompts(model, seed=9), **options) if replacement == "mean" else replacement


@REPLACEMENTS
def test_without_any_edge_it_is_a_full_pass_with_all_sources_replaced(model, replacement):
    prompts, replacement = tiny.prompts(model, n=4, padding="left"), given(replacement, model)
    found = edge_faithfulness(model, prompts, random_circuit(model, 0.5), replacement=replacement, random_circuits=0)
    sources_ = {"names": ["blocks.0.hook_resid_pre"], "replacement": replacement}
    expected = with_replaced(model, prompts, heads_and_mlps(shape(model)), **sources_)
    assert torch.allclose(found.nothing, expected, atol=NORMED_ROUNDING if replacement is zero else 2e-5)
    corrupt = logit_difference(prompts.corrupted().logits(model), prompts).detach()
    assert (found.nothing - corrupt).abs().max() > 3e-2, "the corrupt run has no part in it"


@REPLACEMENTS
def test_without_one_edge_its_reader_alone_is_moved_by_the_difference(model, replacement):
    """What a source would write with the replacement in place of its output, written out source by source."""
    prompts, replacement = tiny.prompts(model, n=3), given(replacement, model)
    # In parallel blocks nothing but the embedding enters the first MLP, which is pruned without that edge.
    labels = [label for label in some_edges(model) if not model.cfg.parallel_attn_mlp or label != "embed->L0MLP"]
    circuits = [EdgeMask.of([Edge.parse(label)], shape(model)) for label in labels]
    found = edge_faithfulness(model, prompts, circuits, replacement=replacement, random_circuits=0)
    moved = 0.0
    for place, circuit in enumerate(found.circuits[1:-1], 1):
        (edge,) = circuit
        own = at(model, prompts, site_of(edge.source))
        value = replacement(model, prompts, {site_of(edge.source): own})[site_of(edge.source)]
        change = change_to(model, edge.source, own, value).detach() * prompts.attention_mask[..., None]
        with torch.no_grad():
            expected = with_one_edge_moved(model, prompts, edge, change, logit_difference).double()
        rounding = NORMED_ROUNDING / 10 if replacement is zero else 3e-5  # one of the reader's sources alone is moved
        assert torch.allclose(found.without[:, place], expected, atol=rounding), edge
        moved = max(moved, float((expected - found.whole).abs().max()))
    assert moved > 1e-2


@torch.no_grad()
@REPLACEMENTS
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_circuit_with_other_replacements_is_the_model_reader_by_reader(llama, share, replacement):
    prompts, hand, circuit = tiny.prompts(llama)[[1]], ByHand(llama), random_circuit(llama, share)
    reference = tiny.prompts(llama, n=12, seed=9)[[0, 6]]  # of one length, so without padding
    own, _ = hand.run(prompts.tokens[0])
    theirs = [hand.run(tokens)[0] for tokens in reference.tokens]
    means = {name: torch.cat([run[name][1:] for run in theirs]).mean(0).expand_as(v) for name, v in own.items()}
    other = {name: torch.zeros_like(value) for name, value in own.items()} if replacement is zero else means
    other = {name: torch.cat([own[name][:1], value[1:]]) for name, value in other.items()}  # BOS keeps its own
    chosen = zero if replacement is zero else mean_over(reference)
    found = edge_faithfulness(llama, prompts, circuit, replacement=chosen, random_circuits=0)
    kept, every = set(map(str, circuit)), set(map(str, everything(llama)))
    for values, inside in ((found.alone, kept), (found.without, every - kept)):
        _, logits = hand.run(prompts.tokens[0], inside, other)
        expected = float(logit_difference(logits[-1][None, None], prompts))
        assert float(values[0, 1]) == pytest.approx(expected, abs=NORMED_ROUNDING if replacement is zero else 3e-5)
    assert found.settings["replacement"] == (
        "zero" if replacement is zero else "mean_over(positional=False, with_bos=False, batch_size=64)"
    )


def test_prompts_without_a_corrupted_side_are_enough_for_other_replacements(llama):
    prompts = replace(tiny.prompts(llama), corrupt=None)
    edge_faithfulness(llama, prompts, random_circuit(llama, 0.5), replacement=zero, random_circuits=0)


def test_an_edge_that_lies_on_no_path_changes_nothing(llama):
    """L1H2 reads nothing of the clean run, so that it writes what it wrote in the corrupt one."""
    circuit = random_circuit(llama, 0.5)
    dead = EdgeMask.of([e for e in circuit if str(e.destination).split(".")[0] != "L1H2"], shape(llama))
    dead -= {e for e in dead if str(e.destination) in ("L1H2.W_K", "L1H2.W_V")}
    kv = {f"L1H2.{m}" for m in ("W_K", "W_V")}
    assert not [e for e in dead if str(e.destination) in kv]
    more = dead | {"L1H2->logits", "L1H2->L2MLP"}
    less = dead - {"L1H2->logits", "L1H2->L2MLP"}
    found = edge_faithfulness(llama, tiny.prompts(llama), [less, more], random_circuits=0)
    assert torch.allclose(found.alone[:, 1], found.alone[:, 2], atol=1e-5)


@pytest.mark.parametrize("replacement", [resample, zero, "mean"], ids=["resample", "zero", "mean"])
def test_a_source_that_nothing_enters_writes_its_replacement(model, replacement):
    """Whatever leaves it, also through others that only such sources enter: as if those edges were out too."""
    replacement = given(replacement, model)
    entered = ("L1MLP", "L2H3.W_Q", "L2H3.W_K", "L2H3.W_V", "L2H2.W_K", "L2H2.W_V")  # KV heads may be shared
    leaving = ("L1MLP", "L2H3")
    alive = [e for e in everything(model) if str(e.destination) not in entered and str(e.source) not in leaving]
    out = [e for e in everything(model) if str(e.source) in leaving and str(e.destination) in (*entered, "logits")]
    assert any(str(e.source) == "L1MLP" and str(e.destination) == "L2H3.W_Q" for e in out)
    circuits = [EdgeMask.of(alive, shape(model)), EdgeMask.of([*alive, *out], shape(model))]
    prompts = tiny.prompts(model, n=3)
    found = edge_faithfulness(model, prompts, circuits, replacement=replacement, random_circuits=0)
    assert torch.allclose(found.alone[:, 1], found.alone[:, 2], atol=1e-5)
    entering = [e for e in everything(model) if str(e) in ("L0MLP->L1MLP", "embed->L1MLP")]
    with_entry = EdgeMask.of([*alive, *out, *entering], shape(model))
    other = edge_faithfulness(model, prompts, with_entry, replacement=replacement, random_circuits=0)
    assert (other.alone[:, 1] - found.alone[:, 1]).abs().max() > 1e-3


def test_answers_of_several_tokens(model):
    """Of a circuit with all edges but those of one MLP: what replacing the MLP does to the metric."""
    prompts = tiny.prompts(model, n=4, answer=3)
    circuit = EdgeMask.of([e for e in everything(model) if str(e.source) != "L1MLP"], shape(model))
    found = edge_faithfulness(model, prompts, circuit, metric=answer_log_probability, random_circuits=0)
    exact = mu.localize.activation_patching(model, prompts, metric=answer_log_probability, components=["L1MLP"])
    assert torch.allclose(found.alone[:, 1] - found.whole, exact.per_prompt[:, 0], atol=2e-5)


def test_scores_are_cut_at_shares_of_edges_beside_random_ones(llama):
    scores = edge_attribution_patching(llama, tiny.prompts(llama))
    found = edge_faithfulness(llama, tiny.prompts(llama), scores, sizes=[0.1, 0.4], random_circuits=2)
    assert list(dict.fromkeys(found.names)) == ["edge_attribution_patching", "random 0", "random 1"]
    assert [len(circuit) for circuit in found.circuits] == [0, 19, 76, 190] * 3
    assert found.circuits[2] == scores.top(k=76)
    assert found.circuits[5] != found.circuits[9]
    assert found.to_frame()["edges"].tolist() == [0, 19, 76, 190] * 3


def test_edges_without_a_score_are_never_replaced(llama):
    level = [e for e in everything(llama) if str(e.destination) == "L2MLP"]
    scores = EdgeScores.of({str(e): float(i) for i, e in enumerate(level)}, shape(llama))
    found = edge_faithfulness(llama, tiny.prompts(llama), scores, sizes=[0.5], random_circuits=0)
    rest = EdgeMask.of([e for e in everything(llama) if e not in level], shape(llama))
    whole = edge_faithfulness(llama, tiny.prompts(llama), rest, random_circuits=0)
    assert torch.allclose(found.nothing, whole.alone[:, 1], atol=1e-5)


def test_the_model_is_left_as_it_was(model):
    def failing(logits, prompts):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("stop")
        return logit_difference(logits, prompts)

    calls: list[int] = []
    circuit = random_circuit(model, 0.5)
    edges_of(model)  # TransformerLens' own first run
    with left_as_it_was(model):
        edge_faithfulness(model, tiny.prompts(model, n=2), circuit, random_circuits=0)
    with left_as_it_was(model), pytest.raises(RuntimeError, match="stop"):
        edge_faithfulness(model, tiny.prompts(model), circuit, metric=failing)


def test_bad_input(llama, unchecked):
    prompts, circuit = tiny.prompts(llama), random_circuit(llama, 0.5)
    with pytest.raises(ValueError, match="expected edges, got components in 'circuit': use faithfulness"):
        edge_faithfulness(llama, prompts, ComponentMask.of(["L1MLP"], shape(llama)))
    with pytest.raises(ValueError, match="expected components, got edges in 'circuit': use edge_faithfulness"):
        mu.localize.faithfulness(llama, prompts, circuit)
    with pytest.raises(ValueError, match="expected edges, got components in 'attribution_patching'"):
        edge_faithfulness(llama, prompts, attribution_patching(llama, prompts))
    with pytest.raises(ValueError, match=r"expected circuits of this model .* localize on the model"):
        edge_faithfulness(llama, prompts, EdgeMask.of(["L0H0->L1MLP"], replace(shape(llama), n_layers=7)))
    with pytest.raises(ValueError, match="expected prompts with a corrupted counterpart"):
        edge_faithfulness(llama, replace(prompts, corrupt=None), circuit)
    with pytest.raises(ValueError, match="faithfulness is undefined"):
        edge_faithfulness(llama, replace(prompts, corrupt=prompts.tokens), circuit)
    with pytest.raises(ValueError, match=r"expected sizes in \[0, 1\]"):
        edge_faithfulness(llama, prompts, circuit, sizes=[5.0])


def test_edges_that_parallel_blocks_lack_are_refused():
    model = tiny.bridge("neox")
    with pytest.raises(ValueError, match=r"expected circuits and scores of the same 250 edges .* parallel blocks lack"):
        edge_faithfulness(model, tiny.prompts(model), EdgeMask.of(["L1H2->L1MLP"], shape(model)))
    assert Component.parse("L1MLP") in {e.destination for e in everything(model)}
