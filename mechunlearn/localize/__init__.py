"""Where is it? Each method: (model, prompts) -> `ComponentScores`; `.top(...)` makes a mask of them."""

from mechunlearn.localize.attribution_patching import attribution_patching
from mechunlearn.localize.random import all_mlps, everything, random, random_like

__all__ = ["all_mlps", "attribution_patching", "everything", "random", "random_like"]
