"""Edge patching: the effect of patching every edge, each alone, measured by running the model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from mechunlearn.arguments import check
from mechunlearn.components import Component, Edge, EdgeScores, ModelShape, destinations
from mechunlearn.components.edge import Destination
from mechunlearn.identity import name_of
from mechunlearn.localize.edge_attribution import outputs_of_sources
from mechunlearn.localize.sites import Direction
from mechunlearn.metrics import Metric, checked, logit_difference
from mechunlearn.model import Model, Run, base_run, continued, preserved, shape, slots
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
    it; nothing else about x is changed. Signs, `direction`, `edges`, errors and what a head adds in Gemma 2 are as in
    `edge_attribution_patching`, which is this effect's first-order estimate.

    Cost: for an edge into layer l, the MLP of layer l and the layers above it (of the last one only its attention and,
    at the answers' positions, the rest). One pass of a layer's attention serves a source's edges to all of its heads.
    `batch_size` counts rows of one pass, which copies of a prompt for several edges share. Memory: what the sources of
    `prompts_at_once` prompts add to the residual stream.

    Hanna et al. 2024, https://arxiv.org/abs/2403.17806 (by one full pass for each edge).
    """
    check(direction, min(batch_size, prompts_at_once), metric=metric)
    sizes = shape(model)
    clean = prompts.on(model)
    chosen = edges_of(model, edges)
    patched = clean if direction == "noising" else clean.exchanged()
    rows = []
    with preserved(model), torch.no_grad():
        for batch in patched.batches(prompts_at_once):
            rows.append(_batch_effects(model, batch, metric, chosen, sizes, batch_size).cpu())
    effects = torch.cat(rows)
    settings = {"direction": direction, "batch_size": batch_size, "prompts": len(prompts)}
    return EdgeScores(effects.mean(0), chosen, sizes, "edge_patching", name_of(metric), settings, effects)


@dataclass(frozen=True, eq=False)
class _Base:
    model: Model
    prompts: Prompts
    run: Run
    change: Float[Tensor, "source batch pos d_model"]
    batch_size: int
    """Rows of one pass."""

    def passes(self, sources: Int[Tensor, "wanted"]) -> Iterator[tuple[Int[Tensor, "row"], Int[Tensor, "row"]]]:
        """All combinations of these sources and the prompts, a pass at a time: each row's source and prompt."""
        ranges = torch.arange(len(sources)), torch.arange(len(self.prompts))
        pairs = torch.cartesian_prod(*(numbers.to(self.change.device) for numbers in ranges))
        for pair in pairs.split(self.batch_size) if len(pairs) else ():  # an empty tensor splits into an empty one
            place, row = pair.unbind(1)
            yield sources.to(place.device)[place], row


def _batch_effects(
    model: Model,
    prompts: Prompts,
    metric: Metric,
    chosen: Bool[Tensor, "source destination"],
    sizes: ModelShape,
    batch_size: int,
) -> Float[Tensor, "prompt source destination"]:
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(sizes.n_layers)]
    run = base_run(model, prompts.tokens, prompts.attention_mask, prompts.positions, names=names)
    own, other = outputs_of_sources(model, prompts), outputs_of_sources(model, prompts.corrupted())
    change = contributions(model, other.minus(own, prompts.attention_mask)).to(run.residuals[0].dtype)
    base = _Base(model, prompts, run, change, batch_size)
    unpatched = checked(metric, run.logits, prompts).double()
    effects = unpatched.new_zeros(len(prompts), *chosen.shape)
    column: dict[Destination, int] = {end: place for place, end in enumerate(destinations(sizes))}
    with tqdm(total=int(chosen.sum()), desc="edge patching", unit="edge", leave=False, disable=None) as bar:
        for source, destination, row, logits in _patched_rows(base, chosen, sizes, column):
            values = checked(metric, logits, prompts.rows(row)).double()
            effects[row, source, destination] = values - unpatched[row]
            bar.update(len(row) / len(prompts))
    return effects


