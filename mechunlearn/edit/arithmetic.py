"""Edits without training: set to zero, scale, combine, go the other way, dampen, ablate by the mean."""

import operator
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.components import Component, ComponentMask
from mechunlearn.edit.finetuning import finetune
from mechunlearn.identity import described, name_of
from mechunlearn.losses import Loss, cross_entropy, needs
from mechunlearn.model import (
    Model,
    device_of,
    differentiable,
    fingerprint,
    preserved,
    recording,
    shape,
    site,
)
from mechunlearn.model.running import check_length, logits_at
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, Entries, Values, exclusively, read, select


def zeroed(model: Model, mask: ComponentMask) -> Edit:
    """Every weight of the mask set to zero: the bluntest edit, and a check on what the others do better.

    A zeroed head or MLP adds its output bias and nothing else.
    """
    values = {label: torch.zeros_like(value) for label, value in read(select(model, mask)).items()}
    return Edit(mask, values, fingerprint(model), {"editor": "zeroed"})


def scaled(model: Model, edit: Edit, factor: float) -> Edit:
    """original + factor * (edited - original): task arithmetic on the edit's entries.

    A `factor` of -1 negates an edit that *learned* something (such as `finetune` with `forget_loss=cross_entropy`), to
    forget it. Between 0 and 1 it makes an edit milder; 1 gives the edit.

    Ilharco et al. 2023, https://arxiv.org/abs/2212.04089. ValueError for a model that the edit was not made for.
    """
    edit.check(model)
    before = read(select(model, edit.mask))
    values = {label: _moved(before[label], value, factor) for label, value in edit.values.items()}
    provenance = {"editor": "scaled", "factor": factor, "of": dict(edit.provenance)}
    return Edit(edit.mask, values, edit.fingerprint, provenance)


def combined(*edits: Edit) -> Edit:
    """Edits of one model as one edit. They may not share a weight, so that their order does not matter.

    To let a later edit build on an earlier one, apply the earlier one first and make the later one on the edited model.
    ValueError for edits of different models, or that set the same weights: make them on masks that do not overlap.
    """
    models = sorted({edit.fingerprint for edit in edits})
    if len(models) != 1:
        raise ValueError(
            f"expected edits of one model, got fingerprints {models or 'of none'}: make them all on the same weights."
        )
    mask = edits[0].mask
    for edit in edits[1:]:
        _check_apart(mask, edit.mask)
        mask = mask | edit.mask
    values: Values = {}
    for (layer, matrix), units in mask.shape.entries(mask).items():
        label = f"L{layer}.{matrix}"
        parts = [(e.mask.shape.entries(e.mask)[layer, matrix], e.values[label]) for e in edits if label in e.values]
        whole = parts[0][1].new_zeros(len(units), *parts[0][1].shape[1:])
        for own, value in parts:
            whole[own] = value
        values[label] = whole[units]
    provenance = {"editor": "combined", "of": [dict(edit.provenance) for edit in edits]}
    return Edit(mask, values, edits[0].fingerprint, provenance)


def _moved(before: Tensor, after: Tensor, factor: float) -> Tensor:
    """Computed in at least float32 and rounded once; a factor of 1 gives `after` exactly."""
    if factor == 1.0:
        return after.clone()
    precise = torch.promote_types(before.dtype, torch.float32)
    start = before.to(precise)
    return (start + factor * (after.to(start) - start)).to(torch.promote_types(before.dtype, after.dtype))


def _check_apart(first: ComponentMask, second: ComponentMask) -> None:
    covered = first.shape.entries(first)
    shared = [
        f"L{layer}.{matrix}"
        for (layer, matrix), units in second.shape.entries(second).items()
        if (layer, matrix) in covered and bool((covered[layer, matrix] & units).any())
    ]
    if shared:
        raise ValueError(
            f"expected edits that share no weight, got some that both set entries of {', '.join(shared[:5])}: make "
            f"them on masks that do not overlap, or one after the other on the edited model."
        )


