"""Components whose output is close to its mean, whatever the text: mean ablation, as far as weights can do it."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.components import Component, ComponentMask
from mechunlearn.edit.editor import repeatable
from mechunlearn.model import Model, device_of, fingerprint, logits_at, preserved, recording, shape, site
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, Entries, read, select


@repeatable
def mean_ablated(
    model: Model, task: Task, mask: ComponentMask, *, shrinkage: float = 0.01, batch_size: int = 16
) -> Edit:
    """Heads, MLPs and neurons of `mask` that add nearly the same to the residual stream everywhere: their mean.

    A constant output needs a bias. Biases belong to no component, and most architectures have none where it would be
    needed, so no edit of weights is a mean ablation. This is the nearest one. With a the activations that the mask's
    heads (or neurons) of a layer give to W_O (or W_out), W their rows of it and m = E[a] over `task.text`, the rows
    become

        u (m W), with u = (E[a a^T] + shrinkage * mean of its diagonal * identity)^-1 m

    which makes E |a W' - m W|^2 smallest but for the shrinkage: a linear map that gives nearly 1 on every token, times
    the mean output. How nearly is in the provenance, under `explained`, for each matrix: 1 - E (a u - 1)^2 on
    `task.text_test`, the share of the mean output that is reached, where 1 is mean ablation and 0 as far from it as
    `zeroed`. A whole MLP comes close. A single neuron does not: its row shrinks by E[a]^2 / E[a^2]. The mask's other
    matrices are left alone. Exact mean ablation for measurements, by hooks: `localize.faithfulness`.

    In a model with norms after the layer (Gemma 2) it is the mean before that norm. Cost: 1F of both texts, and for
    each matrix its number of covered rows squared in float64. ValueError for a mask without W_O and W_out.
    """
    entries = [e for e in select(model, mask) if e.slot.matrix in ("W_O", "W_out")]
    if not entries:
        raise ValueError(f"expected a mask with a W_O or a W_out, got {mask!r}: use heads, MLPs or neurons.")
    values, explained = read(select(model, mask)), {}
    with preserved(model), torch.no_grad():
        moments = _moments(model, task.text, entries, batch_size)
        maps = {label: _nearly_one(*found, shrinkage) for label, found in moments.items()}
        for e in entries:
            (mean, _), weight = moments[e.label], values[e.label]
            output = mean @ weight.flatten(0, 1).double()
            values[e.label] = torch.outer(maps[e.label], output).view_as(weight).to(weight.dtype)
        for label, (mean, square) in _moments(model, task.text_test, entries, batch_size).items():
            u = maps[label]
            explained[label] = float(2 * mean @ u - u @ square @ u)
    provenance = {"editor": "mean_ablated", "task": task.name, "shrinkage": shrinkage, "explained": explained}
    return Edit(mask, values, fingerprint(model), provenance)


def _nearly_one(mean: Float[Tensor, "n"], square: Float[Tensor, "n n"], shrinkage: float) -> Float[Tensor, "n"]:
    """u, such that a @ u is as near to 1 as a linear map of the activations comes."""
    ridge = shrinkage * square.diagonal().mean() * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    return torch.linalg.lstsq(square + ridge, mean[:, None]).solution[:, 0]


def _moments(
    model: Model, text: Int[Tensor, "row pos"], entries: Sequence[Entries], batch_size: int
) -> dict[str, tuple[Float[Tensor, "_"], Float[Tensor, "_ _"]]]:
    """E[a] and E[a a^T] over all tokens of the text."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for label, found in _activations(model, text, entries, batch_size):
        mean, square = sums.get(label, (0, 0))
        sums[label] = mean + found.sum(0), square + found.T @ found
    return {label: (mean / text.numel(), square / text.numel()) for label, (mean, square) in sums.items()}


def _activations(
    model: Model, text: Int[Tensor, "row pos"], entries: Sequence[Entries], batch_size: int
) -> Iterator[tuple[str, Float[Tensor, "token _"]]]:
    """Batch by batch, what the covered heads or neurons give to their rows of each matrix."""
    parts = {e.label: Component(e.slot.layer, "H" if e.slot.matrix == "W_O" else "N", 0) for e in entries}
    names = {label: site(part, shape(model)) for label, part in parts.items()}
    for rows in text.to(device_of(model)).split(batch_size):
        last = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        with recording(model, list(names.values())) as found:
            logits_at(model, rows, torch.ones_like(rows, dtype=torch.bool), last)
        for e in entries:
            value = found[names[e.label]].flatten(0, 1)
            yield e.label, value[:, e.units.to(value.device)].flatten(1).double()
