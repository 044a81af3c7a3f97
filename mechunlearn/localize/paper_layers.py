"""The layers that Guo et al. (2025) read off their curves, by eye for sports, by threshold for CounterFact."""

from mechunlearn.components import Component, ComponentMask, ModelShape
from mechunlearn.model import Model, shape

PAPER_LAYERS: dict[str, dict[str, tuple[int, ...]]] = {
    "gemma-7b": {
        "sports": (2, 3, 4, 5, 6, 7),
        "counterfact 0:64": (1, 3, 4, 6, 12),
        "counterfact 0:16": (1, 3, 4, 6, 9, 17, 18, 19),
        "counterfact 16:32": (3, 6, 9, 18, 19),
        "counterfact 32:48": (0, 1, 3, 5, 7, 9, 11, 12, 13, 18, 19),
        "counterfact 48:64": (0, 1, 3, 4, 6, 12, 19),
    },
    "gemma-2-9b": {
        "sports": (2, 3, 4, 5, 6),
        "counterfact 0:64": (3, 4, 5, 7, 8, 9, 10, 17),
        "counterfact 0:16": (3, 4, 7, 8, 9),
        "counterfact 16:32": (4, 7, 8, 9, 17),
        "counterfact 32:48": (3, 5, 7, 8, 9, 10, 16),
        "counterfact 48:64": (3, 4, 5, 7, 8, 9, 10, 15, 18, 21, 22),
    },
    "llama-3-8b": {
        "sports": (1, 2, 3, 4),
        "counterfact 0:64": (4, 5, 6, 7),
        "counterfact 0:16": (5, 6, 9, 13),
        "counterfact 16:32": (2, 5, 6, 7, 9, 10),
        "counterfact 32:48": (2, 4, 5, 6, 7),
        "counterfact 48:64": (6, 7, 8),
    },
}
"""Model -> task -> layers whose MLPs the authors trained. `sports`: probes and ablations; `counterfact a:b`: path
patching on facts a to b of their list for that model (a fact counts if the model gives its answer at least 0.5).

Source: the paper (arXiv 2410.12949) for sports; for CounterFact the layer lists in the authors' published analysis
code, github.com/magikarp01/mechanistic-unlearning at a36be56."""

PAPER_SHAPES = {
    "gemma-7b": ModelShape(28, 16, 16, 3072, 256, 24576, gated=True),
    "gemma-2-9b": ModelShape(42, 16, 8, 3584, 256, 14336, gated=True),
    "llama-3-8b": ModelShape(32, 32, 8, 4096, 128, 14336, gated=True),
}
"""The shapes of these models."""


def paper_fact_lookup(model: Model, name: str, *, task: str = "sports") -> ComponentMask:
    """The MLPs that the paper edits as "fact lookup" in `"gemma-7b"`, `"gemma-2-9b"` or `"llama-3-8b"`.

    `task`: `"sports"` (default) or a slice of CounterFact facts, such as `"counterfact 0:64"`; see `PAPER_LAYERS`.
    ValueError for other names, and for a model of another shape than the one that the layers were read off.
    """
    if name not in PAPER_LAYERS:
        raise ValueError(
            f"expected one of {', '.join(PAPER_LAYERS)}, got {name!r}: localize with fact_lookup_by_probes."
        )
    if task not in PAPER_LAYERS[name]:
        raise ValueError(f"expected one of the tasks {', '.join(PAPER_LAYERS[name])}, got {task!r}.")
    if shape(model) != PAPER_SHAPES[name]:
        raise ValueError(
            f"expected {name}, {PAPER_SHAPES[name]}, got a model of {shape(model)}: these layers were read off that "
            f"model's curves; use fact_lookup_by_probes or fact_lookup_by_paths on yours."
        )
    members = frozenset(Component(layer, "MLP") for layer in PAPER_LAYERS[name][task])
    source = "Guo et al. 2025, https://arxiv.org/abs/2410.12949"
    return ComponentMask(members, PAPER_SHAPES[name], {"method": "paper_fact_lookup", "task": task, "source": source})