PatchedRows: TypeAlias = tuple[
    Int[Tensor, "row"], Int[Tensor, "row"], Int[Tensor, "row"], Float[Tensor, "row answer d_vocab"]
]
"""Source, destination and prompt of each row, and its logits."""


def _patched_rows(
    base: _Base, chosen: Bool[Tensor, "source destination"], sizes: ModelShape, column: dict[Destination, int]
) -> Iterator[PatchedRows]:
    for layer in range(sizes.n_layers):
        for matrix in ("W_Q", "W_K", "W_V"):
            yield from _into_heads(base, chosen, sizes, layer, matrix, column)
        yield from _into_mlp(base, chosen, layer, column[Component(layer, "MLP")])
    yield from _into_logits(base, chosen, sizes.n_layers, column["logits"])


def _into_logits(
    base: _Base, chosen: Bool[Tensor, "source destination"], n_layers: int, column: int
) -> Iterator[PatchedRows]:
    """Nothing comes after the logits, so the change enters the final norm with the residual stream."""
    for source, row in base.passes(chosen[:, column].nonzero()[:, 0]):
        residual = base.run.residuals[n_layers][row] + base.change[source, row]
        logits = continued(base.model, base.run, row, n_layers, residual=residual)
        yield source, torch.full_like(source, column), row, logits


def _into_mlp(
    base: _Base, chosen: Bool[Tensor, "source destination"], layer: int, column: int
) -> Iterator[PatchedRows]:
    """The change enters the layer, whose attention is held, and is subtracted again behind the MLP."""
    for source, row in base.passes(chosen[:, column].nonzero()[:, 0]):
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
) -> Iterator[PatchedRows]:
    """Edges into one matrix of all heads of a layer.

    Heads of one layer do not act on each other. So one pass of the attention, in which all of them read a source's
    change, gives what each would add if it alone had read it; then each edge continues from there by itself.
    """
    group = sizes.n_heads // sizes.units(matrix)
    columns = torch.tensor([column[Component(layer, "H", h, matrix)] for h in range(0, sizes.n_heads, group)])
    for source, row in base.passes(chosen[:, columns].any(1).nonzero()[:, 0]):
        added = _attention_changes(base, sizes, layer, matrix, source, row)
        pairs = chosen[:, columns].to(source.device)[source].nonzero()
        for pair in pairs.split(base.batch_size):
            copy, unit = pair.unbind(1)
            attention = base.run.attention[layer][row[copy]] + added(copy, unit)
            logits = continued(base.model, base.run, row[copy], layer, attention=attention)
            yield source[copy], columns.to(unit.device)[unit], row[copy], logits


def _attention_changes(
    base: _Base, sizes: ModelShape, layer: int, matrix: str, source: Int[Tensor, "copy"], row: Int[Tensor, "copy"]
) -> Callable[[Int[Tensor, "pair"], Int[Tensor, "pair"]], Float[Tensor, "pair pos d_model"]]:
    """What the attention's output gains when a unit of the matrix alone reads the change of its copy's source."""
    # The change of the queries, keys or values if all heads read the source's change: biases drop out.
    residual = base.run.residuals[layer][row]
    norm = norm_of(base.model.blocks[layer].ln1, base.model)
    difference = norm.without_bias(residual + base.change[source, row]) - norm.without_bias(residual)
    reading = slots(base.model)[layer, matrix].weight.to(difference.dtype)
    projected = einsum(difference, reading, "copy pos d, unit width d -> copy pos unit width")
    name = f"blocks.{layer}.attn.hook_z"
    hook = (f"blocks.{layer}.attn.hook_{matrix[-1].lower()}", lambda value, hook: value + projected.to(value.dtype))
    _, values = through_layer(base.model, base.run, row, layer, hooks=[hook], names=[name], with_mlp=False)
    units = sizes.units(matrix)
    # Query heads that share a KV head change together: their z and W_O are seen as one unit's.
    change = (values[name] - base.run.values[name][row]).unflatten(2, (units, -1)).flatten(3)
    weight = slots(base.model)[layer, "W_O"].weight.unflatten(0, (units, -1)).flatten(1, 2)
    return lambda copy, unit: torch.bmm(change[copy, :, unit], weight[unit])
