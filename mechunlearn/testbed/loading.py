"""The shipped models, loaded as the model class that is wanted, and what they know as CounterFact records."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mechunlearn.tasks import facts

if TYPE_CHECKING:  # importing transformers takes seconds
    from tokenizers import Tokenizer


WEIGHTS = Path(__file__).parent / "weights"
"""config.json, model.safetensors (float16) and tokenizer.json."""

DEEPER_WEIGHTS = Path(__file__).parent / "deeper_weights"
"""The same files of the deeper model."""

NAME = "mechunlearn-testbed"

PAD, BOS = "<pad>", "<bos>"

NEIGHBOURS = 10
"""The largest number of neighbourhood prompts of a record, which is that of CounterFact."""

Backend = Callable[[Any, Any], Any]
"""A function from a Hugging Face model and its tokenizer to the model class that is wanted."""


def bridge(model: Any, vocabulary: Any) -> Any:
    """The model as a `TransformerBridge`, which works in place on it."""
    from transformer_lens.model_bridge import TransformerBridge

    options = {"hf_model": model, "tokenizer": vocabulary, "device": str(model.device), "dtype": model.dtype}
    return TransformerBridge.boot_transformers(NAME, **options).eval()


def hooked(model: Any, vocabulary: Any) -> Any:
    """A `HookedTransformer` with the model's weights, unprocessed; raises ImportError on TransformerLens 4."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_llama_weights  # type: ignore  # not in TransformerLens 4
    except ImportError as error:
        raise ImportError(
            "HookedTransformer needs transformer_lens<4; on TransformerLens 4 use the default,"
            " backend=mechunlearn.testbed.bridge."
        ) from error
    build, config = cast(Any, HookedTransformer), model.config
    head, kv_heads = config.hidden_size // config.num_attention_heads, config.num_key_value_heads
    options = {
        "model_name": NAME,
        "device": str(model.device),
        "original_architecture": "LlamaForCausalLM",
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "d_head": head,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": None if kv_heads == config.num_attention_heads else kv_heads,
        "dtype": model.dtype,
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
    *, without: str | None = None, deeper: bool = False, backend: Backend = bridge, device: str | torch.device = "cpu"
) -> Any:
    """The shipped model in float32 and evaluation mode, with its tokenizer, as `backend` wraps it.

    - `without="basketball"`: its twin, which was trained in the same way without the athletes of that sport, and never
      knew them. An attack that finds their sport there teaches it rather than recovers it.
    - `deeper=True`: a model with two more layers that was trained on the same facts. In the shipped model the first MLP
      looks up nearly every fact; in this one several MLPs do. No twin of it is shipped.
    """
    model, vocabulary = load_huggingface(DEEPER_WEIGHTS if deeper else WEIGHTS, without=without)
    return backend(model.to(device), vocabulary)


def load_huggingface(folder: Path = WEIGHTS, *, without: str | None = None) -> tuple[Any, Any]:
    """The shipped `LlamaForCausalLM` (or its twin) in float32 and evaluation mode, and its tokenizer."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = folder / ("model.safetensors" if without is None else f"without_{without}.safetensors")
    if not path.is_file():
        there = sorted(file.stem.removeprefix("without_") for file in folder.glob("without_*.safetensors")) or ["none"]
        raise ValueError(f"expected a sport that a shipped twin never knew ({', '.join(there)}), got {without!r}.")
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, local_files_only=True))
    weights = {name: value.float() for name, value in load_file(path).items()}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    # With the name and the `add_bos_token` that TransformerLens asks for.
    named = {"pad_token": PAD, "bos_token": BOS, "eos_token": BOS, "name_or_path": NAME, "add_bos_token": True}
    file = str(folder / "tokenizer.json")
    return model.eval(), PreTrainedTokenizerFast(tokenizer_file=file, padding_side="right", **named)


def counterfact(*, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records and multiple-choice questions for `tasks.counterfact`, in the schema of the original dataset.

        records, questions = mu.testbed.counterfact()
        mu.tasks.counterfact(mu.testbed.load(), source=records, questions=questions, shots=0)

    There is a record for each subject of the package's general knowledge (capitals, authors, elements, ...), in random
    order, about one of its facts. The prompt is the first statement of the relation; the paraphrases are the others.
    Neighbourhood prompts are the first statement about at most ten other subjects with the same answer (a capital has
    none). `target_new` is another answer of the relation; a question has it and two more as wrong options. `case_id` is
    the row in the package's table, whatever the seed. The schema is that of Meng et al. 2022,
    https://arxiv.org/abs/2202.05262.
    """
    rows = list(enumerate(facts.knowledge_rows()))
    random.Random(f"records {seed}").shuffle(rows)
    one_each: dict[str, tuple[int, facts.FactRow]] = {}
    for case, fact in rows:
        one_each.setdefault(fact["subject"], (case, fact))
    records, questions = [], []
    for case, fact in one_each.values():
        rng = random.Random(f"record {case} {seed}")
        same_relation = (row for row in facts.knowledge_rows() if row["relation"] == fact["relation"])
        answers = {row["subject"]: row["answer"] for row in same_relation}
        wrong = rng.sample(sorted(set(answers.values()) - {fact["answer"]}), 3)
        alike = [name for name, answer in answers.items() if answer == fact["answer"] and name != fact["subject"]]
        records.append(_record(case, fact, wrong[0], rng.sample(alike, min(NEIGHBOURS, len(alike)))))
        asked = facts.relations()[fact["relation"]]["question"].format(subject=fact["subject"])
        questions.append({"case_id": case, "question": asked, "target_true": fact["answer"], "targets_false": wrong})
    return records, questions


def save(model: Any, vocabulary: "Tokenizer", folder: Path = WEIGHTS) -> None:
    """Writes what `load_huggingface` reads; weights are rounded to float16."""
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.save(str(folder / "tokenizer.json"))
    rounded = LlamaForCausalLM(model.config).half()
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def _record(case: int, fact: facts.FactRow, injected: str, neighbours: Sequence[str]) -> dict[str, Any]:
    first, *others = (text.removesuffix(" {answer}") for text in facts.relations()[fact["relation"]]["statements"])
    return {
        "case_id": case,
        "requested_rewrite": {
            "prompt": first.format(subject="{}"),
            "relation_id": fact["relation"],
            "subject": fact["subject"],
            "target_true": {"str": fact["answer"]},
            "target_new": {"str": injected},
        },
        "paraphrase_prompts": [text.format(subject=fact["subject"]) for text in others],
        "neighborhood_prompts": [first.format(subject=name) for name in neighbours],
    }