learned_further = partial(finetune, forget_loss=cross_entropy, retain_coefficient=0.0, text_coefficient=0.0)
"""`finetune` on the forget set alone, with cross-entropy to its true answers."""


def task_vector(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    strength: float = 1.0,
    learn: Callable[[Model, Task, ComponentMask], Edit] = learned_further,
) -> Edit:
    """original - strength * (learned - original): the change that learning the forget set makes in `mask`, negated.

    `learn` is the editor that learns, such as `partial(learned_further, steps=100, learning_rate=1e-4)`. `scaled`
    negates an edit that you have already, for instance with several strengths.

    Nothing protects the retained facts: choose `strength` by what it costs there. Ilharco et al. 2023,
    https://arxiv.org/abs/2212.04089. Cost and errors: those of `learn`.
    """
    return scaled(model, learn(model, task, mask), -strength)


def dampened(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    selection: float = 10.0,
    dampening: float = 1.0,
    loss: Loss = cross_entropy,
) -> Edit:
    """Weights of `mask` made smaller where they matter more to the forget set than to the retain set; no training.

        weight * min(dampening * I_r / I_f, 1)   where I_f > selection * I_r, and as it was elsewhere

    I_f and I_r, the importance to `task.forget` and `task.retain`, are diagonals of the empirical Fisher information:
    the squared gradient of a prompt's mean loss over its answer tokens, averaged over the prompts. General text does
    not count. A model that gives the forget answers with p = 1 has no gradient there, and nothing to select.

    `selection` and `dampening` are alpha and lambda of Foster et al. 2024 (SSD, https://arxiv.org/abs/2308.07707), with
    their defaults. They compare with all training data, the forget set included; here it is the retain set, because
    with more than 1 / selection forget prompts among both nothing could be selected otherwise.

    Cost: 1F + 1B per prompt of both sides, one prompt at a time; two numbers for each weight of the mask. ValueError
    if no weight is selected, for a dampening below 0 or a selection that is not above 0, and as for `finetune`.
    """
    if not (selection > 0 and dampening >= 0):
        raise ValueError(f"expected selection > 0 and dampening >= 0, got {selection} and {dampening}.")
    if not {*needs(loss)} <= {"logits", "targets"}:
        raise ValueError(f"expected a loss of logits and targets, got {name_of(loss)}: use mu.losses.cross_entropy.")
    entries = select(model, mask)
    forget, retain = (_importance(model, side, entries, loss) for side in (task.forget, task.retain))
    before, chosen = read(entries), 0
    values: Values = {}
    for label, weight in before.items():
        is_chosen = forget[label] > selection * retain[label]
        factor = (dampening * retain[label] / forget[label]).clamp(max=1.0)
        values[label] = torch.where(is_chosen, factor * weight, weight).to(weight.dtype)
        chosen += int(is_chosen.sum())
    if chosen == 0:
        raise ValueError(
            f"expected some weights that matter more than {selection} times as much to the forget set, got none: "
            f"lower the selection, or choose a larger mask."
        )
    provenance = {
        "editor": "dampened",
        "task": task.name,
        "special_tokens": task.special_tokens,
        "selection": selection,
        "dampening": dampening,
    }
    provenance |= {"loss": described(loss), "selected": chosen}
    return Edit(mask, values, fingerprint(model), provenance)


def _importance(model: Model, prompts: Prompts, entries: list[Entries], loss: Loss) -> dict[str, Tensor]:
    """Mean over prompts of the squared gradient of each prompt's mean loss over its answer tokens."""
    total: dict[str, Tensor] = {}
    with exclusively(model), differentiable(model):
        parameters = [e.slot.parameter.requires_grad_(True) for e in entries]
        for prompt in prompts.on(model).batches(1):
            real = prompt.answer_mask
            inputs = {"logits": prompt.logits(model)[real], "targets": prompt.answers[real]}
            value = loss(**{name: inputs[name] for name in needs(loss)}).mean()
            for e, gradient in zip(entries, torch.autograd.grad(value, parameters), strict=True):
                squared = e.read(gradient).to(torch.promote_types(gradient.dtype, torch.float32)).square_()
                total[e.label] = total[e.label].add_(squared) if e.label in total else squared
    return {label: value / len(prompts) for label, value in total.items()}


