"""The settings of Guo et al. (2025), as data: what they searched, what they chose, and for which edits."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

PAPER_LEARNING_RATES = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4)
PAPER_COEFFICIENTS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

PAPER_STAGES: Sequence[Mapping[str, Sequence[Any]]] = (
    {"learning_rate": PAPER_LEARNING_RATES, "forget_coefficient": (1.0,)},
    {"forget_coefficient": PAPER_COEFFICIENTS},
)
"""The paper's search: the learning rate at coefficient 1, then the coefficient at the rate chosen."""

PAPER_PRODUCT: Sequence[Mapping[str, Sequence[Any]]] = (
    {"learning_rate": PAPER_LEARNING_RATES, "forget_coefficient": PAPER_COEFFICIENTS},
)
"""Every rate with every coefficient: three times the trials."""

PAPER_GROUPS: dict[str, tuple[str, ...]] = {
    "fact lookup": ("fact lookup", "random mlps", "attribution patching mlps", "causal tracing mlps"),
    "causal tracing": ("causal tracing", "attribution patching", "random"),
    "nonlocalized": ("nonlocalized", "all mlps"),
}
"""The localization that was searched -> those that use its settings, itself first. The others were not searched."""

Setting = tuple[float, float]
"""Learning rate and coefficient of the injection loss."""

PAPER_SETTINGS: dict[str, dict[str, tuple[Setting, Setting, Setting]]] = {
    "gemma-7b": {
        "athletes 16": ((1e-5, 5.0), (1e-5, 0.1), (2e-6, 0.2)),
        "athletes 64": ((1e-5, 5.0), (1e-5, 0.1), (2e-6, 0.2)),
        "sport": ((2e-5, 5.0), (5e-6, 1.0), (5e-6, 1.0)),
        "counterfact 16": ((5e-6, 0.1), (5e-6, 0.2), (5e-6, 0.2)),
        "counterfact 64": ((1e-5, 2.0), (2e-5, 1.0), (2e-6, 1.0)),
        "counterfact 64 sequential": ((1e-5, 2.0), (2e-5, 1.0), (2e-6, 1.0)),
    },
    "gemma-2-9b": {
        "athletes 16": ((1e-5, 1.0), (5e-5, 5.0), (2e-5, 5.0)),
        "athletes 64": ((1e-5, 1.0), (5e-5, 5.0), (2e-5, 5.0)),
        "sport": ((5e-5, 5.0), (5e-5, 5.0), (1e-5, 5.0)),
        "counterfact 16": ((5e-5, 2.0), (5e-5, 2.0), (5e-6, 1.0)),
        "counterfact 64": ((2e-5, 0.5), (2e-5, 2.0), (5e-6, 1.0)),
        "counterfact 64 sequential": ((2e-5, 0.5), (2e-5, 2.0), (5e-6, 1.0)),
    },
    "llama-3-8b": {
        "athletes 16": ((5e-5, 5.0), (1e-4, 2.0), (2e-5, 2.0)),
        "athletes 64": ((5e-5, 5.0), (1e-4, 2.0), (2e-5, 2.0)),
        "sport": ((5e-5, 0.2), (5e-5, 1.0), (1e-5, 0.1)),
        "counterfact 16": ((1e-4, 1.0), (2e-5, 0.1), (2e-5, 2.0)),
        "counterfact 64": ((5e-5, 0.2), (5e-5, 2.0), (1e-5, 0.2)),
        "counterfact 64 sequential": ((5e-5, 0.2), (5e-5, 2.0), (1e-5, 0.2)),
    },
}
"""Model -> task -> learning rate and coefficient of each group of localizations, in the order of `PAPER_GROUPS`.

Source: Tables 6 and 7 of arXiv 2410.12949, as in the `parent_config.json` of each run in the authors' published code,
github.com/magikarp01/mechanistic-unlearning at a36be56."""


def paper_settings(*, model: str, task: str, localization: str) -> dict[str, Any]:
    """The options of `finetune` with which Guo et al. 2025 (https://arxiv.org/abs/2410.12949) made this edit.

    `model`: `"gemma-7b"`, `"gemma-2-9b"`, `"llama-3-8b"`. `task`: `"athletes 16"`, `"athletes 64"`, `"sport"` (any of
    the three), `"counterfact 16"`, `"counterfact 64"`, `"counterfact 64 sequential"` (each of 4 x 16).
    `localization`: one of those in `PAPER_GROUPS`.

    All their edits inject: another sport at random (athletes), golf (sport), CounterFact's false answer. Every term,
    also text (the Pile in rows of 100 tokens), has 64 examples. They trained in bfloat16, Gemma-2-9B with 8-bit AdamW
    (`optimizer=mu.edit.adamw_8bit`); `finetune` keeps float32 masters, so that no small step is lost.

    They chose the settings by one run, on athletes 64, basketball and CounterFact, for the localizations that name the
    groups; other localizations, sports and the 16 athletes use the same ones. For a comparison of your own, `search`
    gives each localization its own. ValueError, which lists the known names, for another name.
    """
    groups = {name: place for place, names in enumerate(PAPER_GROUPS.values()) for name in names}
    _check("model", model, PAPER_SETTINGS)
    _check("task", task, PAPER_SETTINGS[model])
    _check("localization", localization, groups)
    learning_rate, coefficient = PAPER_SETTINGS[model][task][groups[localization]]
    return {
        "inject": True,
        "learning_rate": learning_rate,
        "forget_coefficient": coefficient,
        "steps": 25 if task.endswith("sequential") else 50,
        "batch_size": 64,
        "text_batch_size": 64,
        "text_length": 100,
    }


def _check(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"expected a {what} of the paper ({', '.join(known)}), got {name!r}.")
