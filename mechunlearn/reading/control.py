"""The control task of probes (Hewitt & Liang 2019, https://arxiv.org/abs/1909.03368)."""

import numpy as np
from jaxtyping import Int, Shaped

from mechunlearn.reading.positions import Where, subject_last
from mechunlearn.reading.states import place_of
from mechunlearn.tasks.prompts import Prompts


def subject_tokens(prompts: Prompts, at: Where) -> Int[np.ndarray, "prompt"]:
    """The token that decides the label of the control task: the subject's last, or without subjects that at `at`."""
    places = place_of(prompts, at if prompts.subject is None else subject_last)
    return prompts.tokens.gather(1, places[:, None])[:, 0].cpu().numpy()


def labels_by_token(
    tokens: Int[np.ndarray, "prompt"], labels: Shaped[np.ndarray, "prompt"], rng: np.random.Generator
) -> Shaped[np.ndarray, "prompt"]:
    """A random label for each token, drawn as often as labels occur: to be solved only by remembering tokens."""
    kinds, which = np.unique(tokens, return_inverse=True)
    return np.sort(labels)[rng.integers(len(labels), size=len(kinds))][which]
