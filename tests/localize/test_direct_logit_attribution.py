"""The slow, obvious reference: the model's own norms and unembedding, their scales computed from the whole run."""

from dataclasses import replace

import pytest
import tiny
import torch

from mechunlearn.components import layers, neurons
from mechunlearn.localize import direct_logit_attribution, logit_lens
from mechunlearn.metrics import answer_log_probability, logit_difference
from mechunlearn.model import logits_at, recording, shape, slots


@torch.no_grad()
def recorded(model, prompts, names, norms=()):
    """Values at hook points, and inputs of norm modules, of one forward."""
    inputs = {}
    handles = [n.register_forward_pre_hook(lambda m, i, k=k: inputs.update({k: i[0]})) for k, n in enumerate(norms)]
    try:
        with recording(model, names) as values:
            logits = logits_at(model, prompts.tokens, prompts.attention_mask, prompts.positions)
    finally:
        for handle in handles:
            handle.remove()
    return values, inputs, logits


def normed(model, norm, part, whole):
    """The norm's formula applied to a part of its input, with the scale and gain written out."""
    layernorm = model.cfg.normalization_type == "LN"
    inner = getattr(norm, "original_component", norm)
    gain = (inner.w if hasattr(inner, "w") else inner.weight).detach()
    if "Gemma" in type(inner).__name__:
        gain = 1 + gain
    if layernorm:
        part, whole = (x - x.mean(-1, keepdim=True) for x in (part, whole))
    return gain * part / (whole.square().mean(-1, keepdim=True) + model.cfg.eps).sqrt()


def read_off(model, prompts):
    unembedding = model.unembed.W_U.detach().T[prompts.candidates]
    return unembedding[:, 0] - unembedding[:, 1:].mean(1)


def before_soft_cap(model, logits):
    cap = model.cfg.output_logits_soft_cap
    return logits if cap is None or cap <= 0 else cap * torch.atanh((logits / cap).double()).float()


