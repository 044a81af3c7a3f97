"""The slow, obvious reference, for every edge: one full pass in which one destination reads a changed input.

A head's W_Q reads through its own copy: the pass runs once with all heads reading the change, and once without; the
reference takes that head's queries from the one and everything else from the other.
"""

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import Component, Edge, destinations, sources
from mechunlearn.localize import edge_faithfulness, edge_integrated_gradients, edge_patching, path_patching
from mechunlearn.localize.edge_attribution import edge_attribution_patching
from mechunlearn.metrics import answer_log_probability, logit_difference
from mechunlearn.model import preserved, recording, shape, slots
from mechunlearn.model.edges import edges_of, mlp_reader


def reads(model, layer, part):
    """The module whose input is the destination's copy of the residual stream."""
    if part == "logits":
        return model.ln_final
    return mlp_reader(model, layer) if part == "MLP" else model.blocks[layer].ln1


@torch.no_grad()
def written(model, prompts):
    """What each source adds to the residual stream, by hooks and W_O alone (no post-norms)."""
    names = ["blocks.0.hook_resid_pre"]
    for layer in range(len(model.blocks)):
        names += [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"]
    with recording(model, names) as found:
        prompts.logits(model)
    sizes, result = shape(model), {}
    for source in sources(sizes):
        if source == "embed":
            result[source] = found["blocks.0.hook_resid_pre"]
        elif source.part == "MLP":
            result[source] = found[f"blocks.{source.layer}.hook_mlp_out"]
        else:
            slot = slots(model)[source.layer, "W_O"]
            z = found[f"blocks.{source.layer}.attn.hook_z"][:, :, source.index]
            result[source] = z @ slot.view(slot.parameter)[source.index]
    return result


@torch.no_grad()
def effect(model, prompts, change, destination, metric):
    """The metric with the destination's input moved by `change`, minus without; everything runs in full."""
    sizes = shape(model)
    layer = None if destination == "logits" else destination.layer
    module = reads(model, layer, "logits" if destination == "logits" else destination.part)

    def move(module, arguments):
        return (arguments[0] + change, *arguments[1:])

    before = metric(prompts.logits(model), prompts)
    if destination == "logits" or destination.part == "MLP":
        handle = module.register_forward_pre_hook(move)
        try:
            return metric(prompts.logits(model), prompts) - before
        finally:
            handle.remove()
    name = f"blocks.{layer}.attn.hook_{destination.matrix[-1].lower()}"
    unit = destination.index * sizes.units(destination.matrix) // sizes.n_heads
    handle = module.register_forward_pre_hook(move)
    try:
        with recording(model, [name]) as moved:
            prompts.logits(model)
    finally:
        handle.remove()

    def one_head(value, hook):
        patched = value.clone()
        patched[:, :, unit] = moved[name][:, :, unit]
        return patched

    return metric(prompts.logits(model, hooks=[(name, one_head)]), prompts) - before


def check(model, prompts, scores, chosen, metric):
    with preserved(model):
        mine, its = written(model, prompts), written(model, prompts.corrupted())
        real = prompts.attention_mask[..., None]
        rows, columns = sources(scores.shape), destinations(scores.shape)
        for row, column in chosen.nonzero().tolist():
            change = (its[rows[row]] - mine[rows[row]]) * real
            expected = effect(model, prompts, change, columns[column], metric).double()
            found = scores.per_prompt[:, row, column]
            assert torch.allclose(found, expected, atol=5e-5), (rows[row], columns[column], found, expected)


def test_every_edge_has_the_effect_of_a_full_pass(llama):
    prompts = tiny.prompts(llama, n=3)
    with left_as_it_was(llama):
        scores = edge_patching(llama, prompts)
    assert len(scores) == int(edges_of(llama).sum())
    check(llama, prompts, scores, edges_of(llama), logit_difference)
    assert (scores.values_in_order.abs() > 1e-4).float().mean() > 0.9


def test_edges_of_every_architecture(model):
    """Every seventh edge; in Gemma 2, whose heads add through a post-norm, those from MLPs and the embedding."""
    prompts = tiny.prompts(model, n=2, answer=2, padding="left")
    every = edges_of(model).nonzero()
    some = torch.zeros_like(edges_of(model))
    some[tuple(every[::7].T)] = True
    if "ln1_post" in dict(model.blocks[0].named_children()):
        heads = torch.tensor([s != "embed" and s.part == "H" for s in sources(shape(model))])
        some = edges_of(model) & ~heads[:, None]
        some[:, ::3] = False
    chosen = [Edge(sources(shape(model))[r], destinations(shape(model))[c]) for r, c in some.nonzero().tolist()]
    with left_as_it_was(model):
        scores = edge_patching(model, prompts, metric=answer_log_probability, edges=chosen, batch_size=11)
    check(model, prompts, scores, some, answer_log_probability)


def test_a_head_of_a_post_norm_model_has_one_effect_on_the_logits(unchecked):
    """Patched as an edge, as a path, and as a circuit without that edge: the norm normalizes the patched sum anew."""
    model = tiny.bridge("gemma2")
    prompts = tiny.prompts(model, n=3)
    heads_ = [f"L{layer}H{head}" for layer in range(3) for head in range(4)]
    edges = [f"{head}->logits" for head in heads_]
    exact = edge_patching(model, prompts, edges=edges)
    paths = path_patching(model, prompts, senders=heads_)
    circuits = [mu.components.EdgeMask.of([edge], shape(model)) for edge in edges]
    found = edge_faithfulness(model, prompts, circuits, random_circuits=0)
    for place, (head, edge) in enumerate(zip(heads_, edges, strict=True)):
        assert exact[edge] == pytest.approx(paths[head], abs=2e-5)
        column = found.circuits.index(circuits[place])
        assert float((found.without[:, column] - found.whole).mean()) == pytest.approx(paths[head], abs=2e-5)
    assert paths.tensor.abs().max() > 1e-2


@pytest.mark.parametrize("method", [edge_patching, edge_attribution_patching, edge_integrated_gradients])
def test_a_head_that_is_equal_in_both_runs_has_no_edge(method):
    """Also in Gemma 2, where the scale that it shares with the others differs."""
    model = tiny.bridge("gemma2")
    prompts = tiny.prompts(model, n=2)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", hold_head_2)]):
        scores = method(model, prompts, edges=["L1H2->logits", "L1H2->L2MLP", "L1H2->L2H0.W_V", "L1H1->logits"])
    assert scores["L1H1->logits"] != 0
    assert [scores[edge] for edge in ("L1H2->logits", "L1H2->L2MLP", "L1H2->L2H0.W_V")] == pytest.approx(
        [0, 0, 0], abs=1e-6
    )


def hold_head_2(z, hook):
    z = z.clone()
    z[:, :, 2] = torch.linspace(-1, 1, z.shape[-1])
    return z


def test_a_small_change_has_the_estimates_effect():
    """Attribution is the derivative: with a corrupt prompt that is nearly the clean one, both agree."""
    model = tiny.bridge("gpt2").to(torch.float64)  # the RMS norms of transformers compute in float32
    table = model.embed.weight
    with torch.no_grad():
        table[8] = table[7] + 1e-6 * torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1, 5, 7, 9, 11]])
    prompts = mu.Prompts.of(tokens, [4], candidates=[[4, 6]], corrupt=tokens.where(tokens != 7, 8))
    exact, estimate = edge_patching(model, prompts), edge_attribution_patching(model, prompts)
    scale = estimate.tensor.abs().max()
    assert torch.allclose(exact.tensor, estimate.tensor, atol=2e-3 * float(scale))
    assert scale > 1e-9


