"""Where facts are looked up, with the evidence it was read off."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mechunlearn.components import Component, ComponentMask, ComponentScores, ModelShape
from mechunlearn.curve import Curve
from mechunlearn.files import read_tensors, write_tensors
from mechunlearn.localize.thresholds import described_borderline

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False, repr=False)
class FactLookup:
    """The MLPs that look facts up, and every curve and threshold that says so. Printing it shows the evidence."""

    mask: ComponentMask
    """The MLPs; empty if nothing crossed the thresholds."""
    method: str
    """The function that made it."""
    findings: Mapping[str, Any]
    """Thresholds, what was read off with them, checks, and which steps were overruled by hand. `"borderline"`:
    threshold -> what lies within 20 % of it, so that other prompts might decide otherwise -> its value."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Evidence by layer: accuracy of probes."""
    scores: Mapping[str, ComponentScores] = field(default_factory=dict)
    """Evidence by component: effects of paths, as shares of the difference between clean and corrupt prompts."""

    def __post_init__(self) -> None:
        for name in ("findings", "curves", "scores"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def plot(self) -> "Figure":
        """One panel for the curves, and one for each kind of scores, with 95 % intervals and thresholds."""
        from plotly.subplots import make_subplots

        from mechunlearn.curve import lines

        panels = (["probes"] if self.curves else []) + list(self.scores)
        figure = make_subplots(rows=len(panels), cols=1, subplot_titles=panels)
        if self.curves:
            figure.add_traces(lines(self.curves).data, rows=1, cols=1)
            figure.update_xaxes(type="category", title="residual stream that enters layer", row=1, col=1)
            if "rise" in self.findings:
                _lines(figure, 1, [self.findings["chance"] + self.findings["rise"]])
        for row, (name, scores) in enumerate(self.scores.items(), start=1 + bool(self.curves)):
            ends = scores.interval()
            up, down = ends["high"] - ends["score"], ends["score"] - ends["low"]
            error = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "width": 0}
            figure.add_bar(x=list(ends.index), y=ends["score"], error_y=error, name=name, row=row, col=1)
            if name == "mlps" and "threshold" in self.findings:
                _lines(figure, row, [self.findings["threshold"], -self.findings["threshold"]])
        shown = ", ".join(str(component) for component in self.mask) or "none"
        return figure.update_layout(title=f"{self.method}: {shown}", template="plotly_white", height=340 * len(panels))

    def save(self, path: str | Path) -> None:
        """Write safetensors with mask, findings and all evidence."""
        tensors: dict[str, Tensor] = {f"curve {name}": curve.per_prompt for name, curve in self.curves.items()}
        for name, scores in self.scores.items():
            assert scores.per_prompt is not None  # path patching always has them
            tensors[f"scores {name}"] = scores.per_prompt
        content = {
            "method": self.method,
            "mask": [str(component) for component in self.mask],
            "provenance": dict(self.mask.provenance),
            "shape": asdict(self.mask.shape),
            "findings": list(self.findings.items()),  # lists keep their order
            "curves": [(name, [c.points, c.unit, c.chance]) for name, c in self.curves.items()],
            "scores": {
                name: [[str(c) for c in s], s.method, s.metric, dict(s.settings)] for name, s in self.scores.items()
            },
        }
        write_tensors(path, "FactLookup", tensors, json.loads(json.dumps(content)))

    @classmethod
    def load(cls, path: str | Path) -> "FactLookup":
        """What `save` wrote; ValueError for a corrupted or truncated file."""
        tensors, content = read_tensors(path, "FactLookup")
        shape = ModelShape(**content["shape"])
        members = frozenset(Component.parse(label) for label in content["mask"])
        curves = {
            name: Curve(tuple(points), tensors[f"curve {name}"], unit, chance)
            for name, (points, unit, chance) in content["curves"]
        }
        scores = {}
        for name, (labels, method, metric, settings) in content["scores"].items():
            values, components = tensors[f"scores {name}"], tuple(Component.parse(label) for label in labels)
            scores[name] = ComponentScores(components, values.mean(0), shape, method, metric, settings, values)
        mask = ComponentMask(members, shape, content["provenance"])
        return cls(mask, content["method"], dict(content["findings"]), curves, scores)

    def __repr__(self) -> str:
        shown = dict(self.findings)
        if "borderline" in shown:
            shown["borderline"] = described_borderline(shown["borderline"])
        found = [f"  {name.replace('_', ' ')}: {value}" for name, value in shown.items()]
        found += [f"  {name}: {curve}" for name, curve in self.curves.items()]
        found += [f"  {name}: {scores}" for name, scores in self.scores.items()]
        return "\n".join([f"FactLookup({self.method}; {self.mask})", *found])


def _lines(figure: "Figure", row: int, heights: Sequence[float]) -> None:
    """Thresholds, dashed."""
    for height in heights:
        figure.add_hline(y=height, line_dash="dash", line_color="grey", row=row, col=1)  # type: ignore[arg-type]
