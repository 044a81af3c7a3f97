"""Options that several localizations share, in tables for `with_options`. Of each option: type, default, sentence."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeAlias, TypedDict

import torch

from mechunlearn.arguments import Direction
from mechunlearn.components import Components, Edge, heads_and_mlps
from mechunlearn.identity import described
from mechunlearn.localize.replacement import Replacement, resample
from mechunlearn.metrics import Metric, logit_difference
from mechunlearn.tasks.positions import Where, everywhere
from mechunlearn.tasks.prompts import Prompts

BatchSize: TypeAlias = Annotated[
    int, 64, "A pass has this many rows: prompts, or copies of them in each of which something else is replaced."
]


class MetricOptions(TypedDict, total=False):
    """What is measured."""

    metric: Annotated[
        Metric,
        logit_difference,
        "What is measured, in its own unit: one of `mu.metrics`, or any function of logits and prompts that gives a "
        "value for each prompt.",
    ]


class PrecisionOptions(TypedDict, total=False):
    """In what numbers a method computes."""

    compute_dtype: Annotated[
        torch.dtype | None,
        None,
        "`torch.float32` computes all runs of a half-precision model in float32, a block's weights at a time, and sees "
        "effects that its own dtype (None) rounds away. The model is not changed.",
    ]


class ReplacingOptions(MetricOptions, PrecisionOptions, total=False):
    """The options of methods that replace outputs."""

    replacement: Annotated[
        Replacement,
        resample,
        "What takes an output's place: `resample` (the other run's output), `zero`, `mean_over(reference)`, "
        "`gaussian(std=...)`, or a function of yours. All but `resample` replace in the clean run alone.",
    ]
    batch_size: BatchSize


class EffectOptions(MetricOptions, total=False):
    """Which run is patched."""

    direction: Annotated[
        Direction,
        "noising",
        '"noising": x, the run that is patched, is clean and x\' corrupt; what the answer needs scores *negative*. '
        '"denoising": x is corrupt and x\' clean; what carries the answer scores *positive*.',
    ]


class PatchingOptions(EffectOptions, total=False):
    """The options of every method that patches."""

    batch_size: BatchSize


class PathOptions(PatchingOptions, PrecisionOptions, total=False):
    """The options of path patching."""

    through_mlps: Annotated[bool, False, "Whether MLPs between senders and receivers respond."]


class ComponentOptions(PatchingOptions, total=False):
    """The options of methods that score components."""

    components: Annotated[
        Components, heads_and_mlps, "A level (`heads_and_mlps`, `layers`, `matrices`, `neurons`), a mask, or any list."
    ]


class SetOptions(PatchingOptions, ReplacingOptions, total=False):
    """The options of `set_patching`."""

    where: Annotated[
        Where, everywhere, "The patched tokens: `everywhere`, `subject`, `subject_last`, `answer`, or any of each row."
    ]


class ActivationOptions(ComponentOptions, ReplacingOptions, total=False):
    """The options of activation patching."""


class EdgeOptions(EffectOptions, total=False):
    """The options of methods that score edges."""

    edges: Annotated[
        Iterable[Edge | str] | None,
        None,
        "The edges that are scored; None: all. Keys and values are destinations per KV head; output biases belong to "
        "no source.",
    ]


class ExactEdgeOptions(EdgeOptions, PrecisionOptions, total=False):
    """The options of edge patching."""


class EdgeGradientOptions(EdgeOptions, total=False):
    """The options of methods that score all edges by gradients, at one cost."""

    batch_size: Annotated[
        int | None,
        None,
        "A pass has this many prompts; None: as many as need a quarter of a GPU's free memory, or on a CPU about 65 MB "
        "(2 of 20 tokens in GPT-2 small).",
    ]
    per_prompt: Annotated[bool, True, "False leaves out each prompt's scores, and with them intervals."]


def settings_of(options: Mapping[str, object], prompts: Prompts, **more: Any) -> dict[str, Any]:
    """How a result was made: the options that change it (its metric and its components stand beside it), and `more`."""
    shown = {name: options[name] for name in ("direction", "replacement", "batch_size") if name in options}
    if options.get("compute_dtype") is not None:
        more["compute_dtype"] = str(options["compute_dtype"])
    named = {name: described(value) if callable(value) else value for name, value in shown.items()}
    return {**named, **more, "prompts": len(prompts)}
