"""What is exported is the edited model, as Hugging Face would have it."""

import json

import architectures
import pytest
import tiny
import torch
from conftest import HAS_HOOKED, shared
from safetensors.torch import load_file
from state import left_as_it_was
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

import mechunlearn as mu
from mechunlearn.model import fingerprint, n_parameters, save_huggingface
from mechunlearn.model.huggingface import exported
from mechunlearn.weights import Edit, read, select

LABELS = ("L1H2", "L0H3.W_K", "L2N3", "L0MLP.W_in", "L2H1.W_V")
SIZES = {
    "vocab_size": tiny.N_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
TOKENS = torch.randint(4, tiny.N_VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))


def moved(model, *labels):
    """The mask's entries moved at random."""
    mask = mu.ComponentMask.of(labels or LABELS, mu.shape(model))
    generator = torch.Generator().manual_seed(0)
    values = {
        label: (value + 0.3 * torch.randn(value.shape, generator=generator)).to(value)
        for label, value in read(select(model, mask)).items()
    }
    return Edit(mask, values, fingerprint(model), {"editor": "by hand"})


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def bridged(model):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tiny.tokenizer(), device="cpu")


@torch.no_grad()
def test_the_exported_model_has_the_logits_of_the_edited_one(architecture, tmp_path):
    model = shared("bridge", architecture)
    edit = moved(model)
    with left_as_it_was(model):
        before = model(TOKENS)
        edit.to_huggingface(model, tmp_path / "model")
    exported = loaded(tmp_path / "model")
    assert type(exported) is type(model.original_model)
    with edit.applied(model):
        assert torch.allclose(exported(TOKENS).logits, model(TOKENS), atol=1e-5)
    assert (exported(TOKENS).logits - before).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_exported_weight_is_bit_identical(architecture, dtype, tmp_path):
    """Read back through a bridge of its own, every edited weight; in the file, every other one."""
    tiny.huggingface(architecture).save_pretrained(tmp_path / "original")
    model = bridged(AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=dtype))
    edit = moved(model)
    edit.to_huggingface(model, tmp_path / "model")
    exported = loaded(tmp_path / "model")
    assert exported.dtype == dtype
    original = tiny.huggingface(architecture).to(dtype).state_dict()
    stored = exported.state_dict()
    assert stored.keys() == original.keys()
    changed = {name for name in original if not torch.equal(stored[name], original[name])}
    assert {name.split(".")[2] for name in changed} == {"0", "1", "2"}
    assert all(any(part in name for part in ("attn", "attention", "mlp")) for name in changed)
    assert not any(name.endswith("bias") for name in changed)
    again = bridged(exported)
    with edit.applied(model):
        assert fingerprint(again) == fingerprint(model)
        assert torch.equal(again(TOKENS), model(TOKENS))


def test_the_file_has_the_names_of_hugging_face_and_tied_weights_once(architecture, tmp_path):
    model = shared("bridge", architecture)
    save_huggingface(model, tmp_path / "model")
    original = tiny.huggingface(architecture)
    original.save_pretrained(tmp_path / "reference")
    stored, reference = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "reference"))
    assert stored.keys() == reference.keys()
    assert all(torch.equal(stored[name], reference[name]) for name in reference)
    configurations = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "reference")]
    assert configurations[0] == configurations[1]
    assert n_parameters(model) == sum(parameter.numel() for parameter in original.parameters())


def test_a_bias_that_was_changed_is_exported_too(tmp_path):
    """Also in a fused matrix, whose own bias the bridge does not read."""
    for architecture in ("gpt2", "neox"):
        model = tiny.bridge(architecture)
        with torch.no_grad():
            model.blocks[1].attn.k.original_component.bias.mul_(2.0)
            expected = model(TOKENS)
            save_huggingface(model, tmp_path / architecture)
            assert torch.allclose(loaded(tmp_path / architecture)(TOKENS).logits, expected, atol=1e-5)


@pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
@torch.no_grad()
def test_a_hooked_transformers_edit_is_exported_through_a_bridge(architecture, tmp_path):
    hooked = shared("hooked", architecture)
    edit = moved(hooked)
    with left_as_it_was(hooked), pytest.raises(ValueError, match=r"expected a TransformerBridge of .*pass Transf"):
        edit.to_huggingface(hooked, tmp_path / "model")
    edit.to_huggingface(shared("bridge", architecture), tmp_path / "model")
    with edit.applied(hooked):
        assert torch.allclose(loaded(tmp_path / "model")(TOKENS).logits, hooked(TOKENS), atol=1e-5)