def test_denoising_is_noising_of_the_exchanged_prompts(llama):
    chosen = ["embed->L0H1.W_Q", "L0H2->L1H0.W_K", "L1MLP->L2H3.W_V", "L0MLP->L2MLP", "L2H1->logits"]
    prompts = tiny.prompts(llama)
    turned = edge_patching(llama, prompts.exchanged(), edges=chosen).per_prompt
    denoising = edge_patching(llama, prompts, edges=chosen, direction="denoising").per_prompt
    assert torch.equal(turned, denoising)


def test_bad_input(llama, unchecked):
    prompts = tiny.prompts(llama)
    plain = mu.Prompts.of(prompts.tokens, prompts.answers[:, 0], attention_mask=prompts.attention_mask)
    with pytest.raises(ValueError, match=r"expected prompts with a corrupted counterpart"):
        edge_patching(llama, plain, metric=answer_log_probability)
    with pytest.raises(ValueError, match=r"expected an edge that goes forward"):
        edge_patching(llama, prompts, edges=["L2MLP->L1MLP"])
    with pytest.raises(ValueError, match=r"expected a component of a model with 3 layers"):
        edge_patching(llama, prompts, edges=[Edge(Component(4, "MLP"), "logits")])
    with pytest.raises(ValueError, match=r"expected a batch_size of at least 1, got 0"):
        edge_patching(llama, prompts, batch_size=0)


def test_parallel_blocks_have_no_edge_from_a_layers_heads_to_its_mlp():
    model = tiny.bridge("neox")
    with pytest.raises(ValueError, match=r"in its parallel blocks attention and MLP read the same input"):
        edge_patching(model, tiny.prompts(model), edges=["L1H0->L1MLP"])
