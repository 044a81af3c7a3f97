"""Weight saliency: how much a loss depends on each weight, summed over a component's weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.arguments import check_batch_size, check_functions, chosen_components
from mechunlearn.components import Component, Components, ComponentScores, ModelShape, heads_and_mlps
from mechunlearn.identity import name_of
from mechunlearn.losses import Loss, cross_entropy, needs
from mechunlearn.model import Model, Slot, check_editable, differentiable, shape, slots
from mechunlearn.tasks.prompts import Prompts

Key: TypeAlias = tuple[int, str]
"""A layer and one of its matrices."""


def gradient_times_weight(
    model: Model, prompts: Prompts, *, loss: Loss = cross_entropy, components: Components = heads_and_mlps
) -> ComponentScores:
    """Sum over a component's weights of d loss / d w * w, averaged over prompts.

    Unit: nats. To first order, the score is minus the rise of the loss if the weights were scaled to zero: negative =
    the component's weights keep the loss low, positive = the loss would fall without them. The loss of a prompt is
    the mean over its answer tokens.

    Cost: 1F + 1B (of weights) per prompt, one prompt at a time. Weights that KV heads share count in every query
    head that reads them, once each. ValueError for processed or quantised weights.
    """
    name = "gradient_times_weight"
    return _per_prompt(name, model, prompts, loss, components, lambda slot, g: g * slot.parameter.detach())


def fisher(
    model: Model, prompts: Prompts, *, loss: Loss = cross_entropy, components: Components = heads_and_mlps
) -> ComponentScores:
    """Sum over a component's weights of (d loss / d w)^2, averaged over prompts: the empirical Fisher diagonal.

    Never negative, in nats^2; high = the component's weights matter for these answers. Each prompt's own gradient is
    squared (the square of a batch's mean gradient would be another, smaller number).

    Cost: 1F + 1B (of weights) per prompt. Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796. Shared KV
    weights and errors: as `gradient_times_weight`.
    """
    return _per_prompt("fisher", model, prompts, loss, components, lambda slot, gradient: gradient**2)


def snip(
    model: Model,
    prompts: Prompts,
    *,
    loss: Loss = cross_entropy,
    components: Components = heads_and_mlps,
    batch_size: int = 16,
) -> ComponentScores:
    """Sum over a component's weights of |d mean loss / d w * w|: the connection sensitivity, unnormalised.

    Never negative, in nats; high = scaling the component's weights, one by one, would change the loss. Sizes
    are taken after averaging the gradient over all prompts, so there are no per-prompt values.

    Cost: 1F + 1B (of weights) per batch. Lee et al. 2019, https://arxiv.org/abs/1810.02340 (who divide by
    the sum over all weights: the same ranking). Shared KV weights and errors: as `gradient_times_weight`.
    """
    with _covered_weights(model, components) as (weights, chosen, sizes):
        mean = _mean_gradients(model, prompts, loss, weights, batch_size)
        sums = {key: _unit_sums(slot, (mean[key] * slot.parameter.detach()).abs()) for key, slot in weights.items()}
    settings = {"loss": name_of(loss), "prompts": len(prompts), "batch_size": batch_size}
    return ComponentScores(chosen, _summed(sums, chosen, sizes), sizes, "snip", name_of(loss), settings)


def wagle(
    model: Model,
    forget: Prompts,
    retain: Prompts,
    *,
    forget_loss: Loss = cross_entropy,
    retain_loss: Loss = cross_entropy,
    gamma: float = 1e-6,
    components: Components = heads_and_mlps,
    batch_size: int = 16,
) -> ComponentScores:
    r"""WAGLE's attribution of weights to unlearning, as sizes summed over a component's weights.

    With g_f and g_r the gradients of the mean forget and retain losses, weight i of value w scores

        S_i = w_i * g_f,i - g_r,i * g_f,i / gamma = (w_i - g_r,i / gamma) * g_f,i

    The first term is the rise of the forget loss without the weight, the second what following the retain gradient
    undoes of it; gamma stands for the curvature of the retain loss, a multiple of the identity. A component scores the
    sum of |S_i|: never negative, high = the weights that WAGLE would let an unlearning step change. The score is the
    same whether `forget_loss` is to rise or to fall. The default gamma is that of the released TOFU configuration; it
    is so small that the second term decides.

    Cost: 1F + 1B (of weights) per batch of either side. Jia et al. 2024, https://arxiv.org/abs/2410.17509. Shared KV
    weights, losses and errors: as `gradient_times_weight`; ValueError for gamma <= 0. No per-prompt values.
    """
    if not gamma > 0:
        raise ValueError(f"expected a positive gamma (a curvature of the retain loss), got {gamma}.")
    sums = {}
    with _covered_weights(model, components) as (weights, chosen, sizes):
        forgetting = _mean_gradients(model, forget, forget_loss, weights, batch_size)
        retaining = _mean_gradients(model, retain, retain_loss, weights, batch_size)
        for key, slot in weights.items():
            sums[key] = _unit_sums(slot, ((slot.parameter.detach() - retaining[key] / gamma) * forgetting[key]).abs())
    settings = {"forget_loss": name_of(forget_loss), "retain_loss": name_of(retain_loss), "gamma": gamma}
    settings |= {"forget_prompts": len(forget), "retain_prompts": len(retain), "batch_size": batch_size}
    return ComponentScores(chosen, _summed(sums, chosen, sizes), sizes, "wagle", name_of(forget_loss), settings)


@contextmanager
def _covered_weights(
    model: Model, components: Components
) -> Iterator[tuple[dict[Key, Slot], tuple[Component, ...], ModelShape]]:
    """Inside, the parameters that the components cover are differentiable; gives them, the components and the shape."""
    check_editable(model)
    sizes = shape(model)
    chosen = chosen_components(components, sizes)
    covered = sizes.entries(chosen)
    weights = {key: slot for key, slot in slots(model).items() if key in covered}
    with differentiable(model):
        for slot in weights.values():
            slot.parameter.requires_grad_(True)
        yield weights, chosen, sizes


def _per_prompt(
    name: str, model: Model, prompts: Prompts, loss: Loss, components: Components, score: Callable[..., Tensor]
) -> ComponentScores:
    """`score(slot, gradient of one prompt)` summed over each component's weights; the mean over prompts."""
    rows = []
    with _covered_weights(model, components) as (weights, chosen, sizes):
        for prompt in prompts.on(model).batches(1):
            gradients = _gradients(model, prompt, loss, weights)
            sums = {key: _unit_sums(slot, score(slot, gradients[key])) for key, slot in weights.items()}
            rows.append(_summed(sums, chosen, sizes))
    per_prompt = torch.stack(rows)
    settings = {"loss": name_of(loss), "prompts": len(prompts)}
    return ComponentScores(chosen, per_prompt.mean(0), sizes, name, name_of(loss), settings, per_prompt)


