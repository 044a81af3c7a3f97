"""Activation patching: what changes when components' outputs are replaced, measured by running the model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from mechunlearn.arguments import check, check_functions, chosen_components
from mechunlearn.components import Component, ComponentMask, Components, ComponentScores, ModelShape, PositionScores
from mechunlearn.components.plot import FIRST, dressed, titled, whiskers
from mechunlearn.files import Saved
from mechunlearn.identity import described, name_of
from mechunlearn.intervals import bootstrap
from mechunlearn.localize.circuits.runs import circuit_values
from mechunlearn.localize.options import ActivationOptions, SetOptions, settings_of
from mechunlearn.localize.replacement import patched_run, replacement_values
from mechunlearn.localize.sites import Places, passes, places_of, resolution
from mechunlearn.metrics import checked
from mechunlearn.model import Model, Run, base_run, continued, preserved, shape
from mechunlearn.model.classes import at_least_float32
from mechunlearn.model.decomposition import scales_of
from mechunlearn.model.hooks import layer_of
from mechunlearn.model.matrices import attention_change, is_plain, slots
from mechunlearn.model.running import computed_in
from mechunlearn.options import with_options
from mechunlearn.tasks.positions import Groups, Where, everywhere, roles
from mechunlearn.tasks.prompts import Prompts

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


@with_options()
def activation_patching(
    model: Model, prompts: Prompts, *, where: Where = everywhere, **options: Unpack[ActivationOptions]
) -> ComponentScores:
    r"""The exact effect of patching each component alone.

        score = mean over prompts of metric(x with a replaced by a') - metric(x)

    in the metric's unit, where a is the component's output in the run x that is patched, as for `attribution_patching`.

    - `where` gives the tokens that are patched: `everywhere` (default), `subject`, `subject_last`, `answer`.
    - Each component is patched alone, also those of a mask: `set_patching` patches all of a mask together.

    Cost: 2F, and for each component of layer l the part of F that comes after it: no layer below l, no attention of
    layer l unless a query, key or value is patched, and only the answers' positions after the last attention.

    Vig et al. 2020, https://arxiv.org/abs/2004.12265; Zhang & Nanda 2023, https://arxiv.org/abs/2309.16042.
    """

    def positions(batch: Prompts) -> dict[str, Bool[Tensor, "batch pos"]]:
        return {"": where(batch)}

    check_functions(where=where)
    chosen, effects = _effects(model, prompts, positions, options)
    values, name = effects[:, :, 0], name_of(options["metric"])
    settings = settings_of(options, prompts, where=described(where), **_resolution(model, prompts, options))
    sizes, own = shape(model), values.contiguous()
    return ComponentScores(chosen, values.mean(0), sizes, "activation_patching", name, settings, own)


@with_options()
def activation_patching_by_position(
    model: Model, prompts: Prompts, *, positions: Groups = roles, **options: Unpack[ActivationOptions]
) -> PositionScores:
    """`activation_patching` of each component at each group of tokens alone.

    `positions` divides each prompt's tokens into named groups, the same for all prompts: `roles` (default) by where
    they stand to the subject. A group is patched together. Cost: `activation_patching` of every component and group.
    """
    chosen, effects = _effects(model, prompts, positions, options)
    labels, name = tuple(positions(prompts)), name_of(options["metric"])
    settings = settings_of(options, prompts, positions=described(positions), **_resolution(model, prompts, options))
    return PositionScores(chosen, labels, effects, shape(model), "activation_patching_by_position", name, settings)


def _resolution(model: Model, prompts: Prompts, options: ActivationOptions | SetOptions) -> dict[str, float]:
    patched = patched_run(prompts, options["direction"], options["replacement"])
    return resolution(model, patched, options["metric"], options["compute_dtype"], options["batch_size"])


def _effects(
    model: Model, prompts: Prompts, positions: Groups, options: ActivationOptions
) -> tuple[tuple[Component, ...], Float[Tensor, "prompt component group"]]:
    """The components, and the effect of each at each group of tokens."""
    sizes = shape(model)
    chosen = chosen_components(options["components"], sizes)
    direction, batch_size, replacement = options["direction"], options["batch_size"], options["replacement"]
    check(direction, batch_size, metric=options["metric"], replacement=replacement, positions=positions)
    _check_groups(prompts, positions, batch_size)
    patched = patched_run(prompts.on(model), direction, replacement)
    places = places_of(chosen, sizes)
    with preserved(model), computed_in(model, options["compute_dtype"]), torch.no_grad():
        effects = [_batch_effects(model, batch, places, positions, options) for batch in patched.batches(batch_size)]
    return chosen, torch.cat(effects).cpu()


def _check_groups(prompts: Prompts, positions: Groups, batch_size: int) -> None:
    labels = tuple(positions(prompts))
    for batch in prompts.batches(batch_size):
        if tuple(positions(batch)) != labels:
            raise ValueError(
                f"expected the same groups of tokens for all prompts, got {len(positions(batch))} in one batch and "
                f"{len(labels)} for all: group by role, or use prompts of one length."
            )


def _batch_effects(
    model: Model, prompts: Prompts, places: Places, positions: Groups, options: ActivationOptions
) -> Float[Tensor, "prompt component group"]:
    metric = options["metric"]
    run = base_run(model, prompts.tokens, prompts.attention_mask, prompts.positions, names=places)
    source = replacement_values(options["replacement"], model, prompts, run.values)
    where = torch.stack(list(positions(prompts).values()), 1) & prompts.attention_mask[:, None]
    unpatched = checked(metric, run.logits, prompts).double()
    count = sum(len(units) for units in places.values())
    effects = unpatched.new_zeros(len(prompts), count, where.shape[1])
    for name, units in tqdm(places.items(), desc="activation patching", unit="site", leave=False, disable=None):
        columns, heads = list(units), list(units.values())
        # A row for each unit, group of tokens and prompt. Rows of one hook point share passes: all start at its layer.
        counts = len(units), where.shape[1], len(prompts)
        for place, group, row in passes(counts, options["batch_size"], where.device):
            # The head or neuron of each row; None where the site is patched as a whole.
            unit = None if None in heads else torch.tensor(heads, device=row.device)[place]
            logits = _patched(model, run, source[name], name, row, unit, where[row, group])
            values = checked(metric, logits, prompts.rows(row)).double()
            effects[row, torch.tensor(columns, device=row.device)[place], group] = values - unpatched[row]
    return effects


def _patched(
    model: Model,
    run: Run,
    source: Tensor,
    name: str,
    row: Int[Tensor, "row"],
    unit: Int[Tensor, "row"] | None,
    where: Bool[Tensor, "row pos"],
) -> Float[Tensor, "row answer d_vocab"]:
    """Logits of copies of the run's prompts, each with one unit of the site replaced at some tokens."""
    layer = layer_of(name)
    base = run.values[name]
    # What an MLP adds to the residual stream, or a head to its attention's output, is changed without running either.
    if name.endswith("hook_mlp_out"):
        change = (at_least_float32(source[row]) - base[row]) * where[..., None] * scales_of(model).written
        return continued(model, run, row, layer + 1, residual=run.residuals[layer + 1][row] + change)
    if name.endswith("hook_z") and unit is not None:
        change = (at_least_float32(source[row, :, unit]) - base[row, :, unit]) * where[..., None]
        if is_plain(model, layer, "W_O"):
            added = change @ at_least_float32(slots(model)[layer, "W_O"].weight)[unit]
        else:
            moved = torch.zeros_like(base[row], dtype=change.dtype)
            moved[torch.arange(len(row), device=row.device), :, unit] = change
            added = attention_change(model, layer, base[row], moved)
        return continued(model, run, row, layer, attention=run.attention[layer][row] + added)
    # Elsewhere a hook puts the change in, and the layer runs from there: its attention only if queries, keys or values
    # are patched.
    attention = None if name.endswith(("hook_q", "hook_k", "hook_v")) else run.attention[layer][row]

    def put(value: Tensor, hook: object) -> Tensor:
        if unit is None:
            return torch.where(where.view(*where.shape, *[1] * (value.ndim - 2)), source[row], value)
        patched, copies = value.clone(), torch.arange(len(row), device=row.device)
        chosen = where.view(*where.shape, *[1] * (value.ndim - 3))
        patched[copies, :, unit] = torch.where(chosen, source[row, :, unit], value[copies, :, unit])
        return patched

    return continued(model, run, row, layer, attention=attention, hooks=[(name, put)])


@with_options()
def set_patching(
    model: Model, prompts: Prompts, sets: Mapping[str, Components], **options: Unpack[SetOptions]
) -> "SetEffects":
    r"""The exact effect of patching all components of a set together, for each set.

        effect = mean over prompts of metric(x with every a of the set replaced by its a') - metric(x)

    in the metric's unit. A set of one component has the score of `activation_patching`; scores do not add up to that of
    a set. Each a' is what the replacement gives in the unpatched run, also above other members of the set. Where one
    member is part of another (a head of an attention layer), the larger one decides.

    `sets`: a mask, or components of any kinds, such as neurons of several layers, under each name:
    `{"found": scores.top(k=50), "control": random_like(...)}`. Sets may overlap.

    Cost: 2F, and for each set the part of F from its lowest layer on, without that layer's attention where the set
    contains only what follows it. Sets share batches.

    Vig et al. 2020, https://arxiv.org/abs/2004.12265 (sets of neurons and of heads). ValueError for an empty set, one
    of another model, and as for `activation_patching`.
    """
    metric, direction, replacement = options["metric"], options["direction"], options["replacement"]
    where = options["where"]
    check(direction, options["batch_size"], metric=metric, replacement=replacement, where=where)
    masks = _masks(sets, shape(model))
    patched = patched_run(prompts.on(model), direction, replacement)
    members = [mask.components for mask in masks.values()]
    whole, values = circuit_values(model, patched, members, options=options, where=where)
    settings = settings_of(options, prompts, where=described(where), **_resolution(model, prompts, options))
    return SetEffects(masks, values - whole[:, None], "set_patching", name_of(metric), settings)


def _masks(sets: Mapping[str, Components], sizes: ModelShape) -> dict[str, ComponentMask]:
    if not isinstance(sets, Mapping) or not sets:
        raise ValueError(
            f"expected a dict of named sets, got {sets if isinstance(sets, Mapping) else type(sets).__name__}: pass "
            f'{{"name": mask}}.'
        )
    masks = {}
    for name, members in sets.items():
        if isinstance(members, ComponentMask) and members.shape != sizes:
            raise ValueError(
                f"expected sets of this model ({sizes}), got {name!r} of another one ({members.shape}): localize on "
                f"the model that you test."
            )
        chosen = chosen_components(members, sizes, f"the set {name!r}")
        masks[name] = members if isinstance(members, ComponentMask) else ComponentMask.of(chosen, sizes)
    return masks


@dataclass(frozen=True, eq=False, repr=False)
class SetEffects(Mapping[str, float], Saved):
    """An effect for every set: a mapping from their names to floats, means over prompts."""

    sets: Mapping[str, ComponentMask]
    """The components replaced together, under each set's name, in the order of the columns."""
    per_prompt: Float[Tensor, "prompt set"]
    """Each prompt's own effect."""
    method: str
    """The function that made it."""
    metric: str = ""
    """The metric whose change the effects are; their unit is the metric's."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The direction, the replacement, the tokens patched, ..."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sets", MappingProxyType(dict(self.sets)))

    def __reduce__(self) -> tuple[Any, ...]:
        """The arguments that rebuild it in another process, to which a read-only mapping cannot be sent."""
        return SetEffects, (dict(self.sets), self.per_prompt, self.method, self.metric, dict(self.settings))

    @property
    def tensor(self) -> Float[Tensor, "set"]:
        """Means over prompts."""
        return self.per_prompt.mean(0)

    def interval(self, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> "DataFrame":
        """Percentile bootstrap over prompts: columns effect, low, high. All sets share the draws."""
        import pandas as pd

        low, high = bootstrap(self.per_prompt, confidence=confidence, draws=draws, seed=seed)
        columns = {"effect": self.tensor.tolist(), "low": low.tolist(), "high": high.tolist()}
        return pd.DataFrame(columns, index=pd.Index(list(self.sets), name="set"))

    def minus(self, other: str) -> "SetEffects":
        """Every effect minus that of one set, prompt by prompt: its interval says whether they differ."""
        if other not in self.sets:
            raise ValueError(f"expected one of the sets {', '.join(self.sets)}, got {other!r}.")
        difference = self.per_prompt - self.per_prompt[:, [list(self.sets).index(other)]]
        return SetEffects(self.sets, difference, self.method, self.metric, {**self.settings, "minus": other})

    def to_frame(self) -> "DataFrame":
        """One row per set: effect, its 95 % interval, number of components and of weights."""
        masks = self.sets.values()
        sizes = {"components": [len(mask) for mask in masks], "weights": [mask.n_parameters for mask in masks]}
        return self.interval().assign(**sizes)

    def plot(self) -> "Figure":
        """A bar per set with its 95 % interval."""
        import plotly.graph_objects as go

        ends = self.interval()
        error = whiskers(ends[["effect", "low", "high"]].itertuples(index=False))
        title, unit = titled(self.method, self.metric, len(self.per_prompt))
        figure = go.Figure(go.Bar(x=list(ends.index), y=ends["effect"], error_y=error, marker_color=FIRST.color))
        return dressed(figure, title=title).update_yaxes(title=unit)

    def __getitem__(self, name: str) -> float:
        return dict(zip(self.sets, self.tensor.tolist(), strict=True))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sets)

    def __len__(self) -> int:
        return len(self.sets)

    def __repr__(self) -> str:
        shown = "; ".join(
            f"{name} ({len(mask)} components): {effect:+.3g}"
            for (name, mask), effect in zip(self.sets.items(), self.tensor.tolist(), strict=True)
        )
        return f"SetEffects({self.method}, {self.metric}, {len(self.per_prompt)} prompts; {shown})"
