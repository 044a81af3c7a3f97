"""A copy of a bridge as a Hugging Face model, for libraries that change one, and its logits."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechunlearn.model.huggingface import save_huggingface
from mechunlearn.model.kinds import Model, device_of


@contextmanager
def exported(model: Model) -> Iterator[Any]:
    """Inside, a copy of the model as it is now, as `AutoModelForCausalLM` loads it; after, its files are gone.

    In the model's dtype, on its device, in evaluation mode. ValueError for a `HookedTransformer`.
    """
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="mechunlearn-") as folder:
        path, dtype = Path(folder) / "model", next(model.parameters()).dtype
        with _without_progress_bars():
            save_huggingface(model, path)
            copy: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        yield copy.to(device_of(model)).eval()


def exported_logits(
    copy: Any,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    positions: Int[Tensor, "batch place"],
) -> Float[Tensor, "batch place d_vocab"]:
    """`logits_at` for a Hugging Face model: logits at `positions` alone. Padding may be left or right."""
    rows = torch.arange(len(positions), device=positions.device)[:, None]

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][rows, positions], *arguments[1:])

    places = (mask.long().cumsum(1) - 1).clamp(min=0)
    handle = copy.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        return copy(input_ids=tokens, attention_mask=mask.long(), position_ids=places, use_cache=False).logits
    finally:
        handle.remove()


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
