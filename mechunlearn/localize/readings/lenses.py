"""Lenses: each component's direct contribution to the answer, and the answer read off after each layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.arguments import check_batch_size, chosen_components
from mechunlearn.components import Component, Components, ComponentScores, heads_and_mlps
from mechunlearn.components.plot import lines
from mechunlearn.curve import Curve
from mechunlearn.files import Saved
from mechunlearn.model import Model, preserved, shape
from mechunlearn.model.classes import at_least_float32
from mechunlearn.model.running import linear_in_chunks, unembedded
from mechunlearn.model.suffix import Run, base_run
from mechunlearn.model.writers import (
    check_written,
    final_norm,
    unembedding,
    unembedding_bias,
    writing_sites,
    written,
    written_along,
)
from mechunlearn.tasks.prompts import Prompts

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


def direct_logit_attribution(
    model: Model, prompts: Prompts, *, components: Components = heads_and_mlps, batch_size: int = 64
) -> ComponentScores:
    """Each component's direct contribution to the logit difference, in nats: positive favours the answer.

        score = mean over prompts of W(output of the component at the last token) . (u_answer - mean of u_others)

    with u the columns of the unembedding and W the final norm with its scale held at the run's value, so that
    contributions add up. Without candidates, the logit of the answer is split up. In a model with post-norms (Gemma 2)
    a head's output is that after the post-norm, whose scale is held as well.

    `settings` has the means of the `logit_difference` (or `answer_logit`), before a final soft-cap, and of the
    `remainder`: that minus the sum of the scores. For `heads_and_mlps` or `layers`, the remainder is what embeddings
    and biases contribute (those of the final norm, the unembedding and, for heads, the attention's output; an MLP's is
    part of its output). Components that overlap are subtracted several times.

    A component that acts only through later ones scores about zero, however much the answer depends on it.

    Components: heads (or W_O), attention layers, MLPs (or W_out), neurons. Cost: 1F.
    Elhage et al. 2021, https://transformer-circuits.pub/2021/framework; nostalgebraist 2020 (logit lens).
    """
    check_batch_size(batch_size)
    sizes = shape(model)
    chosen = chosen_components(components, sizes)
    writing_sites(chosen)
    prompts = prompts.on(model)
    check_written(model, chosen)
    longest = int(prompts.answer_mask.sum(1).max())
    if longest > 1:
        raise ValueError(
            f"expected answers of one token, got up to {longest}: the direct contribution to a longer "
            f"answer is not a sum over components; keep its first token."
        )
    with preserved(model), torch.no_grad():
        pieces = [_contributions(model, batch, chosen) for batch in prompts.batches(batch_size)]
    per_prompt = torch.cat([scores for scores, _ in pieces]).cpu().double()
    totals = torch.cat([total for _, total in pieces]).cpu().double()
    split = "logit_difference" if prompts.candidates is not None else "answer_logit"
    remainder = float((totals - per_prompt.sum(1)).mean())
    settings = {split: float(totals.mean()), "remainder": remainder, "batch_size": batch_size}
    return ComponentScores(chosen, per_prompt.mean(0), sizes, "direct_logit_attribution", split, settings, per_prompt)


def _contributions(
    model: Model, batch: Prompts, components: tuple[Component, ...]
) -> tuple[Float[Tensor, "batch component"], Float[Tensor, "batch"]]:
    """The scores, and the logit difference (or logit) that they and the remainder add up to."""
    run = base_run(model, batch.tokens, batch.attention_mask, batch.positions, names=writing_sites(components))
    places = batch.positions[:, 0]
    # With its scale held the final norm is linear, so the direction that the logits read can be taken back through it:
    # then a contribution is a dot product with what a component adds to the residual stream.
    norm = final_norm(model, run, places)
    read = _difference(unembedding(model).T, batch).to(norm.scale.dtype)
    direction = norm.transposed(read[:, None])[:, 0]
    scores = _written_columns(model, run, components, places, direction)
    residual = run.residuals[-1][torch.arange(len(places), device=places.device), places]
    bias = read @ norm.norm.bias + _difference(unembedding_bias(model), batch).to(read.dtype)
    return scores, (residual.to(read.dtype) * direction).sum(-1) + bias


def _written_columns(
    model: Model, run: Run, components: tuple[Component, ...], places: Tensor, direction: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "batch component"]:
    """Dot products of the direction with what each component writes: all of a layer's heads or neurons at once."""
    units: dict[tuple[int, str], Tensor] = {}
    columns = []
    for component in components:
        key = (component.layer, component.part)
        if key not in units:
            units[key] = written_along(model, run, component, places, direction)
        columns.append(units[key][:, component.index or 0])
    return torch.stack(columns, 1)


