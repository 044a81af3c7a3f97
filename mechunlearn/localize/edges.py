"""Edge patching: the effect of patching every edge, each alone, measured by running the model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from mechunlearn.arguments import check
from mechunlearn.components import Component, Edge, EdgeScores, ModelShape, destinations
from mechunlearn.components.edge import Destination
from mechunlearn.localize.edge_attribution import written
from mechunlearn.localize.sites import Direction
from mechunlearn.metrics import Metric, checked, logit_difference, name_of
from mechunlearn.model import Model, Run, base_run, continued, device_of, preserved, shape, slots
from mechunlearn.model.edges import contributions, edges_of
from mechunlearn.model.norms import norm_of
from mechunlearn.model.suffix import through_layer
from mechunlearn.tasks.prompts import Prompts


def edge_patching(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Direction = "noising",
    edges: Iterable[Edge | str] | None = None,
    batch_size: int = 256,
    prompts_at_once: int = 8,
) -> EdgeScores:
    r"""The exact effect of patching each edge alone.

        score(u -> v) = mean over prompts of metric(x, v reads r_v + a_u(x') - a_u(x)) - metric(x)

    in the metric's unit, where r_v is the residual stream as v alone reads it (before its norm) and a_u what u adds to
    it; nothing else about x is changed. Signs, `direction`, `edges` and what a head adds in Gemma 2: as for
    `edge_attribution_patching`, which is this effect's first-order estimate.

    `batch_size` counts rows of one pass: the copies of a prompt for several edges share it.

    Cost: for an edge into layer l, the MLP of layer l and the layers above it, of the last one only its attention
    and, at the answers' positions, the rest. One pass of a layer's attention serves a source's edges to all
    of its heads. Memory: what the sources of `prompts_at_once` prompts add to the residual stream.

    The same by one full pass for each edge: Hanna et al. 2024, https://arxiv.org/abs/2403.17806. ValueError as for
    `edge_attribution_patching`.
    """
    check(direction, min(batch_size, prompts_at_once), metric=metric)
    sizes = shape(model)
    chosen = edges_of(model, edges)
    given = prompts.to(device_of(model))
    patched = given if direction == "noising" else given.exchanged()
    found = []
    with preserved(model), torch.no_grad():
        for batch in patched.batches(prompts_at_once):
            found.append(_batch_effects(model, batch, metric, chosen, sizes, batch_size).cpu())
    effects = torch.cat(found)
    settings = {"direction": direction, "batch_size": batch_size, "prompts": len(prompts)}
    return EdgeScores(effects.mean(0), chosen, sizes, "edge_patching", name_of(metric), settings, effects)


@dataclass(frozen=True, eq=False)
class _Base:
    """The run that is patched, and what every source would change in it."""

    model: Model
    prompts: Prompts
    run: Run
    change: Float[Tensor, "source batch pos d_model"]
    rows: int
    """Of one pass."""

    def jobs(self, *counts: int) -> Iterator[tuple[Int[Tensor, "row"], ...]]:
        """All combinations of numbers below the counts and prompts, prompts last and fastest, a pass at a time."""
        ranges = [torch.arange(count, device=self.change.device) for count in (*counts, len(self.prompts))]
        every = torch.cartesian_prod(*ranges)
        for part in every.split(self.rows) if len(every) else ():  # an empty tensor would split into an empty one
            yield part.unbind(1)


def _batch_effects(
    model: Model,
    prompts: Prompts,
    metric: Metric,
    chosen: Bool[Tensor, "source destination"],
    sizes: ModelShape,
    rows: int,
) -> Float[Tensor, "prompt source destination"]:
    z = [f"blocks.{layer}.attn.hook_z" for layer in range(sizes.n_layers)]
    run = base_run(model, prompts.tokens, prompts.attention_mask, prompts.positions, names=z)
    difference = written(model, prompts.corrupted()).minus(written(model, prompts), prompts.attention_mask)
    change = contributions(model, difference).to(run.residuals[0].dtype)
    base = _Base(model, prompts, run, change, rows)
    unpatched = checked(metric, run.logits, prompts).double()
    effects = unpatched.new_zeros(len(prompts), *chosen.shape)
    column: dict[Destination, int] = {end: place for place, end in enumerate(destinations(sizes))}
    with tqdm(total=int(chosen.sum()), desc="edge patching", unit="edge", leave=False, disable=None) as bar:
        for source, destination, row, logits in _patched(base, chosen, sizes, column):
            values = checked(metric, logits, prompts.rows(row)).double()
            effects[row, source, destination] = values - unpatched[row]
            bar.update(len(row) / len(prompts))
    return effects


Patched = tuple[Int[Tensor, "row"], Int[Tensor, "row"], Int[Tensor, "row"], Float[Tensor, "row answer d_vocab"]]
"""Source, destination and prompt of each row, and its logits."""


def _patched(
    base: _Base, chosen: Bool[Tensor, "source destination"], sizes: ModelShape, column: dict[Destination, int]
) -> Iterator[Patched]:
    for layer in range(sizes.n_layers):
        for matrix in ("W_Q", "W_K", "W_V"):
            yield from _into_heads(base, chosen, sizes, layer, matrix, column)
        yield from _into_mlp(base, chosen, layer, column[Component(layer, "MLP")])
    yield from _into_logits(base, chosen, sizes.n_layers, column["logits"])


def _into_logits(
    base: _Base, chosen: Bool[Tensor, "source destination"], n_layers: int, column: int
) -> Iterator[Patched]:
    wanted = chosen[:, column].nonzero()[:, 0]
    for place, row in base.jobs(len(wanted)):
        source = wanted.to(place.device)[place]
        residual = base.run.residuals[n_layers][row] + base.change[source, row]
        logits = continued(base.model, base.run, row, n_layers, residual=residual)
        yield source, torch.full_like(source, column), row, logits


def _into_mlp(base: _Base, chosen: Bool[Tensor, "source destination"], layer: int, column: int) -> Iterator[Patched]:
    """The change enters the layer, whose attention is held, and is taken back after the MLP has read it."""
    wanted = chosen[:, column].nonzero()[:, 0]
    for place, row in base.jobs(len(wanted)):
        source = wanted.to(place.device)[place]
        change, attention = base.change[source, row], base.run.attention[layer][row]
        residual = base.run.residuals[layer][row] + change
        leaving, _ = through_layer(base.model, base.run, row, layer, residual=residual, attention=attention)
        logits = continued(base.model, base.run, row, layer + 1, residual=leaving - change)
        yield source, torch.full_like(source, column), row, logits


def _into_heads(
    base: _Base,
    chosen: Bool[Tensor, "source destination"],
    sizes: ModelShape,
    layer: int,
    matrix: str,
    column: dict[Destination, int],
) -> Iterator[Patched]:
    """Heads of one layer do not touch each other: one pass of its attention patches what all of them read."""
    group = sizes.n_heads // sizes.units(matrix)
    columns = torch.tensor([column[Component(layer, "H", h, matrix)] for h in range(0, sizes.n_heads, group)])
    wanted = chosen[:, columns].any(1).nonzero()[:, 0]
    for place, row in base.jobs(len(wanted)):
        source = wanted.to(place.device)[place]
        added = _attention_changes(base, sizes, layer, matrix, source, row)
        pairs = chosen[:, columns].to(source.device)[source].nonzero()
        for part in pairs.split(base.rows):
            copy, unit = part.unbind(1)
            attention = base.run.attention[layer][row[copy]] + added(copy, unit)
            logits = continued(base.model, base.run, row[copy], layer, attention=attention)
            yield source[copy], columns.to(unit.device)[unit], row[copy], logits


def _attention_changes(
    base: _Base, sizes: ModelShape, layer: int, matrix: str, source: Int[Tensor, "copy"], row: Int[Tensor, "copy"]
) -> Callable[[Int[Tensor, "pair"], Int[Tensor, "pair"]], Float[Tensor, "pair pos d_model"]]:
    """What the attention gives more when each unit of a matrix, alone, reads what its copy's source changes."""
    name = f"blocks.{layer}.attn.hook_z"
    projected = _projection_change(base, layer, matrix, source, row)
    hook = (f"blocks.{layer}.attn.hook_{matrix[-1].lower()}", lambda value, hook: value + projected.to(value.dtype))
    _, found = through_layer(base.model, base.run, row, layer, hooks=[hook], names=[name], with_mlp=False)
    units = sizes.units(matrix)
    change = (found[name] - base.run.values[name][row]).unflatten(2, (units, -1)).flatten(3)
    slot = slots(base.model)[layer, "W_O"]
    weight = slot.view(slot.parameter.detach()).unflatten(0, (units, -1)).flatten(1, 2)
    return lambda copy, unit: torch.bmm(change[copy, :, unit], weight[unit])


def _projection_change(
    base: _Base, layer: int, matrix: str, source: Int[Tensor, "copy"], row: Int[Tensor, "copy"]
) -> Float[Tensor, "copy pos unit d_head"]:
    """Of the queries, keys or values, if all heads read the change: biases drop out."""
    residual = base.run.residuals[layer][row]
    norm = norm_of(base.model.blocks[layer].ln1, base.model)
    patched = residual + base.change[source, row]
    before, after = (norm.direction_and_scale(x)[0] * norm.weight for x in (residual, patched))
    slot = slots(base.model)[layer, matrix]
    return einsum(after - before, slot.view(slot.parameter.detach()).to(after.dtype), "c p d, u w d -> c p u w")
