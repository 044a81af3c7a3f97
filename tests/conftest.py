"""Shapes are checked in every test; models are tiny, shared, and left as they were."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import jaxtyping
from jaxtyping import install_import_hook

install_import_hook("mechunlearn", "beartype.beartype")

from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from typing import Any

import pytest
import tiny
import torch

torch.set_num_threads(1)

HAS_HOOKED = int(version("transformer_lens").split(".")[0]) < 4
CASES = [(kind, name) for name in tiny.ARCHITECTURES for kind in (("bridge", "hooked") if HAS_HOOKED else ("bridge",))]


@cache
def shared(kind: str, architecture: str) -> Any:
    if kind == "hooked" and not HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    return tiny.hooked(architecture) if kind == "hooked" else tiny.bridge(architecture)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[1]}-{case[0]}")
def model(request: pytest.FixtureRequest) -> Any:
    """Each of the seven architectures in each class that this TransformerLens has."""
    return shared(*request.param)


@pytest.fixture(params=tiny.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def llama() -> Any:
    """One model, for what does not depend on the architecture: grouped KV heads, gated MLP."""
    return shared("bridge", "llama")


@pytest.fixture
def gpt2() -> Any:
    """Fused QKV, biases, a plain MLP."""
    return shared("bridge", "gpt2")


@pytest.fixture(scope="session")
def shipped() -> Any:
    """The shipped model."""
    import mechunlearn.testbed

    return mechunlearn.testbed.load()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the shape checks of the tests, which users do not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
