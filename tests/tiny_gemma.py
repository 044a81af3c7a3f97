"""What takes the place of Gemma-2-9B and its data when its notebook is executed: a tiny random one, some sentences."""

from pathlib import Path

PARAMETERS = """
from functools import partial

import pandas as pd

import mechunlearn as mu

firsts = ("Ann", "Bea", "Cora", "Dora", "Ella", "Fay")
lasts = ("Lake", "Moor", "Hill", "Wood", "Brook", "Stone", "Field", "Marsh")
sports = ("football", "baseball", "basketball")
people = [f"{{first}} {{last}}" for first in firsts for last in lasts]

MODEL = {folder!r}
PAPER = "gemma-2-9b"
FORGET = 16
ATHLETES = pd.DataFrame({{"athlete": people, "sport": sports * 16, "other": (*sports[1:], sports[0]) * 16}})
INJECTED = "other"
TEXT = mu.tasks.TextStream(["The dog ran home, for it was late and the rain had begun to fall."] * 1000)
SMALLER = {{"steps": 2, "batch_size": 8, "text_batch_size": 2}}
RELEARN = partial(mu.evaluate.relearn_halves, rank=4, steps=2, at=(0, 2), batch_size=4)
"""
"""The cell of the notebook that is tagged `parameters`, with a `folder` to load from."""


def parameters(folder: Path) -> str:
    """That cell, once a Gemma-2 of three layers with random weights and the shipped tokenizer lies in the folder."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    import mechunlearn.testbed

    _, tokenizer = mechunlearn.testbed.load_huggingface()
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        intermediate_size=64,
        max_position_embeddings=256,
        sliding_window=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return PARAMETERS.format(folder=str(folder))
