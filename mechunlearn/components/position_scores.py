"""Scores of components at some tokens only: what patching by position gives."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from mechunlearn.components.component import Component, ModelShape
from mechunlearn.components.scores import ComponentScores
from mechunlearn.files import read_tensors, write_tensors

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False, repr=False)
class PositionScores:
    """A score for every component at every group of tokens; `.at(group)` gives those of one group."""

    components: tuple[Component, ...]
    """What is scored, in the order of the rows."""
    positions: tuple[str, ...]
    """Names of the groups of tokens, in the order of the columns."""
    per_prompt: Float[Tensor, "prompt component position"]
    """Each prompt's own score; 0 where a prompt has no such token."""
    shape: ModelShape
    """Of the model that they were computed on."""
    method: str
    """The function that made it."""
    metric: str = ""
    """The metric whose change the scores are; their unit is the metric's."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The method's arguments."""

    def __post_init__(self) -> None:
        expected = (len(self.components), len(self.positions))
        if self.per_prompt.shape[1:] != expected:
            raise ValueError(
                f"expected values of shape (prompts, {expected[0]} components, {expected[1]} positions), got "
                f"{tuple(self.per_prompt.shape)}."
            )

    @property
    def tensor(self) -> Float[Tensor, "component position"]:
        """Means over prompts."""
        return self.per_prompt.mean(0)

    def at(self, position: str) -> ComponentScores:
        """The scores at one group of tokens. ValueError for a group that is not there."""
        if position not in self.positions:
            raise ValueError(f"expected one of the positions {', '.join(self.positions)}, got {position!r}.")
        values = self.per_prompt[:, :, self.positions.index(position)]
        settings = {**self.settings, "position": position}
        return ComponentScores(
            self.components, values.mean(0), self.shape, self.method, self.metric, settings, values.contiguous()
        )

    def to_frame(self) -> "DataFrame":
        """One row per component, one column per position."""
        import pandas as pd

        index = pd.Index([str(component) for component in self.components], name="component")
        return pd.DataFrame(self.tensor.numpy(), index=index, columns=list(self.positions))

    def plot(self) -> "Figure":
        """Component x position heat map; red is negative, blue positive."""
        import plotly.graph_objects as go

        values = self.tensor
        limit = float(values.abs().max()) or 1.0
        unit = self.metric.replace("_", " ")
        heat = go.Heatmap(
            z=values.tolist(),
            x=list(self.positions),
            y=[str(component) for component in self.components],
            colorscale="RdBu",
            zmid=0,
            zmin=-limit,
            zmax=limit,
            colorbar={"title": {"text": unit, "side": "right"}},
            hovertemplate="%{y}, %{x}: %{z:.4g} " + unit + "<extra></extra>",
        )
        title = f"{self.method}, {self.metric}, {len(self.per_prompt)} prompts"
        size = {"width": 320 + 70 * len(self.positions), "height": 220 + 18 * len(self.components)}
        figure = go.Figure(heat, layout={"title": title, "template": "plotly_white"} | size)
        return figure.update_yaxes(autorange="reversed")

    def save(self, path: str | Path) -> None:
        """Write safetensors with everything but the model."""
        content = {
            "components": [str(component) for component in self.components],
            "positions": list(self.positions),
            "shape": asdict(self.shape),
            "method": self.method,
            "metric": self.metric,
            "settings": dict(self.settings),
        }
        write_tensors(path, "PositionScores", {"per_prompt": self.per_prompt}, content)

    @classmethod
    def load(cls, path: str | Path) -> "PositionScores":
        """What `save` wrote; ValueError for a corrupted or truncated file."""
        tensors, content = read_tensors(path, "PositionScores")
        return cls(
            tuple(Component.parse(label) for label in content["components"]),
            tuple(content["positions"]),
            tensors["per_prompt"],
            ModelShape(**content["shape"]),
            content["method"],
            content["metric"],
            content["settings"],
        )

    def __repr__(self) -> str:
        sizes = f"{len(self.components)} components x {len(self.positions)} positions, {len(self.per_prompt)} prompts"
        return f"PositionScores({self.method}, {self.metric}; {sizes})"
