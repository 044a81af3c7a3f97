"""Loads the shipped weights as the model class that is wanted."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # importing transformers takes seconds
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


WEIGHTS = Path(__file__).parent / "weights"
"""config.json, model.safetensors (float16) and tokenizer.json."""

DEEPER_WEIGHTS = Path(__file__).parent / "deeper_weights"
"""Of the deeper model, likewise."""

NAME = "mechunlearn-testbed"

PAD, BOS = "<pad>", "<bos>"

Backend = Callable[[Any, Any], Any]
"""From a Hugging Face model and its tokenizer to the model class that is wanted."""


def bridge(model: Any, vocabulary: Any) -> Any:
    """The model as a `TransformerBridge`, which works in place on it."""
    from transformer_lens.model_bridge import TransformerBridge

    device = str(model.device)
    wrapped = TransformerBridge.boot_transformers(NAME, hf_model=model, tokenizer=vocabulary, device=device)
    return wrapped.eval()


def hooked(model: Any, vocabulary: Any) -> Any:
    """A `HookedTransformer` with the model's weights, unprocessed; raises ImportError on TransformerLens 4."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import (  # type: ignore  # not in TransformerLens 4
            convert_llama_weights,
        )
    except ImportError as error:
        raise ImportError(
            "HookedTransformer needs transformer_lens<4; on TransformerLens 4 use the default,"
            " mechunlearn.testbed.load(backend=mechunlearn.testbed.bridge)."
        ) from error
    options = {**_hooked_options(model), "device": str(model.device)}
    build: Any = HookedTransformer
    wrapped = build(HookedTransformerConfig(**options), vocabulary)
    wrapped.load_and_process_state_dict(
        convert_llama_weights(model, wrapped.cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return wrapped.eval()


def load(
    *,
    without: str | None = None,
    deeper: bool = False,
    backend: Backend = bridge,
    device: str | torch.device = "cpu",
) -> Any:
    """The shipped model in float32 and evaluation mode, with its tokenizer, as `backend` wraps it.

    `without="basketball"` gives its twin: trained in the same way, but without the athletes of that sport, so it never
    knew what unlearning removes. An attack that finds them there teaches; it does not recover.

    `deeper=True` gives another model, trained on the same facts: the first MLP of the shipped one looks up nearly every
    fact; of this one, which has two layers more, several MLPs do. No twin of it is shipped.
    """
    model, vocabulary = load_huggingface(DEEPER_WEIGHTS if deeper else WEIGHTS, without=without)
    return backend(model.to(device), vocabulary)


def load_huggingface(folder: Path = WEIGHTS, *, without: str | None = None) -> tuple[Any, Any]:
    """The shipped `LlamaForCausalLM` (or its twin) in float32 and evaluation mode, and its tokenizer."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, local_files_only=True))
    weights = {name: value.float() for name, value in load_file(_file(folder, without)).items()}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval(), tokenizer_in(folder / "tokenizer.json")


def _file(folder: Path, without: str | None) -> Path:
    path = folder / ("model.safetensors" if without is None else f"without_{without}.safetensors")
    if not path.is_file():
        there = sorted(file.stem.removeprefix("without_") for file in folder.glob("without_*.safetensors")) or ["none"]
        raise ValueError(f"expected a sport that a shipped twin never knew ({', '.join(there)}), got {without!r}.")
    return path


def tokenizer_in(path: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in that file; TransformerLens asks for a name and for `add_bos_token`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=BOS,
        padding_side="right",
        name_or_path="mechunlearn-testbed",
        add_bos_token=True,
    )


def save(model: Any, vocabulary: "Tokenizer", folder: Path = WEIGHTS) -> None:
    """Writes what `load_huggingface` reads; weights are rounded to float16."""
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.save(str(folder / "tokenizer.json"))
    rounded = LlamaForCausalLM(model.config).half()
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def _hooked_options(model: Any) -> dict[str, Any]:
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    return {
        "model_name": NAME,
        "original_architecture": "LlamaForCausalLM",
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "d_head": head,
        "n_heads": config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "eps": config.rms_norm_eps,
        "act_fn": config.hidden_act,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": head,
        "rotary_base": config.rope_parameters["rope_theta"],
        "rotary_adjacent_pairs": False,
    }
