"""Edge attribution patching: the effect of patching every edge, estimated by one gradient."""

from collections.abc import Iterable

from mechunlearn.components import Edge, EdgeScores
from mechunlearn.localize.edge_gradients import add_run, edge_scores, written
from mechunlearn.localize.sites import Direction
from mechunlearn.metrics import Metric, logit_difference
from mechunlearn.model import Model
from mechunlearn.model.input_gradients import InputGradients
from mechunlearn.model.residual_sources import Written
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
