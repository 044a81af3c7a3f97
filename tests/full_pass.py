"""The slow, obvious reference for replaced components: one full forward pass with one hook for each of them."""

import torch

from mechunlearn.components import Component
from mechunlearn.localize.replacement import resample
from mechunlearn.metrics import logit_difference
from mechunlearn.model import preserved, recording, shape, site
from mechunlearn.tasks.positions import everywhere


@torch.no_grad()
def with_replaced(
    model, prompts, components, metric=logit_difference, replacement=resample, where=everywhere, names=()
):
    """The metric of each prompt with all these components (or labels) replaced, and the hook points `names` too."""
    sizes = shape(model)
    chosen = [Component.parse(c) if isinstance(c, str) else c for c in components]
    named = [*((name, None) for name in names), *((site(c, sizes), unit_of(c, sizes)) for c in chosen)]
    with preserved(model):
        with recording(model, [name for name, _ in named]) as own:
            prompts.logits(model)
        new = replacement(model, prompts, own)
        rows, tokens = (where(prompts) & prompts.attention_mask).nonzero(as_tuple=True)

        def putting(name, unit):
            def put(value, hook):
                patched = value.clone()
                index = (rows, tokens) if unit is None else (rows, tokens, unit)
                patched[index] = new[name][index]
                return patched

            return name, put

        hooks = [putting(name, unit) for name, unit in named]
        return metric(prompts.logits(model, hooks=hooks), prompts).double()


def unit_of(component, sizes):
    if component.part == "H":
        return component.index * sizes.units(component.matrix or "W_O") // sizes.n_heads
    return component.index
