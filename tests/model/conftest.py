"""Here, `model` and `architecture` are all of them."""

from typing import Any

import pytest


@pytest.fixture
def model(every_model: Any) -> Any:
    return every_model


@pytest.fixture
def architecture(every_architecture: str) -> str:
    return every_architecture
