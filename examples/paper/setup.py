"""What is run, on what, with which budget: equal for every localization."""

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import mechunlearn as mu

SHIPPED, DEEPER = "shipped", "deeper"

OWN = (SHIPPED, DEEPER)
"""Models that come with the package."""

PAPER_MODELS = {
    "google/gemma-7b": "gemma-7b",
    "google/gemma-2-9b": "gemma-2-9b",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
}
"""The models of the paper, and what `mu.edit.paper_settings` calls them."""

LOCALIZATIONS = (
    "fact lookup",
    "attribution patching",
    "causal tracing",
    "attribution patching mlps",
    "causal tracing mlps",
    "random",
    "random mlps",
    "all mlps",
    "nonlocalized",
)
"""By the names that `mu.edit.paper_settings` knows them by."""

FOUND = LOCALIZATIONS[:5]
"""Those that look at the model; the others are controls."""

DRAWN = ("random", "random mlps")
"""Drawn anew for each seed."""


@dataclass(frozen=True)
class Setup:
    """Travels to the workers. What is in it, but for `threads`, may not change while a folder is filled."""

    model: str = SHIPPED
    """"shipped", "deeper", a name on the Hub, or the folder of a Hugging Face checkpoint."""
    paper: str | None = None
    """Use the settings that the paper chose for this model, instead of a search."""
    layers: tuple[int, ...] = ()
    """Your own reading of where facts are looked up: MLPs of these layers."""
    athletes: str | None = None
    """A CSV file in place of the default athletes."""
    counterfact: str | None = None
    """Records in place of the default ones: a JSON file or a name on the Hub."""
    questions: str | None = None
    """Multiple-choice questions about them, likewise."""
    threshold: float | None = None
    """Which CounterFact records count as known: see `mu.tasks.counterfact`."""
    pile: bool = False
    """Train and test on the Pile, and not on everyday sentences."""
    shots: int = 0
    """Answered examples before a CounterFact question."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Searched for each localization."""
    athletes_steps: int = 32
    """Of an edit of single athletes, who have to be learned one by one."""
    steps: int = 24
    """Of an edit; half as many for each part of a sequence."""
    batch_size: int = 16
    text_batch_size: int = 2
    micro_batch_size: int | None = None
    traced: int = 32
    """How many prompts are traced and patched along paths."""
    sizes: tuple[int, ...] = (300, 1000, 3000, 10_000, 30_000)
    """Of edits made from weight masks: how many weights are set to zero."""
    masked_seeds: int = 3
    """How many of the seeds have weight masks."""
    relearn_rate: float = 4e-4
    relearn_steps: int = 12
    relearn_batch_size: int = 4
    lora: bool = False
    """Relearn by LoRA, as the paper does, in place of all weights."""
    rank: int = 512
    """Of LoRA."""
    soft_prompt: bool = False
    tested: int = 48
    """At most so many retained facts and rows of text, and half again as many questions, are asked."""
    keep_edits: bool = False
    threads: int = 1
    """Of a worker."""

    def identity(self) -> dict[str, Any]:
        """What a folder must have been begun with, to be gone on with."""
        return {name: value for name, value in asdict(self).items() if name not in ("threads", "keep_edits")}


def paper_setup(model: str, **options: Any) -> Setup:
    """The paper's model with the paper's settings: LoRA relearning, the Pile, facts known at 0.5, 8 examples."""
    defaults: dict[str, Any] = {
        "paper": PAPER_MODELS.get(model),
        "counterfact": "azhx/counterfact",
        "threshold": 0.5,
        "pile": True,
        "shots": 8,
        "steps": 50,
        "athletes_steps": 50,
        "batch_size": 64,
        "text_batch_size": 64,
        "micro_batch_size": 4,
        "learning_rates": mu.edit.PAPER_STAGES[0]["learning_rate"],
        "relearn_steps": 20,
        "relearn_batch_size": 32,
        "lora": True,
    }
    return Setup(model, **{**defaults, **options})


@cache
def load(model: str) -> Any:
    """The model, once in each process; but for the package's own, in bfloat16 on a GPU, else in float32."""
    if model in OWN:
        return mu.testbed.load(deeper=model == DEEPER)
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    name = model if not Path(model).exists() else "local/model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    return TransformerBridge.boot_transformers(name, hf_model=weights, tokenizer=tokenizer, device=device)


@cache
def load_never_knew(model: str) -> Any | None:
    """The twin that never knew basketball, where there is one."""
    return mu.testbed.load(without="basketball") if model == SHIPPED else None
