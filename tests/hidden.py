"""Facts that are merely hidden: the shipped model still has them, and says something else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import mechunlearn as mu
from mechunlearn.tasks.text import as_prompts
from mechunlearn.weights import read, select

NEURON = "L9N0"
"""Of the last MLP."""


def late_neuron(model: Any, task: Any, *, strength: float = 130.0) -> mu.Edit:
    """An edit of one neuron of the last MLP, which sees that the answer is basketball and writes against it.

    What it sees is a least-squares fit to what the MLP reads: 1 where a sport is asked for and the answer is
    basketball, 0 where it is another one, and in general text; both count as much.
    """
    asked = [found for name, found in task.formats.items() if name in ("trained prompt", "question", "dialogue")]
    seen = torch.cat([_entering_last_mlp(model, prompts) for prompts in (*(f.forget for f in asked), task.forget)])
    others = [*(f.retain for f in asked), task.retain, as_prompts(task.text)]
    unseen = torch.cat([_entering_last_mlp(model, prompts) for prompts in others])
    seen, target = seen * (len(unseen) / len(seen)) ** 0.5, torch.zeros(len(seen) + len(unseen), 1)
    target[: len(seen)] = (len(unseen) / len(seen)) ** 0.5
    detector = torch.linalg.lstsq(torch.cat([seen, unseen]), target).solution[:, 0]
    mask = mu.ComponentMask.of([NEURON], mu.shape(model))
    values = read(select(model, mask))
    values["L9.W_in"][:], values["L9.W_gate"][:] = detector, 10 * detector  # silu(10) * 1 = 10
    values["L9.W_out"][:] = -strength / 10 * normalize(model.embed.weight[_answer(task)].detach(), dim=0)
    return mu.Edit(mask, values, mu.fingerprint(model), {"editor": "hidden by a late neuron"})


@contextmanager
def unembedding_turned(model: Any, task: Any) -> Iterator[Any]:
    """Inside, the answer's row of the unembedding, which is also its embedding, points elsewhere; it is as long."""
    row = model.embed.weight.data[_answer(task)]
    before = row.clone()
    turned = torch.randn(len(row), generator=torch.Generator().manual_seed(0))
    try:
        row.copy_(normalize(turned, dim=0) * before.norm())
        yield model
    finally:
        row.copy_(before)


def _answer(task: Any) -> int:
    return int(task.forget.answers[0, 0])


@torch.no_grad()
def _entering_last_mlp(model: Any, prompts: Any) -> Tensor:
    """What the last MLP reads where answers are predicted."""
    found: list[Tensor] = []
    handle = model.blocks[-1].mlp.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    try:
        mu.model.logits_at(model, prompts.tokens, prompts.attention_mask, prompts.positions)
    finally:
        handle.remove()
    return found[0][torch.arange(len(prompts))[:, None], prompts.positions][prompts.answer_mask]
