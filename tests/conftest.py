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


FULLY_BRIDGED = ("gpt2", "gemma2")
"""The most different two: a fused, plain, sequential model, and grouped heads, gates, norms after the blocks."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On TransformerLens 3 leave out what TransformerLens 4 tests as well, unless EVERY_CASE=1.

    These are tests marked `once` and, but for tests/model and tests/testbed, those of the shipped model, which is one
    bridge, and bridges of five architectures.
    """
    if not HAS_HOOKED or os.environ.get("EVERY_CASE"):
        return
    left_out = [item for item in items if _is_spared(item)]
    items[:] = [item for item in items if not _is_spared(item)]
    config.hook.pytest_deselected(items=left_out)


def _is_spared(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    spared = any(isinstance(p, tuple) and p[:1] == ("bridge",) and p[1] not in FULLY_BRIDGED for p in parameters)
    spared |= "shipped" in getattr(item, "fixturenames", ())
    about_models = any(folder in item.path.as_posix() for folder in ("tests/model", "tests/testbed"))
    return item.get_closest_marker("once") is not None or (spared and not about_models)


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

    found = mechunlearn.testbed.load()
    found(torch.tensor([[1, 5]]))  # TransformerLens installs hooks of its own at the first forward
    return found


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the shape checks of the tests, which users do not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
