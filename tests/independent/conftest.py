from types import SimpleNamespace

import pytest
import torch
from independent.architectures import MAKERS, Raw, random_model
from independent.facts import FACTS, prompts_of
from transformer_lens.model_bridge import TransformerBridge

import mechunlearn as mu


@pytest.fixture(scope="session", params=list(MAKERS))
def pair(request):
    """One model twice: as the library takes it, and a plain copy that only hooks of torch and autograd work on."""
    huggingface = random_model(request.param)
    raw = Raw(request.param, huggingface).copied()
    _, tokenizer = mu.testbed.load_huggingface()
    options = {"hf_model": huggingface, "tokenizer": tokenizer, "device": "cpu", "dtype": torch.float64}
    bridge = TransformerBridge.boot_transformers(f"local/{request.param}", **options)
    return SimpleNamespace(raw=raw, bridge=bridge, facts=FACTS, prompts=prompts_of(FACTS))
