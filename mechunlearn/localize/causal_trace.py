"""What causal tracing returns: the effect of restoring each token at each layer, for each prompt."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.components import Component, ComponentScores, ModelShape
from mechunlearn.files import read_tensors, write_tensors
from mechunlearn.intervals import bootstrap
from mechunlearn.localize.positions import ROLES

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

KINDS = ("residual", "MLP", "ATTN")
"""What can be restored."""


@dataclass(frozen=True, eq=False, repr=False)
class CausalTrace:
    """Indirect effects in the metric's unit: positive = restoring brings the answer back."""

    clean: Float[Tensor, "prompt"]
    """The metric of the clean run."""
    corrupt: Float[Tensor, "prompt"]
    """The metric of the corrupted run, the mean over draws of noise."""
    effects: Float[Tensor, "prompt kind layer token"]
    """What restoring the i-th token adds to the corrupted run's metric, the mean over draws; 0 where there is none."""
    roles: Int[Tensor, "prompt token"]
    """The role of each token, a place in `ROLES`; -1 where there is no token."""
    kinds: tuple[str, ...]
    """What was restored, in the order of the effects."""
    shape: ModelShape
    metric: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total_effect(self) -> Float[Tensor, "prompt"]:
        """What the noise takes from the metric of each prompt."""
        return self.clean - self.corrupt

    def total(self, *, confidence: float = 0.95) -> tuple[float, float, float]:
        """The mean of `total_effect` over prompts, and the low and high end of its interval (bootstrap over prompts).

        In the metric's unit; positive = the noise takes from the metric. An interval that contains 0 says that the
        noise does not reliably hide the answer, so that there is little to restore.
        """
        low, high = bootstrap(self.total_effect, confidence=confidence)
        return float(self.total_effect.mean()), float(low), float(high)

    @property
    def by_role(self) -> Float[Tensor, "prompt kind layer role"]:
        """Means over the tokens of each role; NaN where a prompt has no such token."""
        member = torch.nn.functional.one_hot(self.roles + 1, len(ROLES) + 1)[..., 1:].to(self.effects.dtype)
        sums = torch.einsum("pklt,ptr->pklr", self.effects, member)
        return sums / member.sum(1)[:, None, None]

    def scores(self, kind: str = "MLP", *, role: str = "last of the subject") -> ComponentScores:
        """The effects at one role as scores of that kind's layers, for `.top()`.

        A score is of the window around its layer. ValueError for the residual stream, which is no component, for a
        kind that was not traced, and where a prompt has no token of that role.
        """
        if kind not in self.kinds or kind == "residual" or role not in ROLES:
            raise ValueError(
                f"expected a kind that was traced and is a component (traced: {', '.join(self.kinds)}; the residual "
                f"stream is no component) and a role ({', '.join(ROLES)}), got {kind!r} and {role!r}: trace it with "
                f"kinds=..., or choose another."
            )
        values = self.by_role[:, self.kinds.index(kind), :, ROLES.index(role)].contiguous()
        without = values.isnan().any(1).nonzero()[:, 0].tolist()
        if without:
            raise ValueError(
                f"expected prompts with a token {role}, got none in prompts {without[:5]}: choose another role."
            )
        components = tuple(Component(layer, kind) for layer in range(self.shape.n_layers))
        settings = {**self.settings, "role": role}
        return ComponentScores(components, values.mean(0), self.shape, "causal_tracing", self.metric, settings, values)

    def to_frame(self, *, confidence: float = 0.95) -> "DataFrame":
        """One row per kind, layer and role: effect, low, high (bootstrap over prompts) and number of prompts."""
        import pandas as pd

        values = self.by_role
        low, high = bootstrap(values, confidence=confidence)
        names = ["kind", "layer", "role"]
        index = pd.MultiIndex.from_product([self.kinds, range(self.shape.n_layers), ROLES], names=names)
        columns = {"effect": values.nanmean(0), "low": low, "high": high, "prompts": (~values.isnan()).sum(0)}
        frame = pd.DataFrame({name: column.flatten().numpy() for name, column in columns.items()}, index=index)
        return frame.query("prompts > 0")

    def plot(self, kind: str | None = None) -> "Figure":
        """The classic heat map, role x layer, of the mean effect over prompts; by default of the first traced kind.

        ValueError for a kind that was not traced.
        """
        kind = self._traced(kind)
        values = self.by_role[:, self.kinds.index(kind)].nanmean(0)
        present = [role for role in range(len(ROLES)) if not bool(values[:, role].isnan().all())]
        clean, corrupt = float(self.clean.mean()), float(self.corrupt.mean())
        title = f"{self._titled(kind)}: clean {clean:.3g}, corrupted {corrupt:.3g}"
        return self._heat_map(values[:, present], [ROLES[role] for role in present], title)

    def plot_prompt(self, prompt: int, kind: str | None = None) -> "Figure":
        """The heat map of one prompt, token x layer; tokens by their number in the prompt, from 0, and their role.

        By default of the first traced kind. ValueError for a kind that was not traced and a prompt that is not there.
        """
        kind = self._traced(kind)
        if not 0 <= prompt < len(self.clean):
            raise ValueError(f"expected the number of a prompt in 0..{len(self.clean) - 1}, got {prompt}.")
        tokens = (self.roles[prompt] >= 0).nonzero()[:, 0].tolist()
        values = self.effects[prompt, self.kinds.index(kind)][:, tokens]
        clean, corrupt = float(self.clean[prompt]), float(self.corrupt[prompt])
        title = f"{self._titled(kind)}, prompt {prompt}: clean {clean:.3g}, corrupted {corrupt:.3g}"
        return self._heat_map(values, [f"{i}: {ROLES[int(self.roles[prompt, i])]}" for i in tokens], title)

    def _traced(self, kind: str | None) -> str:
        if kind is not None and kind not in self.kinds:
            raise ValueError(
                f"expected a kind that was traced ({', '.join(self.kinds)}), got {kind!r}: trace it with kinds=..., or "
                f"choose another."
            )
        return self.kinds[0] if kind is None else kind

    def _titled(self, kind: str) -> str:
        return kind if kind == "residual" else f"{kind}, windows of {self.settings.get('window')} layers"

    def _heat_map(self, values: Float[Tensor, "layer row"], rows: list[str], title: str) -> "Figure":
        import plotly.graph_objects as go

        limit = float(values.nan_to_num(0.0).abs().max()) or 1.0
        unit = self.metric.replace("_", " ")
        heat = go.Heatmap(
            z=values.T.tolist(),
            x=list(range(self.shape.n_layers)),
            y=rows,
            colorscale="RdBu",
            zmid=0,
            zmin=-limit,
            zmax=limit,
            colorbar={"title": {"text": f"indirect effect, {unit}", "side": "right"}},
            hovertemplate="layer %{x}, %{y}: %{z:.4g}<extra></extra>",
        )
        size = {"width": 420 + 30 * self.shape.n_layers, "height": max(360, 150 + 25 * len(rows))}
        layout = {"title": title, "template": "plotly_white"} | size
        return go.Figure(heat, layout=layout | {"xaxis": {"title": "layer"}, "yaxis": {"autorange": "reversed"}})

    def save(self, path: str | Path) -> None:
        """Write safetensors with everything but the model."""
        tensors = {name: getattr(self, name) for name in ("clean", "corrupt", "effects", "roles")}
        content = {"kinds": self.kinds, "shape": asdict(self.shape), "metric": self.metric}
        write_tensors(path, "CausalTrace", tensors, content | {"settings": dict(self.settings)})

    @classmethod
    def load(cls, path: str | Path) -> "CausalTrace":
        """What `save` wrote; ValueError for a corrupted or truncated file."""
        tensors, content = read_tensors(path, "CausalTrace")
        shape = ModelShape(**content["shape"])
        return cls(
            **tensors,
            kinds=tuple(content["kinds"]),
            shape=shape,
            metric=content["metric"],
            settings=content["settings"],
        )

    def __repr__(self) -> str:
        clean, corrupt = float(self.clean.mean()), float(self.corrupt.mean())
        means = self.by_role.nanmean(0).nan_to_num(-torch.inf)
        kind, layer, role = torch.unravel_index(means.argmax(), means.shape)
        return (
            f"CausalTrace({self.metric}: clean {clean:.3g}, corrupted {corrupt:.3g}; {len(self.clean)} prompts; "
            f"most is restored by {self.kinds[int(kind)]} at layer {int(layer)}, {ROLES[int(role)]})"
        )
