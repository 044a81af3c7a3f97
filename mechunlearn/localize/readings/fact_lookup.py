"""The paper's mechanistic localization: the MLPs that look a fact up, by steps that can each be overruled."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.arguments import check, chosen_components
from mechunlearn.components import Component, ComponentMask, ComponentScores, ModelShape, heads, mlps
from mechunlearn.components.plot import FIRST, INK, dressed, lines, whiskers
from mechunlearn.curve import Curve
from mechunlearn.files import Saved
from mechunlearn.identity import name_of
from mechunlearn.localize.paths import Receivers, path_patching
from mechunlearn.localize.readings.probes import ProbeResult, probes
from mechunlearn.metrics import Metric, checked, logit_difference
from mechunlearn.model import Model, preserved, shape
from mechunlearn.model.running import constant, mean_activations
from mechunlearn.tasks.positions import Where, subject_last
from mechunlearn.tasks.prompts import Prompts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def fact_lookup_by_probes(
    model: Model,
    prompts: Prompts,
    labels: Sequence[Any] | Tensor | None = None,
    *,
    text: Int[Tensor, "row pos"],
    rise: float = 0.2,
    selectivity: float = 0.1,
    saturation: float = 0.95,
    tolerance: float = 0.05,
    layers: Iterable[int] | None = None,
    at: Where = subject_last,
    seeds: int = 5,
    folds: int = 5,
    penalty: float = 10.0,
    batch_size: int = 64,
) -> "FactLookup":
    """The MLPs that make an attribute linearly readable at the subject (the paper's way for Sports Facts).

    1. `probes` give the accuracy for each layer at the subject's last token, on held-out facts.
    2. The lookup begins with the first layer whose output is read better than chance + `rise`, and better than the
       control task + `selectivity`: where subjects share last tokens, these may explain the rise above chance. It ends
       with the first layer whose output has `saturation` of the whole rise. The MLPs from the first to the last
       are the mask.
    3. Attention outputs of all layers after the last are replaced, at every token, by their mean over `text`
       (such as `task.text`), and new probes are fitted. If no later accuracy falls by more than `tolerance`, the
       representation does not depend on later heads: `findings["holds_without_later_attention"]`.

    - `layers` overrules step 2.
    - The prompts need several answers: `tasks.joined(task.forget, task.retain)`.
    - Curves: `"accuracy"`, `"control"`, `"selectivity"` (the difference of the two) and `"later attention ablated"`.
    - `findings["borderline"]` has the layers whose value lies within 20 % of a threshold (for `saturation`, of the
      share that may be missing): other prompts may put them on its other side.

    That a token holds an attribute does not prove that the answer needs it: compare with `activation_patching`.

    Cost: 2 forwards of the prompts, 1 of the text, and the fits of two calls of `probes`.
    Guo et al. 2025, https://arxiv.org/abs/2410.12949; Nanda et al. 2023 (Fact Finding). ValueErrors as for `probes`.
    """
    thresholds = {"rise": rise, "selectivity": selectivity, "saturation": saturation, "tolerance": tolerance}
    for name, value in thresholds.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}.")
    sizes = shape(model)
    overruling = None if layers is None else _checked_layers(layers, sizes)
    options: dict[str, Any] = {"at": at, "seeds": seeds, "folds": folds, "penalty": penalty, "batch_size": batch_size}
    result = probes(model, prompts, labels, **options)
    by_thresholds, near = layers_by_thresholds(result, rise, selectivity, saturation)
    from_curves = by_thresholds.pop("layers")
    chosen = from_curves if overruling is None else overruling
    selectivities = Curve(result.points, result.correct - result.control, "accuracy minus control", limits=(-1.0, 1.0))
    curves = result.curves() | {"selectivity": selectivities}
    findings: dict[str, Any] = {"layers": chosen, "chance": result.chance, **by_thresholds, **thresholds}
    findings |= {"overruled": [] if layers is None else ["layers"], "borderline": near if layers is None else {}}
    later = list(range(chosen[-1] + 1, sizes.n_layers)) if chosen else []
    if later:
        names = [f"blocks.{layer}.hook_attn_out" for layer in later]
        with preserved(model), torch.no_grad():
            hooks = constant(mean_activations(model, text, names, batch_size=batch_size).items())
        ablated = probes(model, prompts, labels, **options, hooks=hooks)
        curves["later attention ablated"] = ablated.curves()["accuracy"]
        fall = float((result.accuracy - ablated.accuracy)[chosen[-1] + 2 :].max())  # after the first ablated layer
        findings["attention_ablated_in_layers"] = later
        findings["largest_fall_without_later_attention"] = max(0.0, fall)
        findings["holds_without_later_attention"] = fall <= tolerance
        findings["borderline"] |= {"tolerance": _borderline({"largest fall": fall}, tolerance)}
    mask = _mask(chosen, sizes, "fact_lookup_by_probes", findings)
    return FactLookup(mask, "fact_lookup_by_probes", findings, curves)


def lowest_layer(extraction_heads: Sequence[Component]) -> Receivers:
    """The residual stream that enters the lowest extraction head's layer, as in the paper; all above it recomputes."""
    return min(head.layer for head in extraction_heads)


def all_inputs(extraction_heads: Sequence[Component]) -> Receivers:
    """The queries, keys and values of the extraction heads alone."""
    return list(extraction_heads)


def fact_lookup_by_paths(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    n_heads: int = 10,
    extraction_heads: Iterable[Component | str] | None = None,
    receivers: Callable[[Sequence[Component]], Receivers] = lowest_layer,
    threshold: float = 0.02,
    layers: Iterable[int] | None = None,
    batch_size: int = 64,
) -> "FactLookup":
    """The MLPs whose output the heads that extract facts read (the paper's way for CounterFact).

    1. Denoising `path_patching` of every head to the final residual stream, MLPs on the way responding: the `n_heads`
       heads with the largest |effect| are the extraction heads.
    2. Denoising `path_patching` of every MLP, not through other MLPs, to the receivers that `receivers` gives for these
       heads: `lowest_layer` (default, the paper's: the residual stream that enters the lowest one's layer),
       `all_inputs` (their queries, keys and values), or a function of yours.
    3. The MLPs with |effect| > `threshold` are the mask.

    Effects are shares of the mean difference of the metric between clean and corrupt prompts. The paper's baseline, the
    last layer's effect, is 0 here: nothing above a receiver has a path to it.

    - `extraction_heads` overrules step 1, `layers` step 3. Scores: `"heads"` (only from step 1) and `"mlps"`.
    - `findings["borderline"]` has the MLPs whose |effect| lies within 20 % of `threshold`, and the heads whose |effect|
      lies within 20 % of the cut, half-way between the last head chosen and the next: other prompts may choose others.

    Cost: 4F + 2F for the metric's ends, for each head the MLPs above it, for each MLP the layers from the receivers on.
    Guo et al. 2025, https://arxiv.org/abs/2410.12949. ValueError if corrupt prompts do not lower the metric.
    """
    sizes = shape(model)
    check("denoising", batch_size, metric=metric, receivers=receivers)
    overruling = None if layers is None else _checked_layers(layers, sizes)
    gap = _gap(model, prompts, metric, batch_size)
    options: dict[str, Any] = {"metric": metric, "direction": "denoising", "batch_size": batch_size}
    scores, near = {}, {}
    if extraction_heads is None:
        effects = path_patching(model, prompts, senders=heads, receivers="logits", through_mlps=True, **options)
        scores["heads"] = _share(effects, gap)
        chosen_heads = tuple(scores["heads"].top(k=n_heads))
        ordered = sorted(_magnitudes(scores["heads"]).values(), reverse=True)
        near["n_heads"] = {}
        if n_heads < len(ordered):
            cut = (ordered[n_heads - 1] + ordered[n_heads]) / 2
            near["n_heads"] = _borderline(_magnitudes(scores["heads"]), cut)
    else:
        chosen_heads = _heads(extraction_heads, sizes)
    receiving = receivers(chosen_heads)
    _check_above_first_layer(chosen_heads, receiving)
    scores["mlps"] = _share(path_patching(model, prompts, senders=mlps, receivers=receiving, **options), gap)
    crossed = [component.layer for component, effect in scores["mlps"].items() if abs(effect) > threshold]
    chosen = crossed if overruling is None else overruling
    if overruling is None:
        near["threshold"] = _borderline(_magnitudes(scores["mlps"]), threshold)
    overruled = [n for n, v in (("extraction_heads", extraction_heads), ("layers", layers)) if v is not None]
    findings = {"layers": chosen, "extraction_heads": [str(head) for head in chosen_heads]}
    findings |= {"receivers": scores["mlps"].settings["receivers"], "threshold": threshold, "n_heads": n_heads}
    findings |= {"metric": name_of(metric), "clean_minus_corrupt": gap, "overruled": overruled, "borderline": near}
    mask = _mask(chosen, sizes, "fact_lookup_by_paths", findings)
    return FactLookup(mask, "fact_lookup_by_paths", findings, {}, scores)


def _mask(layers: Sequence[int], sizes: ModelShape, method: str, findings: dict[str, Any]) -> ComponentMask:
    members = frozenset(Component(layer, "MLP") for layer in layers)
    return ComponentMask(members, sizes, {"method": method, "findings": dict(findings)})


def _share(scores: ComponentScores, gap: float) -> ComponentScores:
    assert scores.per_prompt is not None  # path patching always has them
    per_prompt = scores.per_prompt / gap
    settings = {**scores.settings, "divided_by_clean_minus_corrupt": gap}
    return replace(scores, tensor=per_prompt.mean(0), per_prompt=per_prompt, settings=settings)


def _gap(model: Model, prompts: Prompts, metric: Metric, batch_size: int) -> float:
    clean = prompts.on(model)
    means = []
    with preserved(model), torch.no_grad():
        for side in (clean, clean.corrupted()):
            values = [checked(metric, batch.logits(model), batch) for batch in side.batches(batch_size)]
            means.append(float(torch.cat(values).double().mean()))
    if means[0] - means[1] <= 0:
        raise ValueError(
            f"expected corrupt prompts that lower {name_of(metric)}, got means of {means[0]:.4g} (clean) and "
            f"{means[1]:.4g} (corrupt): effects are shares of the difference; use prompts whose answer the model knows."
        )
    return means[0] - means[1]


def _heads(extraction_heads: Iterable[Component | str], sizes: ModelShape) -> tuple[Component, ...]:
    chosen = chosen_components(extraction_heads, sizes, "extraction_heads")
    wrong = [head for head in chosen if head.kind != ("H", None)]
    if wrong:
        raise ValueError(f"expected heads such as L5H3 as extraction heads, got {wrong[0]}: pass heads only.")
    return chosen


def _check_above_first_layer(chosen: Sequence[Component], receiving: Receivers) -> None:
    if receiving == 0 or all(head.layer == 0 for head in chosen):
        first = [str(head) for head in chosen if head.layer == 0]
        raise ValueError(
            f"expected extraction heads above layer 0, got {', '.join(first)}: no MLP is below them; pass another "
            f"n_heads, extraction_heads=... or receivers=all_inputs."
        )


def _checked_layers(layers: Iterable[int], sizes: ModelShape) -> list[int]:
    chosen = sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= sizes.n_layers:
        raise ValueError(f"expected layers in 0..{sizes.n_layers - 1}, got {chosen or 'none'}.")
    return chosen


def _borderline(values: Mapping[str, float], threshold: float) -> dict[str, float]:
    """Label -> value, for the values that lie within 20 % of the threshold, on either side of it."""
    return {label: value for label, value in values.items() if abs(value - threshold) <= 0.2 * threshold}


def _borderline_in_words(values_by_threshold: Mapping[str, Mapping[str, float]]) -> str:
    """For each threshold what is borderline, in words; "none" if nothing is."""
    shown = [
        f"{name}: " + ", ".join(f"{label} ({value:.3g})" for label, value in sorted(values.items(), key=itemgetter(1)))
        for name, values in sorted(values_by_threshold.items())
        if values
    ]
    return "; ".join(shown) or "none"


def layers_by_thresholds(
    result: ProbeResult, rise: float, selectivity: float, saturation: float
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The layers from where both thresholds are passed to where accuracy saturates, and what is near a threshold.

    Point l + 1 of the probes reads the output of layer l, so the first point is left out.
    """
    risen, selective = (result.accuracy - result.chance)[1:].tolist(), result.selectivity[1:].tolist()
    # For each layer's output, the share of the highest rise that it has reached; 1 at the last.
    highest = float((result.accuracy - result.chance).max())
    share = [*(value / highest if highest > 0 else 0.0 for value in risen[:-1]), 1.0]
    above_chance = [layer for layer, value in enumerate(risen) if value > rise]
    above_control = [layer for layer, value in enumerate(selective) if value > selectivity]
    above = [layer for layer in above_chance if layer in above_control]
    last = next(layer for layer, value in enumerate(share) if value >= saturation)
    read = {
        "layers": list(range(above[0], max(above[0], last) + 1)) if above else [],
        "first_layer_above_chance": next(iter(above_chance), None),
        "first_layer_above_control": next(iter(above_control), None),
    }
    missing = _borderline(_by_mlp([1 - value for value in share]), 1 - saturation) if saturation < 1 else {}
    near = {
        "rise": _borderline(_by_mlp(risen), rise),
        "selectivity": _borderline(_by_mlp(selective), selectivity),
        "saturation": {label: 1 - value for label, value in missing.items()},
    }
    return read, near


def _by_mlp(values: Sequence[float]) -> dict[str, float]:
    return {str(Component(layer, "MLP")): value for layer, value in enumerate(values)}


def _magnitudes(scores: ComponentScores) -> dict[str, float]:
    return {str(component): abs(effect) for component, effect in scores.items()}


@dataclass(frozen=True, eq=False, repr=False)
class FactLookup(Saved):
    """The MLPs that look facts up, with all curves, effects and thresholds as evidence; printing it shows them."""

    mask: ComponentMask
    """The MLPs; empty if nothing crossed the thresholds."""
    method: str
    """The function that made it."""
    findings: Mapping[str, Any]
    """Thresholds, what follows from them, checks, and the steps that were overruled by hand. `"borderline"`: threshold
    -> layer, MLP or head within 20 % of it, which other prompts might put on its other side -> its value."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Evidence by layer: accuracy of probes."""
    scores: Mapping[str, ComponentScores] = field(default_factory=dict)
    """Evidence by component: effects of paths, as shares of the difference between clean and corrupt prompts."""

    def __post_init__(self) -> None:
        for name in ("findings", "curves", "scores"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> tuple[Any, ...]:
        """The arguments that rebuild it in another process, to which read-only mappings cannot be sent."""
        return FactLookup, (self.mask, self.method, dict(self.findings), dict(self.curves), dict(self.scores))

    def plot(self) -> "Figure":
        """One panel for the curves, and one for each kind of scores, with 95 % intervals and thresholds."""
        from plotly.subplots import make_subplots

        panels = (["probes"] if self.curves else []) + list(self.scores)
        figure = make_subplots(rows=len(panels), cols=1, subplot_titles=panels)
        dashed: Any = partial(figure.add_hline, line={"dash": "dash", "width": 1, "color": INK}, col=1)  # type: ignore[arg-type]
        if self.curves:
            figure.add_traces(lines(self.curves).data, rows=1, cols=1)
            figure.update_xaxes(type="category", title="residual stream that enters layer", row=1, col=1)
            if "rise" in self.findings:
                dashed(y=self.findings["chance"] + self.findings["rise"], row=1)
        for row, (name, scores) in enumerate(self.scores.items(), start=1 + bool(self.curves)):
            ends = scores.interval()
            error = whiskers(ends[["score", "low", "high"]].itertuples(index=False), width=0)
            bars = {"x": list(ends.index), "y": ends["score"], "error_y": error, "showlegend": False}
            figure.add_bar(**bars, name=name, marker_color=FIRST.color, row=row, col=1)
            unit = "share of the fall" if "divided_by_clean_minus_corrupt" in scores.settings else scores.metric
            figure.update_yaxes(title=unit.replace("_", " "), row=row, col=1)
            if name == "mlps" and "threshold" in self.findings:
                for sign in (1, -1):
                    dashed(y=sign * self.findings["threshold"], row=row)
        shown = ", ".join(str(component) for component in self.mask) or "none"
        return dressed(figure, title=f"{self.method.replace('_', ' ')}: {shown}", height=340 * len(panels))

    def __repr__(self) -> str:
        shown = dict(self.findings)
        if "borderline" in shown:
            shown["borderline"] = _borderline_in_words(shown["borderline"])
        rows = [f"  {name.replace('_', ' ')}: {value}" for name, value in shown.items()]
        rows += [f"  {name}: {curve}" for name, curve in self.curves.items()]
        rows += [f"  {name}: {scores}" for name, scores in self.scores.items()]
        return "\n".join([f"FactLookup({self.method}; {self.mask})", *rows])


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
"""Model -> task -> layers whose MLPs the authors trained. `sports`: by probes and ablations; `counterfact a:b`: by path
patching on facts a to b of their list for that model, of facts whose answer the model gives a probability of 0.5.

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
    """
    if name not in PAPER_LAYERS:
        raise ValueError(f"expected one of {', '.join(PAPER_LAYERS)}, got {name!r}: use fact_lookup_by_probes.")
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