def reference(model, prompts, label):
    """Contribution of L1H2, L2MLP or L1ATTN per prompt."""
    layer, head = int(label[1]), (int(label[3]) if label[2] == "H" else None)
    block = model.blocks[layer]
    names = [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.hook_attn_out"]
    post = getattr(block, "ln1_post", None)
    values, inputs, _ = recorded(model, prompts, names, [model.ln_final] + ([post] if post is not None else []))
    rows, places = torch.arange(len(prompts)), prompts.positions[:, 0]
    if head is None:
        written = values[names[1] if label.endswith("MLP") else names[2]]
    else:
        slot = slots(model)[layer, "W_O"]
        written = values[names[0]][:, :, head] @ slot.view(slot.parameter.detach())[head]
        written = written if post is None else normed(model, post, written, inputs[1])
    final = normed(model, model.ln_final, written, inputs[0])[rows, places]
    return (final * read_off(model, prompts)).sum(-1).double()


@pytest.mark.parametrize("label", ["L1H2", "L0H3", "L2H0", "L2MLP", "L0MLP", "L1ATTN"])
def test_contributions_agree_with_the_formula_written_out(model, label):
    prompts = tiny.prompts(model)
    scores = direct_logit_attribution(model, prompts, components=[label])
    assert torch.allclose(scores.per_prompt[:, 0], reference(model, prompts, label), rtol=1e-4, atol=1e-5)


def test_contributions_and_embeddings_and_biases_are_the_logit_difference(model):
    """The remainder is what embeddings and biases contribute, each computed by itself."""
    prompts = tiny.prompts(model)
    scores = direct_logit_attribution(model, prompts)
    names = ["blocks.0.hook_resid_pre"]
    values, inputs, logits = recorded(model, prompts, names, [model.ln_final])
    rows, places, read = torch.arange(len(prompts)), prompts.positions[:, 0], read_off(model, prompts)
    parts = [values[names[0]]]
    for block in model.blocks:
        bias = getattr(block.attn, "b_O", None)
        if bias is not None:
            parts.append(bias.detach().expand_as(parts[0]))
    expected = sum((normed(model, model.ln_final, p, inputs[0])[rows, places] * read).sum(-1) for p in parts)
    inner = getattr(model.ln_final, "original_component", model.ln_final)
    bias = getattr(inner, "b", getattr(inner, "bias", None))
    expected = expected + (0 if bias is None else read @ bias.detach())
    total = logit_difference(before_soft_cap(model, logits), prompts)
    assert scores.settings["logit_difference"] == pytest.approx(float(total.mean()), rel=1e-4, abs=1e-4)
    assert scores.settings["remainder"] == pytest.approx(float(expected.mean()), rel=1e-4, abs=1e-4)
    assert torch.allclose(scores.per_prompt.sum(1) + expected, total.double(), rtol=1e-4, atol=2e-4)
    assert abs(scores.settings["remainder"]) > 1e-3, "a remainder of nothing would prove nothing"


def test_heads_sum_to_their_attention_layer_and_neurons_to_their_mlp(llama):
    """Llama has neither biases nor post-norms."""
    prompts = tiny.prompts(llama)
    parts, whole = direct_logit_attribution(llama, prompts), direct_logit_attribution(llama, prompts, components=layers)
    fine = direct_logit_attribution(llama, prompts, components=neurons)
    for layer in range(3):
        assert sum(parts[f"L{layer}H{h}"] for h in range(4)) == pytest.approx(whole[f"L{layer}ATTN"], abs=1e-5)
        assert sum(fine[f"L{layer}N{n}"] for n in range(64)) == pytest.approx(whole[f"L{layer}MLP"], abs=1e-5)


def test_neurons_sum_to_their_mlp_through_a_post_norm():
    model = tiny.bridge("gemma2")
    prompts = tiny.prompts(model)
    fine = direct_logit_attribution(model, prompts, components=lambda s: [c for c in neurons(s) if c.layer == 1])
    whole = direct_logit_attribution(model, prompts, components=["L1MLP"])
    assert torch.allclose(fine.per_prompt.sum(1), whole.per_prompt[:, 0], rtol=1e-4, atol=1e-5)


def test_without_candidates_the_logit_of_the_answer_is_split(model):
    prompts = replace(tiny.prompts(model), candidates=None)
    scores = direct_logit_attribution(model, prompts)
    logits = before_soft_cap(model, recorded(model, prompts, [])[2])
    expected = logits[:, 0].gather(1, prompts.answers)
    assert scores.metric == "answer_logit"
    assert scores.settings["answer_logit"] == pytest.approx(float(expected.mean()), rel=1e-4, abs=1e-4)


def test_rows_whose_answers_have_one_token_are_split_up_though_others_had_more(llama):
    """Chosen rows stay as wide as the longest answer that there was."""
    short = tiny.prompts(llama)
    padding = torch.full_like(short.answers, -100)
    wide = replace(
        short,
        answers=torch.cat([short.answers, padding], 1),
        positions=torch.cat([short.positions, short.positions], 1),
    )
    found, expected = direct_logit_attribution(llama, wide), direct_logit_attribution(llama, short)
    assert torch.allclose(found.tensor, expected.tensor, atol=1e-6)


def test_answers_of_several_tokens_and_components_that_only_read_are_refused(llama):
    with pytest.raises(ValueError, match=r"expected answers of one token, got up to 3: .* keep its first"):
        direct_logit_attribution(llama, tiny.prompts(llama, answer=3))
    with pytest.raises(ValueError, match=r"got L1MLP.W_in: use the head or MLP"):
        direct_logit_attribution(llama, tiny.prompts(llama), components=["L1MLP.W_in"])
    with pytest.raises(ValueError, match="expected a component of a model with 3 layers"):
        direct_logit_attribution(llama, tiny.prompts(llama), components=["L7MLP"])


def test_the_last_point_of_the_lens_is_the_model(model):
    prompts = tiny.prompts(model)
    lens = logit_lens(model, prompts)
    logits = recorded(model, prompts, [])[2]
    assert lens.points == ("0", "1", "2", "3")
    assert torch.allclose(lens.log_probability[:, -1], answer_log_probability(logits, prompts).double(), atol=1e-4)
    assert torch.allclose(lens.logit_difference[:, -1], logit_difference(logits, prompts).double(), atol=1e-4)
    better = (logits[:, 0] > logits[:, 0].gather(1, prompts.answers)).sum(1)
    assert torch.equal(lens.rank[:, -1], better.double())


def test_the_lens_is_norm_and_unembedding_at_the_answer(model):
    prompts = tiny.prompts(model)
    lens = logit_lens(model, prompts)
    rows, places = torch.arange(len(prompts)), prompts.positions[:, 0]
    for layer in range(3):
        values, _, _ = recorded(model, prompts, [f"blocks.{layer}.hook_resid_pre"])
        with torch.no_grad():
            logits = model.unembed(model.ln_final(values[f"blocks.{layer}.hook_resid_pre"]))[rows, places]
        cap = model.cfg.output_logits_soft_cap
        logits = logits if cap is None or cap <= 0 else cap * torch.tanh(logits / cap)
        expected = logits.log_softmax(-1).gather(1, prompts.answers)[:, 0]
        assert torch.allclose(lens.log_probability[:, layer], expected.double(), atol=1e-4)


def test_the_lens_of_a_component_orders_tokens_as_its_direct_contribution_does(model):
    prompts = tiny.prompts(model)
    lens = logit_lens(model, prompts, components=["L1H2", "L2MLP"])
    direct = direct_logit_attribution(model, prompts, components=["L1H2", "L2MLP"])
    assert lens.points[-2:] == ("L1H2", "L2MLP")
    assert torch.allclose(lens.logit_difference[:, -2:], direct.per_prompt, rtol=1e-4, atol=1e-5)


def test_the_lens_makes_a_table_and_a_plot_with_intervals(llama):
    lens = logit_lens(llama, tiny.prompts(llama), components=["L1H2"])
    frame = lens.to_frame()
    assert list(frame.index) == ["0", "1", "2", "3", "L1H2"]
    assert frame.loc["2", "log_probability"] == pytest.approx(float(lens.log_probability[:, 2].mean()))
    ends = lens.curves()["log_probability"].interval()
    assert ((ends["low"] <= ends["value"]) & (ends["value"] <= ends["high"])).all()
    assert (ends["low"] < ends["high"]).all()
    assert len(lens.plot().data) >= 1
    assert shape(llama).n_layers == 3


def test_a_lens_of_prompts_without_candidates_has_no_logit_difference(llama):
    lens = logit_lens(llama, replace(tiny.prompts(llama), candidates=None))
    assert lens.logit_difference is None
    assert "logit_difference" not in lens.to_frame()