def _difference(values: Float[Tensor, "d_vocab *rest"], batch: Prompts) -> Float[Tensor, "batch *rest"]:
    """The answer's value minus the mean of the other candidates'; the answer's alone without candidates."""
    if batch.candidates is None:
        return at_least_float32(values[batch.answers[:, 0]])
    chosen = at_least_float32(values[batch.candidates])
    return chosen[:, 0] - chosen[:, 1:].mean(1)


def logit_lens(model: Model, prompts: Prompts, *, components: Components = (), batch_size: int = 64) -> "LogitLens":
    """The final norm and the unembedding applied, at the prompt's last token, to what enters each layer.

    The last point is the model itself, soft-cap included. `components` are read alone, with the final norm's scale held
    at the run's value (as in `direct_logit_attribution`), without biases and soft-cap. Of an answer of several tokens,
    the first counts. Early layers need not write in the basis that the unembedding reads: where a lens shows nothing,
    probes may find something.

    Cost: 1F, and one unembedding at one token per prompt and point.
    nostalgebraist 2020, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens.
    """
    check_batch_size(batch_size)
    sizes = shape(model)
    chosen = chosen_components(components, sizes) if components != () else ()
    writing_sites(chosen)
    if chosen:
        check_written(model, chosen)
    batches = prompts.on(model).batches(batch_size)
    with preserved(model), torch.no_grad():
        values = torch.cat([_measured(model, batch, chosen) for batch in batches]).cpu().double()
    points = (*(str(layer) for layer in range(sizes.n_layers + 1)), *(str(component) for component in chosen))
    return LogitLens(points, values[..., 0], values[..., 1], None if prompts.candidates is None else values[..., 2])


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Saved):
    """How well each point of the model, read as if it were the last, knows the first token of the answer."""

    points: tuple[str, ...]
    """"3" is the residual stream that enters layer 3, the last number the final one; then the components."""
    log_probability: Float[Tensor, "prompt point"]
    """Log-probability of the answer over the vocabulary, in nats."""
    rank: Float[Tensor, "prompt point"]
    """How many tokens have a higher logit than the answer: 0 is the top."""
    logit_difference: Float[Tensor, "prompt point"] | None = None
    """The answer's logit minus the mean of the other candidates', in nats; None without candidates."""

    @property
    def probability(self) -> Float[Tensor, "prompt point"]:
        """Probability of the answer over the vocabulary."""
        return self.log_probability.exp()

    def curves(self) -> dict[str, Curve]:
        """Each quantity, with intervals over prompts."""
        curves = {
            "log_probability": Curve(self.points, self.log_probability, "log-probability of the answer, nats"),
            "probability": Curve(self.points, self.probability, "probability of the answer", limits=(0.0, 1.0)),
            "rank": Curve(self.points, self.rank, "rank of the answer (0 is the top)"),
        }
        if self.logit_difference is not None:
            curves["logit_difference"] = Curve(self.points, self.logit_difference, "logit difference, nats")
        return curves

    def to_frame(self) -> "DataFrame":
        """Means over prompts: one row per point, one column per quantity."""
        import pandas as pd

        columns = {name: curve.mean.tolist() for name, curve in self.curves().items()}
        return pd.DataFrame(columns, index=pd.Index(self.points, name="point"))

    def plot(self) -> "Figure":
        """Log-probability of the answer by layer, with its interval over prompts."""
        return lines({"answer": self.curves()["log_probability"]}, title=f"logit lens, {len(self.rank)} prompts")

    def __repr__(self) -> str:
        return f"LogitLens({len(self.rank)} prompts; {self.curves()['log_probability']})"


def _measured(model: Model, batch: Prompts, components: tuple[Component, ...]) -> Float[Tensor, "batch point quantity"]:
    """Log-probability, rank and logit difference (if there are candidates) at every point."""
    run = base_run(model, batch.tokens, batch.attention_mask, batch.positions, names=writing_sites(components))
    places = batch.positions[:, 0]
    rows = torch.arange(len(places), device=places.device)
    points = [unembedded(model, residual[rows, places]) for residual in run.residuals]
    for component in components:
        normed = final_norm(model, run, places)(written(model, run, component, places)[:, None])[:, 0]
        points.append(linear_in_chunks(normed, unembedding(model).T, None))
    return torch.stack([_quantities(logits.float(), batch) for logits in points], 1)


def _quantities(logits: Float[Tensor, "batch d_vocab"], batch: Prompts) -> Float[Tensor, "batch quantity"]:
    answer = batch.answers[:, :1]
    log_probability = logits.log_softmax(-1).gather(1, answer)
    rank = (logits > logits.gather(1, answer)).sum(1, keepdim=True)
    quantities = [log_probability, rank.float()]
    if batch.candidates is not None:
        chosen = logits.gather(1, batch.candidates)
        quantities.append(chosen[:, :1] - chosen[:, 1:].mean(1, keepdim=True))
    return torch.cat(quantities, 1)
