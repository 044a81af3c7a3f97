"""Tiny random models of the seven promised architectures, in both model classes, without a network."""

import copy
import os
import tempfile
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = ("gpt2", "neox", "llama", "gemma", "gemma2", "qwen2", "qwen3")
N_VOCAB = 101
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w4 ... w100, one token each, after a BOS."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, N_VOCAB)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    # TransformerLens reads both of the last two arguments back.
    return PreTrainedTokenizerFast(tokenizer_object=inner, name_or_path="tiny", add_bos_token=True, **names)


def huggingface(architecture: str, seed: int = 0) -> PreTrainedModel:
    """Three layers, d_model 32, four heads; two KV heads where the architecture groups them."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": N_VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        **SPECIAL,
    }
    grouped: dict[str, Any] = {**sizes, "num_key_value_heads": 2}
    if architecture == "gpt2":
        gpt2: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 128}
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=N_VOCAB, **gpt2, **SPECIAL))
    elif architecture == "neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, rotary_pct=0.25, use_parallel_residual=True))
    elif architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**grouped, head_dim=8))
    elif architecture == "gemma":
        model = GemmaForCausalLM(GemmaConfig(**{**sizes, "num_key_value_heads": 4}, head_dim=16))
    elif architecture == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**grouped, head_dim=16, query_pre_attn_scalar=16, sliding_window=16))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**grouped))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**grouped, head_dim=8))
    return _randomised(model, seed)


def _randomised(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name or "wte" in name else 0.15))
    return model.eval()


def bridge(architecture: str, seed: int = 0) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    model = huggingface(architecture, seed)
    found = TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tokenizer(), device="cpu")
    found(torch.tensor([[1, 5]]))  # TransformerLens installs hooks of its own at the first forward
    return found


def hooked(architecture: str, seed: int = 0) -> Any:
    """The same weights in a HookedTransformer; TransformerLens 3.9 only."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens import loading_from_pretrained as loading
    from transformer_lens.pretrained.weight_conversions import convert_gemma_weights

    model = copy.deepcopy(huggingface(architecture, seed))
    if architecture in ("gemma", "gemma2"):
        cfg = HookedTransformerConfig(**_gemma_config(model.config))
        cfg.normalization_type = "RMS"
        state = convert_gemma_weights(model, cfg)
    else:
        if architecture == "gpt2":
            model.config.n_ctx = model.config.n_positions
        model.config.architectures = [type(model).__name__]
        with tempfile.TemporaryDirectory() as folder:  # a neutral name: "llama" in it would select hard-coded sizes
            model.config.save_pretrained(folder)
            options = {"fold_ln": False, "device": "cpu", "dtype": torch.float32}
            cfg = loading.get_pretrained_model_config(folder, hf_cfg=model.config.to_dict(), **options)
            state = loading.get_pretrained_state_dict(folder, cfg, model, dtype=torch.float32)
    result = HookedTransformer(cfg, tokenizer())
    off = {"center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    result.load_and_process_state_dict(state, fold_ln=False, **off)
    return result


def _gemma_config(config: Any) -> dict[str, Any]:
    found = {
        "d_model": config.hidden_size,
        "d_head": config.head_dim,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": config.rms_norm_eps,
        "d_vocab": config.vocab_size,
        "rotary_dim": config.head_dim,
        "act_fn": "gelu_pytorch_tanh",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_base": 10000,
        "use_attn_scale": True,
        "gated_mlp": True,
        "final_rms": True,
        "device": "cpu",
        "original_architecture": "GemmaForCausalLM",
    }
    if config.model_type != "gemma2":
        return found
    return found | {
        "original_architecture": "Gemma2ForCausalLM",
        "window_size": config.sliding_window,
        "use_local_attn": True,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        "attn_scores_soft_cap": config.attn_logit_softcapping,
        "output_logits_soft_cap": config.final_logit_softcapping,
        "use_normalization_before_and_after": True,
    }


os.environ.setdefault("HF_HUB_OFFLINE", "1")


def prompts(model: Any, *, n: int = 6, answer: int = 1, padding: str = "right", seed: int = 0) -> Any:
    """Random words with a subject of two or three tokens, in rows of three lengths."""
    from mechunlearn.tasks import build

    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[str]:
        return [f"w{i}" for i in torch.randint(4, N_VOCAB, (count,), generator=generator).tolist()]

    texts, corrupt, subjects, answers, candidates = [], [], [], [], []
    for i in range(n):
        start, end = words(2 + i % 3), words(2)
        subject, other = " ".join(words(2 + i % 2)), " ".join(words(2 + i % 2))
        texts.append(" ".join([*start, subject, *end]))
        corrupt.append(" ".join([*start, other, *end]))
        subjects.append(subject)
        firsts = torch.randperm(N_VOCAB - 4, generator=generator)[:4] + 4
        options = [" w" + str(int(first)) for first in firsts]
        answers.append(options[0] + "".join(" " + word for word in words((answer - 1) * (i % 2))))
        candidates.append([answers[-1], *options[1:]])
    return build(
        model,
        texts,
        answers,
        candidates=candidates,
        subjects=subjects,
        corrupt=corrupt,
        padding=padding,  # type: ignore[arg-type]
    )


def task(model: Any, *, answer: int = 1, seed: int = 0, padding: str = "right") -> Any:
    """A task of random words."""
    from mechunlearn.tasks import Format, Task

    def made(place: int) -> Any:
        return prompts(model, answer=answer, seed=seed + place, padding=padding)

    text = torch.randint(4, N_VOCAB, (10, 12), generator=torch.Generator().manual_seed(seed))
    formats = {"trained prompt": Format(made(2), made(3)), "question": Format(made(4), made(5))}
    return Task(
        "tiny",
        made(0),
        made(1),
        formats,
        text[:6],
        text[6:],
        injection=made(6),
        knowledge=prompts(model, seed=seed + 7),
    )
