"""Faithfulness over size: how much of a behaviour circuits keep, and how much is left without them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import ComponentMask, ComponentScores, EdgeMask, EdgeScores
from mechunlearn.components.plot import add_line, dressed, looks, shown
from mechunlearn.files import Saved
from mechunlearn.intervals import ends, resampled

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness(Saved):
    r"""The metric m of circuits C, of what is left without them, of the whole model M and of nothing.

        faithfulness = (m(C) - m(nothing)) / (m(M) - m(nothing)),    m = means over prompts

    1: the circuit does what the model does; 0: it does no better than the replaced model; outside [0, 1] is possible.
    """

    names: tuple[str, ...]
    """The curve that each circuit belongs to; circuits of a curve follow each other in order of size."""
    circuits: tuple[ComponentMask | EdgeMask, ...]
    """The circuits, of components or edges; each curve starts with the empty one and ends with that of everything."""
    share: Float[Tensor, "circuit"]
    """Each circuit's size, as a share of that of everything."""
    alone: Float[Tensor, "prompt circuit"]
    """The metric with everything outside the circuit replaced."""
    without: Float[Tensor, "prompt circuit"]
    """The metric with the circuit, and nothing else, replaced."""
    whole: Float[Tensor, "prompt"]
    """The metric of the model."""
    nothing: Float[Tensor, "prompt"]
    """The metric with everything replaced."""
    metric: str = ""
    """The metric's name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The replacement, what size counts, the number of prompts, ..."""

    def __post_init__(self) -> None:
        gap, size = float(self.whole.mean() - self.nothing.mean()), float(self.whole.abs().mean())
        if abs(gap) <= 1e-5 * max(size, float(self.nothing.abs().mean())):
            raise ValueError(
                f"expected a model that changes when all its components are replaced, got {self.metric} "
                f"{float(self.whole.mean()):.4g} before and after: faithfulness is undefined; use corrupted prompts "
                f"with another answer, another replacement or another metric."
            )

    @property
    def cpr(self) -> dict[str, float]:
        """Area under each curve of faithfulness over size, by trapezoids: MIB's circuit performance ratio."""
        return {name: float(area) for name, area in self._areas(self._normalised(self.alone)).items()}

    @property
    def cmd(self) -> dict[str, float]:
        """Area between each curve and 1, by trapezoids of |1 - faithfulness|: MIB's circuit-model distance."""
        return {name: float(area) for name, area in self._areas((1 - self._normalised(self.alone)).abs()).items()}

    def at_nominal_sizes(self, sizes: Sequence[float] | None = None) -> "DataFrame":
        """CPR and CMD as MIB's code integrates: over the fractions asked for, from the smallest one on, not from 0.

        One row per curve: cpr, cmd. At each fraction (default: MIB's ten), the faithfulness is that of the curve's
        largest circuit that is not larger, nothing where there is none. `cpr` and `cmd` of this class integrate over
        the sizes that circuits really have, and from 0 on. MIB resamples, and ranks by the signed score for CPR
        (`by=torch.neg` for noising scores), by its size for CMD. Keys and values count once per KV head here, once per
        query head there. ValueError for fractions that do not rise within [0, 1].
        """
        import pandas as pd

        fractions = torch.tensor(MIB_SIZES if sizes is None else sizes, dtype=torch.float64)
        if len(fractions) < 2 or bool((fractions.diff() <= 0).any()) or not 0 <= fractions[0] <= fractions[-1] <= 1:
            raise ValueError(f"expected two or more rising fractions in [0, 1], got {fractions.tolist()}: sort them.")
        rows, values = {}, self._normalised(self.alone)[0]
        for name, places in self._members.items():
            # The empty circuit comes first, so that there is always one that is not larger.
            last = torch.searchsorted(self.share[places], fractions * (1 + 1e-9), right=True) - 1
            faithful = values[places][last]
            rows[name] = [float(torch.trapezoid(y, fractions)) for y in (faithful, (1 - faithful).abs())]
        return pd.DataFrame.from_dict(rows, orient="index", columns=["cpr", "cmd"]).rename_axis("circuit")

    def to_frame(self, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> "DataFrame":
        """One row per circuit: its curve, size, faithfulness, what is left without it, and their intervals.

        `left` is the faithfulness of the rest of the model: near 0 for a circuit that is complete, in the sense of
        Wang et al. (2022) with the whole circuit knocked out. Intervals: percentile bootstrap over prompts.
        """
        import pandas as pd

        columns: dict[str, Any] = {
            "circuit": self.names,
            self._unit: [len(circuit) for circuit in self.circuits],
            "share": self.share.tolist(),
        }
        if self._unit == "components":
            columns["weights"] = [c.n_parameters for c in self.circuits if isinstance(c, ComponentMask)]
        weights = resampled(len(self.whole), draws, seed)
        for name, values in (("faithfulness", self.alone), ("left", self.without)):
            low, high = ends(self._normalised(values, weights), confidence)
            columns[name] = self._normalised(values)[0].tolist()
            columns |= {f"{name}_low": low.tolist(), f"{name}_high": high.tolist()}
        return pd.DataFrame(columns)

    def summary(self, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> "DataFrame":
        """One row per curve: cpr, cmd, and the area under `left`, with intervals over prompts."""
        import pandas as pd

        columns: dict[str, Any] = {}
        weights = resampled(len(self.whole), draws, seed)
        for name, values in (
            ("cpr", lambda w: self._normalised(self.alone, w)),
            ("cmd", lambda w: (1 - self._normalised(self.alone, w)).abs()),
            ("left", lambda w: self._normalised(self.without, w)),
        ):
            low, high = ends(torch.stack(list(self._areas(values(weights)).values()), 1), confidence)
            columns[name] = [float(area) for area in self._areas(values(None)).values()]
            columns |= {f"{name}_low": low.tolist(), f"{name}_high": high.tolist()}
        return pd.DataFrame(columns, index=pd.Index(list(self._members), name="circuit"))

    def plot(self) -> "Figure":
        """Faithfulness over size with 95 % intervals, and dotted what is left without; random circuits are grey."""
        import plotly.graph_objects as go

        figure, frame = go.Figure(), self.to_frame()
        for name, look in looks(self._members).items():
            rows = frame.iloc[self._members[name]]
            look = look._replace(color="lightgrey") if name.startswith("random ") else look
            x, ends = list(rows["share"]), (rows["faithfulness_low"], rows["faithfulness_high"])
            add_line(figure, name, look, x, rows["faithfulness"], *ends)
            dotted = {"line": {"color": look.color, "dash": "dot"}, "mode": "lines", "visible": "legendonly"}
            figure.add_scatter(x=x, y=rows["left"], name=f"without {shown(name)}", legendgroup=name, **dotted)
        replaced = self.settings.get("replacement", "")
        title = f"faithfulness: {self.metric.replace('_', ' ')}, {len(self.whole)} prompts, {replaced}"
        dressed(figure, title=title).update_xaxes(title=f"share of all {self._unit}")
        return figure.update_yaxes(title="faithfulness (share of the model's)")

    def __repr__(self) -> str:
        cpr, cmd = self.cpr, self.cmd
        shown = "; ".join(f"{name}: CPR {cpr[name]:.3f}, CMD {cmd[name]:.3f}" for name in cpr)
        return f"Faithfulness({self.metric}, {len(self.whole)} prompts; {shown})"

    @property
    def _unit(self) -> str:
        return "edges" if isinstance(self.circuits[0], EdgeMask) else "components"

    @cached_property
    def _members(self) -> dict[str, list[int]]:
        """Curve -> places of its circuits."""
        places: dict[str, list[int]] = {}
        for place, name in enumerate(self.names):
            places.setdefault(name, []).append(place)
        return places

    def _normalised(
        self, values: Float[Tensor, "prompt circuit"], weights: Float[Tensor, "draw prompt"] | None = None
    ) -> Float[Tensor, "draw circuit"]:
        """(m - m(nothing)) / (m(whole) - m(nothing)), for weighted prompts; one draw of all prompts by default."""
        if weights is None:
            weights = torch.ones(1, len(self.whole), dtype=torch.float64)
        gap = weights @ (self.whole - self.nothing)
        shares = (weights @ (values - self.nothing[:, None])) / gap[:, None] + 0.0  # adding 0 turns -0.0 into 0.0
        # A circuit that gives the model's own values is exactly 1, not 1 within rounding.
        return shares.masked_fill((values == self.whole[:, None]).all(0), 1.0)

    def _areas(self, values: Float[Tensor, "draw circuit"]) -> dict[str, Float[Tensor, "draw"]]:
        return {name: torch.trapezoid(values[:, p], self.share[p], dim=1) for name, p in self._members.items()}


MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares at which the Mechanistic Interpretability Benchmark cuts circuits."""

Ranking: TypeAlias = ComponentScores | EdgeScores
Circuit: TypeAlias = ComponentMask | EdgeMask
CurveSource: TypeAlias = Ranking | Sequence[Circuit]
"""What a curve is made from: scores whose ranking is to be cut, or circuits."""
Size: TypeAlias = Callable[[Any], int]
"""A function that gives a circuit's size."""
ValuesWithout: TypeAlias = Callable[[list[frozenset[Any]]], tuple[Tensor, Tensor]]
"""A function that gives the metric of the whole model, and of that without each set of components or edges."""


def check_sizes(sizes: Sequence[float], random_circuits: int) -> None:
    """ValueError for sizes outside [0, 1], and for a negative number of random circuits."""
    outside = [size for size in sizes if not 0 <= size <= 1]
    if outside or not sizes:
        raise ValueError(
            f"expected sizes in [0, 1], shares of all components (at least one), got {outside or 'none'}: divide a "
            f"number of components by how many there are."
        )
    if random_circuits < 0:
        raise ValueError(f"expected a number of random circuits, 0 or more, got {random_circuits}.")


def named_curves(circuits: Any) -> dict[str, CurveSource]:
    """The sources of curves (scores, a circuit, several, or a dict of such) under names."""
    if isinstance(circuits, ComponentScores | EdgeScores):
        circuits = {circuits.method: circuits}
    elif not isinstance(circuits, Mapping):
        circuits = {"circuit": circuits}
    if not circuits or any(name.startswith("random ") for name in circuits):
        raise ValueError(
            f'expected at least one circuit or scores, under a name that does not start with "random " (the '
            f"baseline's), got {list(circuits) or 'none'}: name them otherwise."
        )
    return {name: [curve] if isinstance(curve, ComponentMask | EdgeMask) else curve for name, curve in circuits.items()}


def ordered_circuits(circuits: Iterable[Circuit], nothing: Circuit, everything: Circuit, size: Size) -> list[Circuit]:
    """Circuits in order of size, nothing and everything among them."""
    return sorted(dict.fromkeys([nothing, *circuits, everything]), key=lambda circuit: (size(circuit), len(circuit)))


def measured_faithfulness(
    curves: Mapping[str, list[Any]], size: Size, values_without: ValuesWithout, metric: str, settings: Mapping[str, Any]
) -> Faithfulness:
    """The faithfulness of circuits."""
    names = tuple(name for name, circuits in curves.items() for _ in circuits)
    circuits = tuple(circuit for circuits in curves.values() for circuit in circuits)
    inside = [frozenset(circuit) for circuit in circuits]
    outside = [inside[-1] - circuit for circuit in inside]
    alone, without, ends = columns_without(values_without, outside, inside, [frozenset(), inside[-1]])
    share = torch.tensor([size(circuit) / size(circuits[-1]) for circuit in circuits], dtype=torch.float64)
    return Faithfulness(names, circuits, share, alone, without, ends[:, 0], ends[:, 1], metric, settings)


def columns_without(
    values_without: ValuesWithout, *removed: Sequence[frozenset[Any]]
) -> list[Float[Tensor, "prompt set"]]:
    """For each sequence of sets, the metric of the model without each of them."""
    # Sets that occur twice are run once, and the empty set, which is the model itself, not at all.
    sets = [members for members in dict.fromkeys(chain(*removed)) if members]
    whole, values = values_without(sets)
    column = {members: place for place, members in enumerate([*sets, frozenset()])}
    values = torch.cat([values, whole[:, None]], 1)
    return [values[:, [column[members] for members in wanted]] for wanted in removed]
