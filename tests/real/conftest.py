"""SmolLM2, loaded once, and a task of capitals that it says: twelve to forget, the others to keep."""

from typing import Any

import pandas as pd
import pytest
import torch

import mechunlearn as mu

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Russia": "Moscow",
    "Egypt": "Cairo", "Greece": "Athens", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm",
    "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Austria": "Vienna", "Portugal": "Lisbon",
    "China": "Beijing", "Iraq": "Baghdad", "Hungary": "Budapest", "Denmark": "Copenhagen", "Kenya": "Nairobi",
    "Syria": "Damascus",
}  # fmt: skip
"""Countries and capitals of one token, which the model says after an example and in its chat template."""
TRAINED = "Fact: The capital of Canada is Ottawa\nFact: The capital of {subject} is"


@pytest.fixture(autouse=True)
def as_users_run_it(unchecked: None) -> None:
    """Without the checks of shapes, which take long where there are a hundred thousand edges."""


@pytest.fixture(scope="session")
def smol() -> Any:
    try:
        return settled(mu.testbed.smollm2())
    except ImportError as missing:
        pytest.skip(str(missing))


def settled(model: Any) -> Any:
    """The model after its first forward, at which TransformerLens installs hooks of its own."""
    model(torch.tensor([[1, 5]]))
    return model


@pytest.fixture(scope="session")
def in_bfloat16(smol: Any) -> Any:
    return settled(mu.testbed.smollm2(dtype=torch.bfloat16))


@pytest.fixture(scope="session")
def capitals(smol: Any) -> mu.Task:
    frame = pd.DataFrame({"subject": [*CAPITALS], "answer": [*CAPITALS.values()], "instead": "London"})
    turn = [{"role": "user", "content": "What is the capital of {subject}?"}]
    chat = smol.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    formats = {"chat": f"{chat}The capital of {{subject}} is"}
    return mu.tasks.from_frame(smol, frame, prompt=TRAINED, formats=formats, forget=12, train=0.6, injected="instead")
