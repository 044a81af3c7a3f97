"""Edits without training: components set to zero, and edits scaled, negated and put together."""

import torch
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.model import Model, fingerprint
from mechunlearn.weights import Edit, Values, read, select


def zeroed(model: Model, mask: ComponentMask) -> Edit:
    """Every weight of the mask set to zero: the bluntest edit, and a check on what the others do better.

    A zeroed head or MLP adds its output bias and nothing else. ValueError for an empty mask or one of another model.
    """
    values = {label: torch.zeros_like(value) for label, value in read(select(model, mask)).items()}
    return Edit(mask, values, fingerprint(model), {"editor": "zeroed"})


def scaled(model: Model, edit: Edit, factor: float) -> Edit:
    """original + factor * (edited - original): task arithmetic on the edit's entries.

    With a `factor` of -1 an edit that *learned* something (such as `finetune` with `forget_loss=cross_entropy`, which
    learns the forget set further) is negated, to forget it; between 0 and 1 an edit is made milder. 1 gives the edit.

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
    """In the precision of at least float32, rounded once; exactly the edit for a factor of 1."""
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
