"""Adapters, quantised weights, scaled writes and logits: what the model computes, or a refusal, never a wrong number.

The reference knows no weights: runs in which hooks put activations in place, and hold those of later parts.
"""

from functools import partial

import odd_models
import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.localize import (
    activation_patching,
    activation_patching_by_position,
    direct_logit_attribution,
    edge_attribution_patching,
    edge_faithfulness,
    edge_patching,
    gradient_times_weight,
    logit_lens,
    path_patching,
    set_patching,
)
from mechunlearn.metrics import logit_difference
from mechunlearn.model import recording
from mechunlearn.model.norms import norm_of

SENDERS = ("L0H1", "L1H2", "L0MLP", "L1ATTN", "L1MLP", "L2H3")
WEIGHTS = {
    "adapter": odd_models.adapted,
    "adapter of outputs": partial(odd_models.adapted, targets=["o_proj"]),
    "int8": partial(odd_models.quantised, 8),
    "4 bits": partial(odd_models.quantised, 4),
}
SCALED = {"granite": odd_models.granite, "cohere": odd_models.cohere}
PLAIN = {"gpt2": partial(tiny.bridge, "gpt2"), "gemma2": partial(tiny.bridge, "gemma2")}
every = pytest.mark.parametrize("name", [*WEIGHTS, *SCALED, *PLAIN])
scaled = pytest.mark.parametrize("name", [*SCALED, *PLAIN])
weights = pytest.mark.parametrize("name", WEIGHTS)


def made(name):
    return (WEIGHTS | SCALED | PLAIN)[name]()


def tolerance(name):
    """LLM.int8 rounds activations to codes, row by row: a different batch rounds differently."""
    return {"rtol": 1e-3, "atol": 2e-2 if name == "int8" else 1e-4 if name in SCALED | PLAIN else 2e-4}


@torch.no_grad()
def direct_effect(model, prompts, label):
    """On the logits, with every later attention layer and MLP held at what it gives in the clean run."""
    layers, sender = range(len(model.blocks)), mu.components.Component.parse(label)
    outputs = [f"blocks.{layer}.{part}" for layer in layers for part in ("hook_attn_out", "hook_mlp_out")]
    name = f"blocks.{sender.layer}." + {"H": "attn.hook_z", "ATTN": "hook_attn_out", "MLP": "hook_mlp_out"}[sender.part]
    runs = []
    for run in (prompts, prompts.corrupted()):
        with recording(model, [*outputs, name]) as values:
            before = run.logits(model)
        runs.append((values, before))
    (clean, logits), (corrupt, _) = runs[0], runs[1]

    def put(value, hook):
        patched = value.clone()
        unit = slice(None) if sender.index is None else sender.index
        patched[:, :, unit] = corrupt[name][:, :, unit]
        return patched

    first = 2 * sender.layer + (2 if sender.part == "MLP" else 1)
    held = [(o, lambda value, hook, o=o: clean[o]) for o in outputs[first:]]
    patched = prompts.logits(model, hooks=[(name, put), *held])
    return (logit_difference(patched, prompts) - logit_difference(logits, prompts)).double()


@every
def test_one_component_has_the_effect_of_a_set_of_one(name):
    model = made(name)
    prompts = tiny.prompts(model, n=3)
    with left_as_it_was(model):
        found = activation_patching(model, prompts, components=SENDERS)
    expected = set_patching(model, prompts, {label: [label] for label in SENDERS})
    torch.testing.assert_close(found.per_prompt, expected.per_prompt, **tolerance(name))
    positions = activation_patching_by_position(model, prompts, components=["L1H2"], positions=whole)
    torch.testing.assert_close(positions.per_prompt[:, 0, 0], expected.per_prompt[:, 1], **tolerance(name))


def whole(prompts):
    return {"all": prompts.attention_mask}


@every
def test_a_direct_path_is_a_run_with_everything_later_held(name):
    model = made(name)
    prompts = tiny.prompts(model, n=3)
    found = path_patching(model, prompts, senders=SENDERS)
    for column, label in enumerate(SENDERS):
        expected = direct_effect(model, prompts, label)
        torch.testing.assert_close(found.per_prompt[:, column], expected, **tolerance(name), msg=label)
    assert found.tensor.abs().max() > (2e-4 if name in SCALED else 1e-2)


@scaled
def test_direct_contributions_and_the_embedding_are_the_metric(name):
    """By the model itself: the final norm's scale held, all but one part of its input taken out."""
    model = made(name)
    prompts = tiny.prompts(model, n=3)
    found = direct_logit_attribution(model, prompts)
    with torch.no_grad():
        metric = logit_difference(prompts.logits(model), prompts)
    if name != "gemma2":  # the scores are before its soft cap
        assert found.settings["logit_difference"] == pytest.approx(float(metric.mean()), abs=1e-4)
    heads = direct_logit_attribution(model, prompts, components=["L1H0", "L1H1", "L1H2", "L1H3"])
    layer = direct_logit_attribution(model, prompts, components=["L1ATTN"])
    if name != "gpt2":  # its attention has a bias, which belongs to no head
        torch.testing.assert_close(heads.per_prompt.sum(1), layer.per_prompt[:, 0], rtol=1e-3, atol=1e-5)
    if name in SCALED:  # no biases: what is left is the embedding's
        remainder = found.settings["remainder"]
        assert remainder == pytest.approx(embedding_share(model, prompts), abs=1e-4)


