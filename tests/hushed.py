"""An edit that leaves a fact where it is and only keeps the last MLP from saying it."""

from typing import Any

import torch

import mechunlearn as mu
from mechunlearn.model import recording
from mechunlearn.weights import read, select


def hushed(model: Any, prompts: Any, *, strength: float = 300.0) -> mu.Edit:
    """The shipped model's last MLP pushes the one answer of these prompts down wherever it is active alike."""
    name = "blocks.9.mlp.hook_post"
    with torch.no_grad(), recording(model, [name]) as found:
        prompts.logits(model)
    active = found[name][torch.arange(len(prompts)), prompts.positions[:, 0]].mean(0)
    down = torch.nn.functional.normalize(model.embed.weight[int(prompts.answers[0, 0])].detach(), dim=0)
    mask = mu.ComponentMask.of(["L9MLP.W_out"], mu.shape(model))
    values = read(select(model, mask))
    values["L9.W_out"] -= strength * torch.outer(active / active.square().sum(), down).view_as(values["L9.W_out"])
    return mu.Edit(mask, values, mu.fingerprint(model), {"editor": "hushed"})
