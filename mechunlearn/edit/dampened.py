"""Selective synaptic dampening: shrink the weights that matter more to the forget set than to the retain set."""

import torch
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.edit.editor import repeatable
from mechunlearn.losses import Loss, cross_entropy, needs
from mechunlearn.metrics import described, name_of
from mechunlearn.model import Model, device_of, differentiable, fingerprint
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, Entries, Values, exclusively, read, select


@repeatable
def dampened(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    selection: float = 10.0,
    dampening: float = 1.0,
    loss: Loss = cross_entropy,
) -> Edit:
    """Weights of `mask` with importance I_f to the forget set and I_r to the retain set, without training:

        weight * min(dampening * I_r / I_f, 1)   where I_f > selection * I_r, and as it was elsewhere

    Importance is the diagonal of the empirical Fisher information: the squared gradient of a prompt's mean loss over
    its answer tokens, averaged over the prompts of `task.forget` and `task.retain`. `selection` and `dampening` are
    alpha and lambda of Foster et al. 2024 (SSD, https://arxiv.org/abs/2308.07707), with their defaults. They compare
    with all training data, the forget set included. Here it is the retain set: where forget prompts are more than
    1 / selection of both together, nothing could be selected otherwise. General text has no say.

    A model that gives the forget answers with p = 1 has no gradient there, and nothing to select.

    Cost: 1F + 1B per prompt of both sides, one prompt at a time; two numbers for each weight of the mask. ValueError
    if no weight is selected, for a dampening below 0 or a selection that is not above 0, and as for `finetune`.
    """
    if not (selection > 0 and dampening >= 0):
        raise ValueError(f"expected selection > 0 and dampening >= 0, got {selection} and {dampening}.")
    if not {*needs(loss)} <= {"logits", "targets"}:
        raise ValueError(f"expected a loss of logits and targets, got {name_of(loss)}: use losses.cross_entropy.")
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
    provenance = {"editor": "dampened", "task": task.name, "selection": selection, "dampening": dampening}
    provenance |= {"loss": described(loss), "selected": chosen}
    return Edit(mask, values, fingerprint(model), provenance)


def _importance(model: Model, prompts: Prompts, entries: list[Entries], loss: Loss) -> dict[str, Tensor]:
    """Mean over prompts of the squared gradient of each prompt's mean loss over its answer tokens."""
    total: dict[str, Tensor] = {}
    with exclusively(model), differentiable(model):
        parameters = [e.slot.parameter.requires_grad_(True) for e in entries]
        for prompt in prompts.to(device_of(model)).batches(1):
            real = prompt.answer_mask
            given = {"logits": prompt.logits(model)[real], "targets": prompt.answers[real]}
            value = loss(**{name: given[name] for name in needs(loss)}).mean()
            for e, gradient in zip(entries, torch.autograd.grad(value, parameters), strict=True):
                squared = e.read(gradient).to(torch.promote_types(gradient.dtype, torch.float32)).square_()
                total[e.label] = total[e.label].add_(squared) if e.label in total else squared
    return {label: value / len(prompts) for label, value in total.items()}
