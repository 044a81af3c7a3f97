"""Edge patching: the effect of patching every edge, each alone, measured by running the model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias, Unpack

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from mechunlearn.arguments import check
from mechunlearn.components import Component, EdgeScores, ModelShape, destinations
from mechunlearn.components.edge import Destination
from mechunlearn.identity import name_of
from mechunlearn.localize.edge_attribution import outputs_of_sources
from mechunlearn.localize.options import ExactEdgeOptions, settings_of
from mechunlearn.localize.sites import passes, resolution
from mechunlearn.metrics import Metric, checked
from mechunlearn.model import Model, Run, base_run, continued, preserved, shape, slots
from mechunlearn.model.classes import at_least_float32
from mechunlearn.model.edges import behind_post_norms, contributions, edges_of, heads_are_tied
from mechunlearn.model.matrices import attention_change
from mechunlearn.model.norms import input_norm
from mechunlearn.model.running import computed_in
from mechunlearn.model.suffix import through_layer
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts


@with_options()
def edge_patching(
    model: Model,
    prompts: Prompts,
    *,
    batch_size: int = 256,
    prompts_at_once: int = 8,
    **options: Unpack[ExactEdgeOptions],
) -> EdgeScores:
    r"""The exact effect of patching each edge alone.

        score(u -> v) = mean over prompts of metric(x, v reads r_v + a_u(x') - a_u(x)) - metric(x)

    in the metric's unit, where r_v is the residual stream as v alone reads it (before its norm) and a_u what u adds to
    it; nothing else about x is changed. In Gemma 2 a norm follows attention: there a_u(x') - a_u(x) is what the norm's
    output gains when head u alone is that of x', as in `path_patching`. Errors are those of
    `edge_attribution_patching`, which is this effect's first-order estimate.

    Cost: for an edge into layer l, the MLP of layer l and the layers above it (of the last one only its attention and,
    at the answers' positions, the rest). One pass of a layer's attention serves a source's edges to all of its heads.
    `batch_size` counts rows of one pass, which copies of a prompt for several edges share. Memory: what the sources of
    `prompts_at_once` prompts add to the residual stream.

    Hanna et al. 2024, https://arxiv.org/abs/2403.17806 (by one full pass for each edge).
    """
    metric, direction = options["metric"], options["direction"]
    check(direction, min(batch_size, prompts_at_once), metric=metric)
    clean = prompts.on(model)
    chosen = edges_of(model, options["edges"])
    patched = clean if direction == "noising" else clean.exchanged()
    with preserved(model), computed_in(model, options["compute_dtype"]), torch.no_grad():
        rows = [_batch_effects(model, p, metric, chosen, batch_size).cpu() for p in patched.batches(prompts_at_once)]
    effects = torch.cat(rows)
    limit = resolution(model, patched, metric, options["compute_dtype"], prompts_at_once)
    settings = settings_of(options, prompts, batch_size=batch_size, **limit)
    return EdgeScores(effects.mean(0), chosen, shape(model), "edge_patching", name_of(metric), settings, effects)


@dataclass(frozen=True, eq=False)
class _Base:
    model: Model
    prompts: Prompts
    run: Run
    change: Float[Tensor, "source batch pos d_model"]
    chosen: Bool[Tensor, "source destination"]
    column: dict[Destination, int]
    batch_size: int
    """Rows of one pass."""

    def passes(self, columns: list[int]) -> Iterator[tuple[Int[Tensor, "row"], Int[Tensor, "row"]]]:
        """All combinations of the prompts and the sources of edges into these destinations: a row's source, prompt."""
        sources = self.chosen[:, columns].any(1).nonzero()[:, 0].to(self.change.device)
        if len(sources):
            for place, row in passes([len(sources), len(self.prompts)], self.batch_size, sources.device):
                yield sources[place], row


def _batch_effects(
    model: Model, prompts: Prompts, metric: Metric, chosen: Bool[Tensor, "source destination"], batch_size: int
) -> Float[Tensor, "prompt source destination"]:
    sizes = shape(model)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(sizes.n_layers)]
    run = base_run(model, prompts.tokens, prompts.attention_mask, prompts.positions, names=names)
    own, other = outputs_of_sources(model, prompts), outputs_of_sources(model, prompts.corrupted())
    change = contributions(model, replace(other.minus(own, prompts.attention_mask), attention={}))
    change = behind_post_norms(model, change, run.attention)
    column: dict[Destination, int] = {end: place for place, end in enumerate(destinations(sizes))}
    base = _Base(model, prompts, run, change, chosen, column, batch_size)
    unpatched = checked(metric, run.logits, prompts).double()
    effects = unpatched.new_zeros(len(prompts), *chosen.shape)
    with tqdm(total=int(chosen.sum()), desc="edge patching", unit="edge", leave=False, disable=None) as bar:
        for source, destination, row, logits in _patched_rows(base, sizes):
            values = checked(metric, logits, prompts.rows(row)).double()
            effects[row, source, destination] = values - unpatched[row]
            bar.update(len(row) / len(prompts))
    return effects


PatchedRows: TypeAlias = tuple[
    Int[Tensor, "row"], Int[Tensor, "row"], Int[Tensor, "row"], Float[Tensor, "row answer d_vocab"]
]
"""Source, destination and prompt of each row, and its logits."""


def _patched_rows(base: _Base, sizes: ModelShape) -> Iterator[PatchedRows]:
    for layer in range(sizes.n_layers):
        for matrix in ("W_Q", "W_K", "W_V"):
            yield from _into_heads(base, sizes, layer, matrix)
        yield from _into_mlp(base, layer)
    # Nothing comes after the logits, so the change enters the final norm with the residual stream.
    column = base.column["logits"]
    for source, row in base.passes([column]):
        residual = base.run.residuals[sizes.n_layers][row] + base.change[source, row]
        logits = continued(base.model, base.run, row, sizes.n_layers, residual=residual)
        yield source, torch.full_like(source, column), row, logits


def _into_mlp(base: _Base, layer: int) -> Iterator[PatchedRows]:
    """The change enters the layer, whose attention is held, and is subtracted again behind the MLP."""
    column = base.column[Component(layer, "MLP")]
    for source, row in base.passes([column]):
        change, attention = base.change[source, row], base.run.attention[layer][row]
        residual = base.run.residuals[layer][row] + change
        leaving, _ = through_layer(base.model, base.run, row, layer, residual=residual, attention=attention)
        logits = continued(base.model, base.run, row, layer + 1, residual=leaving - change)
        yield source, torch.full_like(source, column), row, logits


def _into_heads(base: _Base, sizes: ModelShape, layer: int, matrix: str) -> Iterator[PatchedRows]:
    """Edges into one matrix of all heads of a layer.

    Heads of one layer do not act on each other. So one pass of the attention, in which all of them read a source's
    change, gives what each would add if it alone had read it; then each edge continues from there by itself.
    """
    group = sizes.n_heads // sizes.units(matrix)
    columns = [base.column[Component(layer, "H", head, matrix)] for head in range(0, sizes.n_heads, group)]
    for source, row in base.passes(columns):
        added = _attention_changes(base, sizes, layer, matrix, source, row)
        pairs = base.chosen[:, columns].to(source.device)[source].nonzero()
        for pair in pairs.split(base.batch_size):
            copy, unit = pair.unbind(1)
            attention = base.run.attention[layer][row[copy]] + added(copy, unit)
            logits = continued(base.model, base.run, row[copy], layer, attention=attention)
            yield source[copy], torch.tensor(columns, device=unit.device)[unit], row[copy], logits


def _attention_changes(
    base: _Base, sizes: ModelShape, layer: int, matrix: str, source: Int[Tensor, "copy"], row: Int[Tensor, "copy"]
) -> Callable[[Int[Tensor, "pair"], Int[Tensor, "pair"]], Float[Tensor, "pair pos d_model"]]:
    """What the attention's output gains when a unit of the matrix alone reads the change of its copy's source."""
    # The change of the queries, keys or values if all heads read the source's change: biases drop out.
    residual = base.run.residuals[layer][row]
    norm = input_norm(base.model, layer)
    difference = norm.without_bias(residual + base.change[source, row]) - norm.without_bias(residual)
    reading = slots(base.model)[layer, matrix].weight.to(difference.dtype)
    projected = einsum(difference, reading, "copy pos d, unit width d -> copy pos unit width")
    name, units = f"blocks.{layer}.attn.hook_z", sizes.units(matrix)

    def moved(rows: Int[Tensor, "any"], added: Tensor) -> Tensor:
        hook = (f"blocks.{layer}.attn.hook_{matrix[-1].lower()}", lambda value, hook: value + added.to(value.dtype))
        _, values = through_layer(base.model, base.run, rows, layer, hooks=[hook], names=[name], with_mlp=False)
        return at_least_float32(values[name]) - base.run.values[name][rows]

    def alone(copy: Int[Tensor, "pair"], unit: Int[Tensor, "pair"]) -> Tensor:
        rows, own = row[copy], torch.nn.functional.one_hot(unit, units)[:, None, :, None]
        change = moved(rows, projected[copy] * own)
        return attention_change(base.model, layer, base.run.values[name][rows], change)

    if heads_are_tied(base.model, base.run, layer, matrix):
        return alone
    # Query heads that share a KV head change together: their z and W_O are seen as one unit's.
    change = moved(row, projected).unflatten(2, (units, -1)).flatten(3)
    weight = at_least_float32(slots(base.model)[layer, "W_O"].weight).unflatten(0, (units, -1)).flatten(1, 2)
    return lambda copy, unit: torch.bmm(change[copy, :, unit], weight[unit])
