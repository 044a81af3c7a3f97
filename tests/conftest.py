"""Models are tiny, shared, and left as they were; on TransformerLens 3 types and shapes of all calls are checked."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

from importlib.metadata import version

import jaxtyping
from jaxtyping import install_import_hook

HAS_HOOKED = int(version("transformer_lens").split(".")[0]) < 4
EVERY_CASE = bool(os.environ.get("EVERY_CASE"))
"""All seven everywhere, and on TransformerLens 3 all tests: what `make nightly` runs."""
# It takes as long as the tests themselves, and users have no such checks: the line that runs the contracts has them.
if HAS_HOOKED or EVERY_CASE:
    install_import_hook("mechunlearn", "beartype.beartype")

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import tiny
import torch

torch.set_num_threads(1)

CASES = [(kind, name) for name in tiny.ARCHITECTURES for kind in (("bridge", "hooked") if HAS_HOOKED else ("bridge",))]


TWO = ("gpt2", "gemma2")
"""The most different two: a fused, plain, sequential model, and grouped heads, gates, norms after the blocks."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On TransformerLens 3 leave out what does not depend on its version, unless EVERY_CASE=1.

    What does are tests/model, the contracts, and the tests marked `classes`. The contracts leave out bridges of five
    architectures: the tests that both classes agree run each of them, and TransformerLens 4 runs their contracts.
    """
    if not HAS_HOOKED or EVERY_CASE:
        return
    left_out = [item for item in items if not _is_about_classes(item)]
    items[:] = [item for item in items if _is_about_classes(item)]
    config.hook.pytest_deselected(items=left_out)


def _is_about_classes(item: pytest.Item) -> bool:
    if item.path.name == "test_contract.py":
        kind, architecture = getattr(getattr(item, "callspec", None), "params", {}).get("every_model", ("hooked", ""))
        return kind == "hooked" or architecture in TWO
    in_place = item.path.parent.name == "model" or item.path.name == "test_documents.py"
    return in_place or item.get_closest_marker("classes") is not None


@cache
def shared(kind: str, architecture: str) -> Any:
    if kind == "hooked" and not HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    return tiny.hooked(architecture) if kind == "hooked" else tiny.bridge(architecture)


def _name(case: tuple[str, str]) -> str:
    return f"{case[1]}-{case[0]}"


@pytest.fixture(params=[case for case in CASES if EVERY_CASE or case[1] in TWO], ids=_name)
def model(request: pytest.FixtureRequest) -> Any:
    """Each of two architectures in each class that this TransformerLens has; in tests/model, `every_model`."""
    return shared(*request.param)


@pytest.fixture(params=CASES, ids=_name)
def every_model(request: pytest.FixtureRequest) -> Any:
    """Each of the seven architectures in each class: for tests/model and the contracts."""
    return shared(*request.param)


@pytest.fixture(params=tiny.ARCHITECTURES if EVERY_CASE else TWO)
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of each of two architectures; in tests/model, of all seven."""
    return request.param


@pytest.fixture(params=tiny.ARCHITECTURES)
def every_architecture(request: pytest.FixtureRequest) -> str:
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
