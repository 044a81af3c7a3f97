"""Mean ablation: activations replaced by their mean over reference text, whatever the prompt."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.model.hooks import Hook, recording
from mechunlearn.model.kinds import Model, device_of
from mechunlearn.model.run import logits_at


@torch.no_grad()
def mean_activations(
    model: Model, text: Int[Tensor, "row pos"], names: Sequence[str], *, batch_size: int = 64
) -> dict[str, Float[Tensor, "*unit"]]:
    """Hook point -> mean over all tokens of `text` (rows without padding). Cost: 1F of the text."""
    sums: dict[str, Tensor] = {}
    for rows in text.to(device_of(model)).split(batch_size):
        last = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        with recording(model, names) as found:
            logits_at(model, rows, torch.ones_like(rows, dtype=torch.bool), last)
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value.float().sum((0, 1))
    return {name: total / text.numel() for name, total in sums.items()}


def constant(values: Iterable[tuple[str, Float[Tensor, "*unit"]]]) -> list[Hook]:
    """Hooks that put one value at every token of every prompt."""

    def hook(name: str, value: Tensor) -> Hook:
        return name, lambda own, hook: value.to(own).expand_as(own)

    return [hook(name, value) for name, value in values]