def mean_ablated(
    model: Model, task: Task, mask: ComponentMask, *, shrinkage: float = 0.01, batch_size: int = 16
) -> Edit:
    """Heads, MLPs and neurons of `mask` that add nearly the same to the residual stream everywhere: their mean.

        W' = u (m W)    with u = (E[a a^T] + shrinkage * mean of its diagonal * identity)^-1 m

    - a: the activations that the mask's heads (or neurons) of a layer give to W_O (or W_out).
    - W: their rows of that matrix, which W' replaces. The mask's other matrices are left alone.
    - m = E[a], where E is the mean over the tokens of `task.text`.
    - a u, a linear map that is nearly 1 on every token. Shrinkage apart, W' makes E |a W' - m W|^2 smallest.

    A constant output would need a bias, which belongs to no component and is absent in most architectures: no edit of
    weights is a mean ablation, and this is the nearest one. The provenance says how near, under `explained`: for each
    matrix 1 - E (a u - 1)^2 on `task.text_test`, where 1 is mean ablation and 0 is as far from it as `zeroed`. A whole
    MLP comes close. A single neuron does not: its row shrinks by E[a]^2 / E[a^2]. For measurements,
    `localize.faithfulness` has exact mean ablation, by hooks.

    In a model with norms after the layer (Gemma 2) it is the mean before that norm. Cost: 1F of both texts, and for
    each matrix its number of covered rows squared in float64. ValueError for a mask without W_O and W_out.
    """
    entries = [e for e in select(model, mask) if e.slot.matrix in ("W_O", "W_out")]
    if not entries:
        raise ValueError(f"expected a mask with a W_O or a W_out, got {mask!r}: use heads, MLPs or neurons.")
    values, explained = read(select(model, mask)), {}
    with preserved(model), torch.no_grad():
        moments = _moments(model, task.text, entries, batch_size)
        maps: dict[str, Tensor] = {}
        for e in entries:
            (mean, square), weight = moments[e.label], values[e.label]
            ridge = shrinkage * square.diagonal().mean() * torch.eye(len(mean)).to(square)
            maps[e.label] = torch.linalg.lstsq(square + ridge, mean[:, None]).solution[:, 0]
            output = mean @ weight.flatten(0, 1).double()
            values[e.label] = torch.outer(maps[e.label], output).view_as(weight).to(weight.dtype)
        for label, (mean, square) in _moments(model, task.text_test, entries, batch_size).items():
            u = maps[label]
            explained[label] = float(2 * mean @ u - u @ square @ u)
    provenance = {
        "editor": "mean_ablated",
        "task": task.name,
        "special_tokens": task.special_tokens,
        "shrinkage": shrinkage,
        "explained": explained,
    }
    return Edit(mask, values, fingerprint(model), provenance)


def _moments(
    model: Model, text: Int[Tensor, "row pos"], entries: Sequence[Entries], batch_size: int
) -> dict[str, tuple[Float[Tensor, "_"], Float[Tensor, "_ _"]]]:
    """E[a] and E[a a^T] over all tokens of the text, of what the covered heads or neurons give to their rows."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    parts = {e.label: Component(e.slot.layer, "H" if e.slot.matrix == "W_O" else "N", 0) for e in entries}
    names = {label: site(part, shape(model)) for label, part in parts.items()}
    check_length(model, text.shape[1], "rows of text")
    for rows in text.to(device_of(model)).split(operator.index(batch_size)):
        last = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        with recording(model, list(names.values())) as recorded:
            logits_at(model, rows, torch.ones_like(rows, dtype=torch.bool), last)
        for e in entries:
            value = recorded[names[e.label]].flatten(0, 1)
            activations = value[:, e.units.to(value.device)].flatten(1).double()
            mean, square = sums.get(e.label, (0, 0))
            sums[e.label] = mean + activations.sum(0), square + activations.T @ activations
    return {label: (mean / text.numel(), square / text.numel()) for label, (mean, square) in sums.items()}
