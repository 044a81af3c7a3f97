"""Models in states that other tools leave them in: right scores, or a clear refusal."""

import pytest
import tiny
import torch
from conftest import HAS_HOOKED
from state import left_as_it_was
from transformer_lens.model_bridge import TransformerBridge

from mechunlearn.components import matrices
from mechunlearn.localize import (
    activation_patching,
    atp_star,
    attribution_patching,
    direct_logit_attribution,
    edge_attribution_patching,
    edge_patching,
    relp,
)

EDGES = ["embed->L0MLP", "L0MLP->L2H1.W_Q", "L1H2->logits"]
pytestmark = pytest.mark.classes
needs_hooked = pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_dropout_of_a_model_in_training_mode_is_off(name):
    """A bridge does not register the dropout of GPT-2's embeddings."""
    inner = tiny.huggingface(name)
    options = {"hf_model": inner, "tokenizer": tiny.tokenizer(), "device": "cpu"}
    model = TransformerBridge.boot_transformers("tiny", **options)
    prompts = tiny.prompts(model)
    expected = attribution_patching(model, prompts).tensor
    inner.train(), model.train()
    model.original_model.train()
    with left_as_it_was(model):
        found = attribution_patching(model, prompts).tensor
    assert torch.equal(found, expected)
    assert inner.training


@needs_hooked
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_folded_norms_give_the_scores_of_unfolded_ones(name):
    plain, folded = tiny.hooked(name), tiny.hooked(name)
    folded.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    prompts = tiny.prompts(plain)
    for method in (edge_attribution_patching, edge_patching):
        scores, other = (method(model, prompts, edges=EDGES).values_in_order for model in (plain, folded))
        assert torch.allclose(scores, other, atol=1e-5), method
    if name == "llama":  # GPT-2's value biases are folded into b_O as well, which moves a constant out of each head
        direct, other = (direct_logit_attribution(model, prompts).tensor for model in (plain, folded))
        assert torch.allclose(direct, other, atol=1e-4)


@needs_hooked
def test_a_model_that_ungroups_its_kv_heads_is_refused():
    model = tiny.hooked("llama")
    prompts = tiny.prompts(model)
    model.set_ungroup_grouped_query_attention(True)
    for method in (attribution_patching, atp_star, activation_patching):
        with pytest.raises(ValueError, match=r"call model.set_ungroup_grouped_query_attention\(False\)"):
            method(model, prompts, components=matrices)


@pytest.mark.parametrize("method", [edge_attribution_patching, edge_patching, relp])
def test_a_model_with_one_input_for_each_head_is_refused(method):
    model = tiny.hooked("gpt2") if HAS_HOOKED else tiny.bridge("gpt2")
    prompts = tiny.prompts(model)
    method(model, prompts)  # also when the model was checked before
    model.set_use_split_qkv_input(True)
    with pytest.raises(ValueError, match=r"call model.set_use_split_qkv_input\(False\)"):
        method(model, prompts)
    model.set_use_split_qkv_input(False)
    method(model, prompts)