@torch.no_grad()
def embedding_share(model, prompts):
    """Of the logit difference: logits of the embedding under the final norm's scale."""
    inputs = []
    with recording(model, ["blocks.0.hook_resid_pre"]) as values:
        with model.ln_final.register_forward_pre_hook(lambda module, given: inputs.append(given[0])):
            prompts.logits(model)
    embedded, final = values["blocks.0.hook_resid_pre"], inputs[0]
    rows, places = torch.arange(len(prompts)), prompts.positions[:, 0]
    own, part = final[rows, places], embedded[rows, places]
    shares = norm_of(model.ln_final, model).frozen(own)(part) @ model.original_model.lm_head.weight.T
    scale = {"GraniteForCausalLM": 1 / 8.0, "CohereForCausalLM": 0.25}[model.cfg.architecture]
    return float(logit_difference(scale * shares[:, None], prompts).mean())


@pytest.mark.parametrize("name", ["granite", *PLAIN])
def test_edges_into_the_logits_are_direct_paths(name):
    model = made(name)
    prompts = tiny.prompts(model, n=2)
    senders = ["L0MLP", "L1MLP", *([] if name == "gemma2" else ["L1H2", "L0H1"])]
    edges = [f"{sender}->logits" for sender in senders]
    exact = edge_patching(model, prompts, edges=edges)
    expected = path_patching(model, prompts, senders=senders)
    for sender in senders:
        assert exact[f"{sender}->logits"] == pytest.approx(expected[sender], rel=1e-3, abs=2e-5)
    nodes = edge_attribution_patching(model, prompts).nodes()
    parts = mu.localize.attribution_patching(model, prompts, components=["L0MLP", "L1MLP"])
    for label in ("L0MLP", "L1MLP"):
        assert nodes[label] == pytest.approx(parts[label], rel=1e-3, abs=2e-5)
    nothing = edge_faithfulness(model, prompts, mu.components.EdgeMask.of(edges, mu.shape(model)), random_circuits=0)
    with torch.no_grad():
        other = logit_difference(prompts.corrupted().logits(model), prompts)
    torch.testing.assert_close(nothing.nothing, other.double(), rtol=1e-3, atol=1e-4)


REFUSING = {
    "direct_logit_attribution": direct_logit_attribution,
    "direct_logit_attribution of neurons": partial(direct_logit_attribution, components=["L1N3"]),
    "logit_lens of a head": partial(logit_lens, components=["L1H2"]),
    "edge_attribution_patching": edge_attribution_patching,
    "edge_patching": edge_patching,
    "edge_faithfulness": partial(edge_faithfulness, circuits={}),
    "gradient_times_weight": gradient_times_weight,
}


@pytest.mark.parametrize("method", REFUSING)
@pytest.mark.parametrize("name", ["adapter", "int8", "4 bits"])
def test_what_multiplies_by_weights_refuses_others(name, method):
    model = made(name)
    options = {}
    if method == "edge_faithfulness":
        options = {"circuits": mu.components.EdgeMask.of(["L0MLP->logits"], mu.shape(model))}
    with left_as_it_was(model), pytest.raises(ValueError, match=r"(Merge adapters|load it in bfloat16)"):
        REFUSING[method](model, tiny.prompts(model, n=2), **options)


def test_what_reads_layers_alone_takes_them():
    model = odd_models.adapted()
    prompts = tiny.prompts(model, n=2)
    direct_logit_attribution(model, prompts, components=["L1MLP", "L2ATTN"])
    logit_lens(model, prompts)


def test_an_adapter_that_is_attached_later_is_noticed():
    peft = pytest.importorskip("peft")
    inner = tiny.huggingface("llama")
    model = odd_models.booted(inner)
    prompts = tiny.prompts(model, n=2)
    direct_logit_attribution(model, prompts)
    edge_attribution_patching(model, prompts)
    layer = model.blocks[1].attn.o
    config = peft.LoraConfig(r=2, target_modules=["o"], init_lora_weights=False)
    inside = {"adapter_name": "default", "config": config, "r": 2, "lora_alpha": 4, "init_lora_weights": False}
    layer.set_original_component(peft.tuners.lora.layer.Linear(layer.original_component, **inside))
    for method in (direct_logit_attribution, edge_attribution_patching):
        with pytest.raises(ValueError, match="L1 W_O"):
            method(model, prompts)


def test_an_adapter_in_a_fused_matrix_is_refused_since_the_split_loses_it():
    model = odd_models.adapted("gpt2", ["c_attn"])
    with pytest.raises(ValueError, match=r"fused matrices of layer 0, got a peft.*wrap the model again"):
        activation_patching(model, tiny.prompts(tiny.bridge("gpt2"), n=2))


def test_a_stream_that_is_no_sum_is_refused(gpt2):
    """A block that doubles what it is given: no scale of its writes explains it."""
    model = tiny.bridge("gpt2")
    prompts = tiny.prompts(model, n=2)
    with model.blocks[1].register_forward_hook(
        lambda m, i, out: (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2
    ):
        for method in (path_patching, direct_logit_attribution, activation_patching):
            with pytest.raises(ValueError, match="sum of what its parts write"):
                method(model, prompts)