@torch.no_grad()
def test_the_shipped_model_is_exported_with_its_tokenizer(shipped, tmp_path):
    edit = moved(shipped, "L2MLP", "L5H1")
    edit.to_huggingface(shipped, tmp_path / "model")
    exported, tokenizer = loaded(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "Fact: LeBron James plays the sport of"
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert torch.equal(tokens, shipped.tokenizer(text, return_tensors="pt").input_ids)
    with edit.applied(shipped):
        assert torch.allclose(exported(tokens).logits, shipped(tokens), atol=1e-5)


@pytest.mark.parametrize("moment", ["weights", "tokenizer", "end"])
def test_an_interrupted_export_leaves_nothing_that_looks_finished(llama, tmp_path, monkeypatch, moment):
    path, seen = tmp_path / "model", []

    def interrupt(*arguments, **options):
        seen.append(path.exists())
        raise KeyboardInterrupt

    owner, name = {
        "weights": (type(llama.original_model), "save_pretrained"),
        "tokenizer": (type(llama.tokenizer), "save_pretrained"),
        "end": (mu.model.huggingface.os, "replace"),
    }[moment]
    with monkeypatch.context() as patched, left_as_it_was(llama), pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, interrupt)
        moved(llama).to_huggingface(llama, path)
    assert seen == [False]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model.partial").mkdir()  # as a killed process leaves it
    (tmp_path / "model.partial" / "old.safetensors").touch()
    moved(llama).to_huggingface(llama, path)
    assert [found.name for found in tmp_path.iterdir()] == ["model"]
    assert not (path / "old.safetensors").exists()


def test_a_path_that_is_taken_is_refused(llama, tmp_path):
    (tmp_path / "model").mkdir()
    save_huggingface(llama, tmp_path / "model")
    for path in (tmp_path / "model", tmp_path / "model" / "config.json"):
        with left_as_it_was(llama), pytest.raises(ValueError, match=r"expected a new or empty folder.*choose another"):
            save_huggingface(llama, path)
    with pytest.raises(FileNotFoundError, match=r"expected a folder to write into.*create it first"):
        save_huggingface(llama, tmp_path / "missing" / "model")


def test_weights_that_hugging_face_has_no_place_for_are_refused(tmp_path):
    model = tiny.bridge("llama")
    with torch.no_grad():
        model.unembed.original_component.bias[0] = 1.0  # TransformerLens adds it; Llama has none
    with pytest.raises(ValueError, match=r"expected weights that the Hugging Face model has a place for.*lm_head.bias"):
        save_huggingface(model, tmp_path / "model")
    untied = tiny.bridge("gemma")
    head = untied.unembed.original_component
    head.weight = torch.nn.Parameter(head.weight.detach() * 2)
    with pytest.raises(ValueError, match=r"expected lm_head.weight and .* to be one weight.*before they are untied"):
        save_huggingface(untied, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_generation_config_that_transformers_calls_invalid_is_written_as_it_is(tmp_path):
    """That of Llama 2 and Vicuna: a temperature, and no sampling."""
    model = tiny.bridge("llama")
    model.original_model.generation_config.update(temperature=0.6, top_p=0.9, do_sample=False)
    save_huggingface(model, tmp_path / "model")
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (written["temperature"], written["top_p"], written["do_sample"]) == (0.6, 0.9, False)
    assert loaded(tmp_path / "model").generation_config.temperature == 0.6
    with exported(model) as copy:
        assert torch.allclose(copy(TOKENS).logits, loaded(tmp_path / "model")(TOKENS).logits, atol=1e-5)


@torch.no_grad()
def test_a_model_with_fused_qkv_and_fused_gate_and_up_is_exported(tmp_path):
    """Phi 3, whose bridge reads split copies of both."""
    config = Phi3Config(**{**SIZES, **tiny.SPECIAL}, num_key_value_heads=2, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = bridged(Phi3ForCausalLM(config).eval())
    edit = moved(model, "L1H2", "L0H3.W_K", "L2H1.W_V", "L2N3", "L0MLP.W_in", "L1MLP.W_gate")
    with left_as_it_was(model):
        edit.to_huggingface(model, tmp_path / "edited")
    with edit.applied(model):
        expected = model(TOKENS)
    found = loaded(tmp_path / "edited")(TOKENS).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, model(TOKENS), atol=1e-2)


def test_a_model_that_its_export_could_not_be_loaded_as_is_refused(tmp_path):
    """As Mistral 3, which is not booted here: TransformerLens installs packages for multimodal models."""
    model = tiny.bridge("llama")
    model.original_model.config.__class__ = type("OtherConfig", (type(model.original_model.config),), {})
    with (
        left_as_it_was(model),
        pytest.raises(ValueError, match="that AutoModelForCausalLM loads, got a LlamaForCausalLM"),
    ):
        moved(model).to_huggingface(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["CodeGenForCausalLM", "FalconForCausalLM", "GPTBigCodeForCausalLM", "GlmForCausalLM"])
@torch.no_grad()
def test_whatever_the_order_of_a_fused_matrix_it_is_exported(name, tmp_path):
    model = architectures.booted(name, tiny.tokenizer())
    model(TOKENS)  # TransformerLens installs hooks of its own at the first forward
    edit = moved(model, "L1H2", "L2H1.W_K", "L0MLP.W_in")
    with left_as_it_was(model):
        edit.to_huggingface(model, tmp_path / "model")
    with edit.applied(model):
        assert torch.allclose(loaded(tmp_path / "model")(TOKENS).logits, model(TOKENS), atol=1e-5)
