"""Admitted means that methods work and are right: on a tiny model of each kind of architecture beside the seven.

The numbers are those of plain runs, see `examples/architectures.py`, which tries every method on every architecture.
"""

from importlib.metadata import version

import architectures
import pytest
import tiny
import torch
from conftest import HAS_HOOKED
from state import left_as_it_was

import mechunlearn as mu

pytestmark = pytest.mark.skipif(HAS_HOOKED, reason="the table is of TransformerLens 4; 3.9 refuses OLMo 2 and EXAONE 4")

KINDS = {
    "MistralForCausalLM": "sliding windows",
    "Gemma3ForCausalLM": "sliding windows and norms after the blocks",
    "Phi3ForCausalLM": "fused matrices in attention and MLP",
    "Glm4ForCausalLM": "four norms, a fused gate",
    "Olmo2ForCausalLM": "no norm before the blocks, queries normalised together",
    "Exaone4ForCausalLM": "no norm before the blocks, sliding windows",
    "GraniteForCausalLM": "scaled writes and logits",
    "Cohere2ForCausalLM": "parallel blocks with one norm",
    "SmolLM3ForCausalLM": "layers without positions",
    "NemotronForCausalLM": "a norm whose weight is less by one, squared ReLU",
    "GPTJForCausalLM": "a loop over tuples, parallel blocks",
    "GPTNeoForCausalLM": "a loop over tuples, local attention",
    "FalconForCausalLM": "a loop over tuples, one KV head, fused",
    "GPTBigCodeForCausalLM": "one KV head, learned positions",
}
WITHOUT_EDGES = ("Cohere2ForCausalLM", "GPTJForCausalLM", "FalconForCausalLM")
"""Attention and MLP read the residual stream through one norm."""
REFUSED = {
    "BloomForCausalLM": "what its attention or MLP gives is changed before it is written",
    "MptForCausalLM": "what its attention or MLP gives is changed before it is written",
    "OPTForCausalLM": "its MLPs are no modules of their own",
    "OpenAIGPTLMHeadModel": "ln_final",
    "NanoChatForCausalLM": "embedding and writes do not add up to it",
    "MambaForCausalLM": "not every layer is an attention and an MLP",
    "MixtralForCausalLM": "a mixture of 4 experts",
}
FOUR = int(version("transformer_lens").split(".")[0]) >= 4


@pytest.mark.parametrize("name", KINDS)
def test_an_admitted_architecture_is_patched_and_exported_as_plain_runs_say(name):
    tried = (architectures.patching, architectures.stream, architectures.edges)
    row = architectures.row_of(name, tiny.tokenizer(), tried)
    assert row.faults == ()
    expected = {"patching": True, "stream": True, "edges": name not in WITHOUT_EDGES}
    assert row.works == expected, row.reason


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_no_method_could_work_on_is_refused(name):
    model = architectures.booted(name, tiny.tokenizer())
    model(torch.tensor([[1, 5]]))  # TransformerLens installs hooks of its own at the first forward
    with left_as_it_was(model), pytest.raises(ValueError, match=REFUSED[name]):
        mu.shape(model)


def test_a_circuit_of_edges_normalises_the_queries_of_all_heads_together():
    """Exact edges into one query of OLMo 2, against the circuit of all edges but that one."""
    model = architectures.booted("Olmo2ForCausalLM", tiny.tokenizer())
    prompts = architectures.prompts(tiny.N_VOCAB, seed=0)
    chosen = mu.localize.edge_attribution_patching(model, prompts).edges
    left_out = ["L0MLP->L1H2.W_Q", "embed->L2H0.W_K", "L0H1->L1H0.W_V", "L0H3->L1MLP"]
    exact = mu.localize.edge_patching(model, prompts, edges=left_out)
    for column, label in enumerate(left_out):
        rest = mu.EdgeMask.of([edge for edge in chosen if str(edge) != label], mu.shape(model))
        found = mu.localize.edge_faithfulness(model, prompts, rest, random_circuits=0)
        effect = (found.alone[:, 1] - found.whole).double()
        place = [str(edge) for edge in exact.edges].index(label)
        torch.testing.assert_close(exact.per_prompt[:, exact.scored][:, place], effect, rtol=1e-3, atol=1e-4)
        assert effect.abs().max() > 1e-3, (column, label)


def unknown():
    model = tiny.bridge("llama")
    model.cfg.architecture = "SomethingForCausalLM"
    return model


def other_weights(model):
    permuted = model.blocks[2].attn.o.original_component.weight.detach().clone()
    model.blocks[2].attn.o.original_component.forward = lambda x: x @ permuted.T


def scaled_neurons(model):
    model.blocks[2].mlp.out.original_component.register_forward_hook(lambda module, inputs, output: 2 * output)


def scaled_block(model):
    model.blocks[1].original_component.register_forward_hook(lambda module, inputs, output: 1.1 * output)


def shifted_logits(model):
    model.unembed.register_forward_hook(lambda module, inputs, output: output + torch.arange(output.shape[-1]))


def absolute_positions(model):
    def add(module, inputs, output):
        return output + torch.arange(output.shape[1])[:, None] * 0.1

    model.embed.original_component.register_forward_hook(add)


def cut_gradient(model):
    model.blocks[1].mlp.original_component.register_forward_hook(lambda module, inputs, output: output.detach())


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (other_weights, "no gradient reaches L2 W_O"),
        (scaled_neurons, "blocks.2.mlp.hook_post times W_out is not what the module gives"),
        (scaled_block, "embedding and writes do not add up to it"),
        (shifted_logits, "its logits are not the unembedding of the final norm"),
        (absolute_positions, "padding on the left changes its logits"),
        (cut_gradient, "no gradient reaches L1 W_"),
    ],
)
def test_the_self_test_finds_what_would_make_numbers_wrong(break_it, reason):
    mu.shape(unknown())
    broken = unknown()
    break_it(broken)
    with pytest.raises(ValueError, match=f"got SomethingForCausalLM: .*{reason}"):
        mu.shape(broken)


@pytest.mark.nightly
@pytest.mark.skipif(not FOUR, reason="the table is that of TransformerLens 4")
def test_the_table_of_the_documents_is_what_its_script_makes():
    _, tokenizer = mu.testbed.load_huggingface()
    rows = [architectures.row_of(name, tokenizer) for name in architectures.ARCHITECTURES]
    assert [fault for row in rows for fault in row.faults] == []
    assert architectures.table(rows) in architectures.PAGE.read_text()
    assert sum(len(row.works) > 0 for row in rows) >= 25
