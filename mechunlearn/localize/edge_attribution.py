"""Edge attribution: the effect of patching every edge, estimated by one gradient or by several on the way."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.components import Edge, EdgeScores, ModelShape, destinations
from mechunlearn.components.edge import edge_mask
from mechunlearn.identity import name_of
from mechunlearn.localize.sites import Direction, differentiated, given, gradients_from_here, pairs, recorded
from mechunlearn.metrics import Metric, logit_difference
from mechunlearn.model import Hook, Model, differentiable, shape
from mechunlearn.model.edge_runs import InputGradients
from mechunlearn.model.edges import Written, contributions, edges_of, head_readers, is_parallel, reading, writing
from mechunlearn.tasks.prompts import Prompts


def edge_attribution_patching(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Direction = "noising",
    edges: Iterable[Edge | str] | None = None,
    batch_size: int | None = None,
    per_prompt: bool = True,
) -> EdgeScores:
    r"""A first-order estimate of patching every edge of the model, each alone.

    An edge is patched when one destination v reads what source u adds in the run x', and everything else reads what
    it adds in the run x. With a_u what u adds to the residual stream and r_v the copy of it that v reads (before v's
    norm),

        score(u -> v) = mean over prompts of the sum over positions and d of
                        (a_u(x') - a_u(x)) * d metric / d r_v at x

    in the metric's unit.

    - `"noising"`: x is clean, x' corrupt. An edge that the answer needs scores *negative*.
    - `"denoising"`: x is corrupt, x' clean. An edge that carries the answer scores *positive*.

    Over all its destinations a source's scores sum to its `attribution_patching` (`EdgeScores.nodes()`). In Gemma 2 a
    norm follows attention, and what one head adds depends, through its scale, on all heads of the layer: a_u is taken
    with each run's own scale, so that heads sum to what their layer adds in either run. There the identity holds for
    MLPs and for attention layers (`L5ATTN`, the sum over its heads); a head's node attribution moves the scale
    with the head and differs.

    `edges`: all (default), or those wanted; it costs the same. Keys and values are destinations per KV head. Output
    biases belong to no source. `per_prompt=False` leaves out each prompt's scores, and with them intervals.

    Cost: 2F + 1B per batch and matrix products that grow as sources x destinations x d_model; no flag of
    TransformerLens is set. Memory: what the backward pass of `batch_size` prompts needs (about 40 floats per layer,
    position and d_model in GPT-2), 32 MiB of sources' contributions at a time, and the result. By default as many
    prompts make a batch as need about 65 MB (2 of 20 tokens in GPT-2 small, always one); a GPU wants more. The
    model is left as it was.

    Syed et al. 2023, https://arxiv.org/abs/2310.10348. ValueError without corrupted prompts, for an edge that the
    model does not have (in parallel blocks: from a head to its own layer's MLP), and for a model that is not
    the sum of its parts.
    """

    def parts(patched: Prompts, other: Prompts) -> list[tuple[Written, InputGradients]]:
        gradients = InputGradients(model, patched.attention_mask)
        there = written(model, other)
        here = add_run(gradients, model, patched, metric)
        return [(there.minus(here, patched.attention_mask), gradients)]

    options = direction, edges, batch_size, per_prompt
    return edge_scores(edge_attribution_patching, parts, model, prompts, metric, *options)


_EMBEDDING = "blocks.0.hook_resid_pre"


def edge_integrated_gradients(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Direction = "noising",
    steps: int = 5,
    edges: Iterable[Edge | str] | None = None,
    batch_size: int | None = None,
    per_prompt: bool = True,
) -> EdgeScores:
    r"""EAP-IG over inputs: `edge_attribution_patching` with the gradient averaged on the way between the two inputs.

    With e(x) the residual stream that enters layer 0,

        score(u -> v) = mean over prompts of the sum over positions and d of
            (a_u(x') - a_u(x)) * mean over k of d metric / d r_v at the input e(x) + (k + 1/2) / steps * (e(x') - e(x))

    k = 0 ... steps - 1; everything after layer 0's input runs freely. Sign, unit, arguments and errors as in
    `edge_attribution_patching`. The midpoint rule makes "noising" and "denoising" differ in sign alone; the authors'
    code takes left end points (the corrupt end included, the clean one not), which tend to the same as steps grow.
    Takes part where the gradient vanishes at both ends, as behind a saturated softmax. Over all its destinations a
    source's scores sum to its `integrated_gradients` (in Gemma 2: those of MLPs and attention layers).

    Cost: 2F + steps * (F + B) per batch; the products of EAP once, whatever the steps. Memory: as EAP, and per step
    one residual stream of every layer.

    Hanna et al. 2024, https://arxiv.org/abs/2403.17806. ValueError also for fewer than one step.
    """
    points = _midpoints(steps)

    def parts(patched: Prompts, other: Prompts) -> list[tuple[Written, InputGradients]]:
        here, there = written(model, patched), written(model, other)
        between = _between(_EMBEDDING, here.embed, there.embed, points)
        return [(there.minus(here, patched.attention_mask), _gradients(model, patched, metric, between))]

    options = direction, edges, batch_size, per_prompt
    settings = {"steps": steps, "rule": "midpoint"}
    return edge_scores(edge_integrated_gradients, parts, model, prompts, metric, *options, settings)


def edge_integrated_gradients_of_activations(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Direction = "noising",
    steps: int = 5,
    edges: Iterable[Edge | str] | None = None,
    batch_size: int | None = None,
    per_prompt: bool = True,
) -> EdgeScores:
    r"""EAP-IG over activations: the gradient averaged while one group of sources after the other is moved.

    The groups are the embedding, each layer's attention and each MLP, 2 * n_layers + 1 in all. In a run of the
    patched prompts the group's output is held at a(x) + (k + 1/2) / steps * (a(x') - a(x)), everything after it runs
    freely, and the gradients at *all* destinations are taken:

        score(u -> v) = mean over prompts of the sum over positions and d of
                        (a_u(x') - a_u(x)) * mean over groups and k of d metric / d r_v

    Averaging over all groups, also those that are not u, is what the authors' code does; it takes right end points
    (k + 1) / steps from the corrupt run, here midpoints. Sign, unit, arguments, memory and errors as in
    `edge_integrated_gradients`.

    Cost: 2F + steps * (2 * n_layers + 1) * (F + B) per batch.

    Hanna et al. 2024, https://arxiv.org/abs/2403.17806.
    """
    points = _midpoints(steps)
    layers = range(model.cfg.n_layers)
    names = [_EMBEDDING, *(f"blocks.{layer}.{name}" for layer in layers for name in ("hook_attn_out", "hook_mlp_out"))]

    def parts(patched: Prompts, other: Prompts) -> Iterator[tuple[Written, InputGradients]]:
        difference = written(model, other).minus(written(model, patched), patched.attention_mask)
        here, there = recorded(model, patched, names), recorded(model, other, names)
        for name in names:
            between = _between(name, here[name], there[name], points)
            yield difference, _gradients(model, patched, metric, between)

    options = direction, edges, batch_size, per_prompt
    settings = {"steps": steps, "rule": "midpoint"}
    return edge_scores(edge_integrated_gradients_of_activations, parts, model, prompts, metric, *options, settings)


def edge_clean_corrupted(
    model: Model,
    prompts: Prompts,
    *,
    metric: Metric = logit_difference,
    direction: Direction = "noising",
    edges: Iterable[Edge | str] | None = None,
    batch_size: int | None = None,
    per_prompt: bool = True,
) -> EdgeScores:
    r"""Edge attribution with the mean of the gradients in the two runs: the trapezoid rule with one step.

        score(u -> v) = mean over prompts of the sum over positions and d of
                        (a_u(x') - a_u(x)) * (d metric / d r_v at x + d metric / d r_v at x') / 2

    Sign, unit, arguments, memory and errors as in `edge_attribution_patching`. Cost: 2F + 2B per batch.

    Hanna et al. 2024, https://arxiv.org/abs/2403.17806 ("clean-corrupted").
    """

    def parts(patched: Prompts, other: Prompts) -> list[tuple[Written, InputGradients]]:
        gradients = InputGradients(model, patched.attention_mask)
        here = add_run(gradients, model, patched, metric)
        there = add_run(gradients, model, other, metric)
        return [(there.minus(here, patched.attention_mask), gradients)]

    options = direction, edges, batch_size, per_prompt
    return edge_scores(edge_clean_corrupted, parts, model, prompts, metric, *options)


def _gradients(model: Model, prompts: Prompts, metric: Metric, hooks: Iterable[Hook]) -> InputGradients:
    """Averaged over runs, each with one of the hooks."""
    gradients = InputGradients(model, prompts.attention_mask)
    for hook in hooks:
        add_run(gradients, model, prompts, metric, [hook])
    return gradients


def _between(name: str, here: Tensor, there: Tensor, points: list[float]) -> Iterator[Hook]:
    """For each point, a hook that puts a value on the way from here to there."""
    for point in points:
        yield given(name, torch.lerp(here, there, point))


def _midpoints(steps: int) -> list[float]:
    if steps < 1:
        raise ValueError(f"expected at least one step, got {steps}: 5 are usual, more are more exact.")
    return [(k + 0.5) / steps for k in range(steps)]


Parts: TypeAlias = Callable[[Prompts, Prompts], Iterable[tuple[Written, InputGradients]]]
"""(patched, other) -> pairs of what the sources' outputs differ by and the destinations' gradients."""

_TEMPORARY = 32 * 2**20
"""Bytes of sources' contributions to the residual stream at once."""

_ACTIVATIONS = 400_000
"""Entries of all layers' residual streams in a batch; a backward pass keeps about 40 times as many activations."""


def edge_scores(
    method: Callable[..., EdgeScores],
    parts: Parts,
    model: Model,
    prompts: Prompts,
    metric: Metric,
    direction: Direction,
    edges: Iterable[Edge | str] | None,
    batch_size: int | None,
    per_prompt: bool,
    settings: Mapping[str, Any] | None = None,
) -> EdgeScores:
    """The mean of the parts' products, for every edge and prompt, batch after batch."""
    sizes, chosen = shape(model), edges_of(model, edges)
    batch_size = _fitting(prompts, sizes) if batch_size is None else batch_size
    batches = pairs(model, prompts, metric, direction, batch_size)
    rows, total = [], torch.zeros(chosen.shape, dtype=torch.float64)
    with differentiable(model):
        for patched, other in batches:
            products = [_products(model, *part) for part in parts(patched, other)]
            scores = (sum(products[1:], products[0]) / len(products)).cpu().masked_fill(~chosen, 0.0)
            total += scores.double().sum(0)
            rows += [scores] if per_prompt else []
    known = {"direction": direction, "batch_size": batch_size, "prompts": len(prompts)} | dict(settings or {})
    kept = torch.cat(rows) if per_prompt else None
    name, label = name_of(metric), name_of(method)
    return EdgeScores(total / len(prompts), chosen, sizes, label, name, known, kept)


def _fitting(prompts: Prompts, sizes: ModelShape) -> int:
    return max(1, _ACTIVATIONS // (prompts.tokens.shape[1] * sizes.n_layers * sizes.d_model))


@torch.no_grad()
def written(model: Model, prompts: Prompts) -> Written:
    """What the sources write. 1F."""
    with writing(model) as result:
        prompts.logits(model)
    return result()


def add_run(
    gradients: InputGradients, model: Model, prompts: Prompts, metric: Metric, hooks: Iterable[Hook] = ()
) -> Written:
    """Adds the gradients of a run with these hooks, and gives what its sources wrote. 1F + 1B."""
    with writing(model) as result, reading(model) as read:
        values, _ = differentiated(model, prompts, metric, [], [*hooks, gradients_from_here()])
    found = torch.autograd.grad(values.sum(), read[0].tensors(), allow_unused=True)
    if found[-1] is None:
        raise ValueError(
            f"expected a metric that depends on the logits, but {name_of(metric)} has no gradient there: it must be "
            f"computed from the logits that it is given."
        )
    gradients.add(read[0], found)
    return result()


def _products(
    model: Model, difference: Written, gradients: InputGradients
) -> Float[Tensor, "batch source destination"]:
    """Summed over positions and d_model, in pieces: no tensor [batch, pos, source, d_model] is ever whole."""
    sizes, parallel = gradients.sizes, is_parallel(model)
    batch, places, width = difference.embed.shape
    n_sources = 1 + sizes.n_layers * (sizes.n_heads + 1)
    scores = difference.embed.new_zeros(batch, n_sources, len(destinations(sizes)))
    for rows, some in _pieces(batch, places, n_sources * width * scores.element_size()):
        sources = contributions(model, difference.at(rows, some))
        for columns, count, readers in _readers(gradients, sizes, rows, some, parallel):
            scores[rows, :count, columns] += _dot(sources[:count], readers)
    return scores


def _pieces(batch: int, places: int, size: int) -> Iterable[tuple[slice, slice]]:
    """Some prompts with all of their positions, or some positions of one prompt."""
    n_rows, n_places = max(1, _TEMPORARY // (size * places)), max(1, _TEMPORARY // size)
    for row in range(0, batch, n_rows):
        for place in range(0, places, n_places):
            yield slice(row, min(row + n_rows, batch)), slice(place, min(place + n_places, places))


def _readers(
    gradients: InputGradients, sizes: ModelShape, rows: slice, places: slice, parallel: bool
) -> Iterable[tuple[Int[Tensor, "destination"], int, Float[Tensor, "destination batch pos d_model"]]]:
    """Columns of the scores, how many of the sources they read, and the gradients there: layer after layer."""
    column = {destination: place for place, destination in enumerate(destinations(sizes))}
    counts = edge_mask(sizes, parallel=parallel).sum(0).tolist()
    for layer in range(sizes.n_layers):
        columns = [column[reader] for reader in head_readers(layer, sizes)]
        yield torch.tensor(columns), counts[columns[0]], gradients.at_heads(layer, rows, places)
        mlp = max(columns) + 1
        yield torch.tensor([mlp]), counts[mlp], gradients.at_mlp(layer, rows, places)
    yield torch.tensor([len(counts) - 1]), counts[-1], gradients.at_logits(rows, places)


def _dot(
    sources: Float[Tensor, "source batch pos d_model"], readers: Float[Tensor, "destination batch pos d_model"]
) -> Float[Tensor, "batch source destination"]:
    return torch.bmm(sources.flatten(2).transpose(0, 1), readers.flatten(2).permute(1, 2, 0))