def _mean_gradients(
    model: Model, prompts: Prompts, loss: Loss, weights: dict[Key, Slot], batch_size: int
) -> dict[Key, Tensor]:
    check_batch_size(batch_size)
    total: dict[Key, Tensor] = {}
    for batch in prompts.on(model).batches(batch_size):
        for key, gradient in _gradients(model, batch, loss, weights).items():
            total[key] = total[key] + gradient / len(prompts) if key in total else gradient / len(prompts)
    return total


def _gradients(model: Model, prompts: Prompts, loss: Loss, weights: dict[Key, Slot]) -> dict[Key, Tensor]:
    """The gradient of the sum over prompts of the mean over each one's answer tokens."""
    check_functions(loss=loss)
    if not {*needs(loss)} <= {"logits", "targets"}:
        raise ValueError(
            f"expected a loss of logits and targets, got {name_of(loss)} of {', '.join(needs(loss))}: use "
            f"losses.cross_entropy, or another that needs no unedited model."
        )
    real = prompts.answer_mask
    losses = loss(prompts.logits(model)[real], prompts.answers[real])
    if not losses.requires_grad:
        raise ValueError(
            f"expected a loss with a gradient, got one without from {name_of(loss)}: an argmax or a detached tensor "
            f"has none; use mu.losses.cross_entropy."
        )
    share = (1 / real.sum(1, keepdim=True)).expand(real.shape)[real]
    parameters = [slot.parameter for slot in weights.values()]
    gradients = torch.autograd.grad((losses * share).sum(), parameters, allow_unused=True)
    for (layer, matrix), gradient in zip(weights, gradients, strict=True):
        if gradient is None:
            raise ValueError(
                f"expected a loss that depends on L{layer} {matrix}, but {name_of(loss)} has no gradient there: it "
                f"must be computed from the logits that it is given."
            )
    precise = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
    return dict(zip(weights, precise, strict=True))


def _unit_sums(slot: Slot, values: Tensor) -> Float[Tensor, "unit"]:
    return slot.view(values).double().sum((1, 2)).cpu()


def _summed(
    sums: Mapping[Key, Float[Tensor, "unit"]], components: Iterable[Component], sizes: ModelShape
) -> Float[Tensor, "component"]:
    columns = []
    for component in components:
        parts = [sums[component.layer, matrix][units].sum() for matrix, units in sizes.units_of(component).items()]
        columns.append(torch.stack(parts).sum())
    return torch.stack(columns)
