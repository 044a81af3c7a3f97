"""Incompleteness: does a circuit without some of its parts do what the model without these parts does?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Unpack

from jaxtyping import Float
from torch import Tensor

from mechunlearn.arguments import check
from mechunlearn.components import ComponentMask, Components, EdgeMask
from mechunlearn.components.edge import edges_where
from mechunlearn.components.plot import FIRST, INK, dressed
from mechunlearn.files import Saved
from mechunlearn.identity import name_of
from mechunlearn.intervals import bootstrap, ends, resampled
from mechunlearn.localize.circuits.curves import Circuit, ValuesWithout, columns_without, named_curves
from mechunlearn.localize.circuits.faithfulness import replaced_components, replaced_edges
from mechunlearn.localize.circuits.runs import circuit_values, edge_circuit_values
from mechunlearn.localize.options import ReplacingOptions, settings_of
from mechunlearn.localize.sites import resolution
from mechunlearn.model import Model, shape
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


@with_options(batch_size=16)
def incompleteness(
    model: Model,
    prompts: Prompts,
    circuit: ComponentMask | EdgeMask,
    *,
    knockouts: int = 20,
    seed: int = 0,
    components: Components | None = None,
    **options: Unpack[ReplacingOptions],
) -> "Incompleteness":
    r"""How differently the circuit and the model react when parts K of the circuit are replaced in both.

        incompleteness(K) = |F(C \ K) - F(M \ K)|,    F = mean over prompts of the metric, in its unit

    In F(C \ K), K and everything outside C are replaced; in F(M \ K), K alone. 0: without K, the circuit does what the
    model does. A circuit that leaves out a backup can be faithful, and is incomplete for those K that the backup stands
    in for. The largest of few random K is a lower bound of the largest there is.

    - `knockouts`: the number of random sets K, each with every member of C with probability 1/2. Two more are always
      there: K = nothing compares C with the model, and K = C the replaced model with the rest of it.
    - `components`: what is replaced outside the circuit, as for `faithfulness` (default: heads and MLPs); for circuits
      of edges it is all edges outside C, as for `edge_faithfulness`.

    Cost: 2F, and for each K twice the part of F from the lowest replaced layer on; for edges, two forwards.

    Wang et al. 2022, https://arxiv.org/abs/2211.00593, section 4. ValueError for an empty circuit, no knockouts, and
    as for `faithfulness`.
    """
    metric = options["metric"]
    check("noising", options["batch_size"], metric=metric, replacement=options["replacement"])
    if not isinstance(circuit, ComponentMask | EdgeMask) or not circuit:
        raise ValueError(
            f"expected a circuit with at least one component or edge, a ComponentMask or an EdgeMask, got "
            f"{circuit!r}: cut scores with .top(...)."
        )
    if knockouts < 1:
        raise ValueError(f"expected at least one knockout, got {knockouts}: the paper draws many and shows them all.")
    everything, values_without = _outside(model, prompts, circuit, components, options)
    generator = Random(f"incompleteness {seed}")
    parts = [circuit & {member for member in circuit if generator.random() < 0.5} for _ in range(knockouts)]
    chosen = [circuit - circuit, *parts, circuit]
    # Removed for F(C \\ K): everything but what is in C and not in K; for F(M \\ K): K.
    from_circuit = [everything - frozenset(circuit - part) for part in chosen]
    of_circuit, of_model = columns_without(values_without, from_circuit, [frozenset(part) for part in chosen])
    limit = resolution(model, prompts, options["metric"], options["compute_dtype"], options["batch_size"])
    settings = settings_of(options, prompts, knockouts=knockouts, seed=seed, **limit)
    return Incompleteness(circuit, tuple(chosen), of_circuit, of_model, name_of(metric), settings)


def _outside(
    model: Model, prompts: Prompts, circuit: Circuit, components: Components | None, options: ReplacingOptions
) -> tuple[frozenset[Any], ValuesWithout]:
    """All components or edges that can be replaced, and the function that measures the model without some of them."""
    if isinstance(circuit, EdgeMask):
        if components is not None:
            raise ValueError("expected components=None for a circuit of edges, got some: all others are replaced.")
        edges = frozenset(edges_where(replaced_edges(model, named_curves(circuit)), shape(model)))
        return edges, partial(edge_circuit_values, model, prompts, options=options)
    level = replaced_components(named_curves(circuit), components, shape(model))
    return frozenset(level), partial(circuit_values, model, prompts, options=options)


@dataclass(frozen=True, eq=False, repr=False)
class Incompleteness(Saved):
    r"""The metric F of a circuit C without K, and of the model M without K, for parts K of the circuit.

    incompleteness(K) = |F(C \ K) - F(M \ K)|,    F = means over prompts, in the metric's unit
    """

    circuit: ComponentMask | EdgeMask
    """C."""
    knockouts: tuple[ComponentMask | EdgeMask, ...]
    """The sets K: nothing, the random ones, and all of the circuit."""
    circuit_without: Float[Tensor, "prompt knockout"]
    """The metric with everything replaced but what is in C and not in K."""
    model_without: Float[Tensor, "prompt knockout"]
    """The metric with K replaced; the first column is that of the model."""
    metric: str = ""
    """The metric's name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The replacement, the seed of the random knockouts, ..."""

    @property
    def names(self) -> tuple[str, ...]:
        """The knockouts' names in tables."""
        return ("nothing", *(f"random {i}" for i in range(len(self.knockouts) - 2)), "all of it")

    @property
    def tensor(self) -> Float[Tensor, "knockout"]:
        """The incompleteness for each knockout."""
        return self._difference.mean(0).abs()

    @property
    def mean(self) -> float:
        """The mean incompleteness over the random knockouts."""
        return float(self.tensor[1:-1].mean())

    @property
    def largest(self) -> float:
        """The largest incompleteness among the random knockouts: a lower bound of the largest that there is."""
        return float(self.tensor[1:-1].max())

    def interval(self, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """Low and high end of the interval of `mean`: percentile bootstrap over prompts, for these knockouts.

        `mean` is one of sizes: noise makes it larger, and the interval of a complete circuit does not reach 0.
        """
        weights = resampled(len(self.circuit_without), draws, seed) / len(self.circuit_without)
        low, high = ends((weights @ self._difference)[:, 1:-1].abs().mean(1), confidence)
        return float(low), float(high)

    def to_frame(self, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> "DataFrame":
        """One row per knockout: its size, F(C without K), F(M without K), their difference with its interval over
        prompts, and the difference's size, the incompleteness."""
        import pandas as pd

        low, high = bootstrap(self._difference, confidence=confidence, draws=draws, seed=seed)
        columns = {
            "size": [len(part) for part in self.knockouts],
            "circuit_without": self.circuit_without.mean(0).tolist(),
            "model_without": self.model_without.mean(0).tolist(),
            "difference": self._difference.mean(0).tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "incompleteness": self.tensor.tolist(),
        }
        return pd.DataFrame(columns, index=pd.Index(self.names, name="knockout"))

    def plot(self) -> "Figure":
        """F(M without K) over F(C without K), a point per knockout: a complete circuit's are on the dotted line."""
        import plotly.graph_objects as go

        x, y = self.circuit_without.mean(0).tolist(), self.model_without.mean(0).tolist()
        span = [min(x + y), max(x + y)]
        figure = go.Figure(go.Scatter(x=span, y=span, mode="lines", line={"dash": "dot", "color": INK}))
        figure.add_scatter(x=x, y=y, text=list(self.names), mode="markers", marker_color=FIRST.color)
        unit = self.metric.replace("_", " ")
        title = f"incompleteness: {len(self.circuit)} {self._unit}, {len(self.circuit_without)} prompts"
        dressed(figure, title=title, showlegend=False).update_xaxes(title=f"circuit without K, {unit}")
        return figure.update_yaxes(title=f"model without K, {unit}")

    def __repr__(self) -> str:
        low, high = self.interval()
        place = 1 + int(self.tensor[1:-1].argmax())
        return (
            f"Incompleteness({self.metric}, {len(self.circuit_without)} prompts, {len(self.circuit)} {self._unit}; "
            f"mean over {len(self.knockouts) - 2} random knockouts {self.mean:.3g} [{low:.3g}, {high:.3g}], largest "
            f"{self.largest:.3g} ({self.names[place]}); model {float(self.model_without[:, 0].mean()):.3g}, circuit "
            f"{float(self.circuit_without[:, 0].mean()):.3g})"
        )

    @property
    def _difference(self) -> Float[Tensor, "prompt knockout"]:
        return self.circuit_without - self.model_without

    @property
    def _unit(self) -> str:
        return "edges" if isinstance(self.circuit, EdgeMask) else "components"
