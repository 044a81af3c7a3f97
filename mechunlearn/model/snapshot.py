"""What a model's weights were, to see whether they still are."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mechunlearn.model.kinds import Model


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy of every parameter of a model, in the memory of the CPU."""

    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: Model) -> "Snapshot":
        return cls({name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()})

    @torch.no_grad()
    def restore(self, model: Model) -> list[str]:
        """Put back what has changed since; gives the names of those parameters. Cost: each weight is read once.

        RuntimeError if parameters have come or gone.
        """
        now = dict(model.named_parameters())
        if now.keys() != self.weights.keys():
            other = sorted(now.keys() ^ self.weights.keys())
            raise RuntimeError(
                f"expected a model with the parameters that it had before, got others ({', '.join(other[:3])}): they "
                f"cannot be put back; load the model again."
            )
        changed = [name for name, p in now.items() if not _same(p.detach().cpu(), self.weights[name])]
        for name in changed:
            saved = self.weights[name]
            if (now[name].shape, now[name].dtype) == (saved.shape, saved.dtype):
                now[name].copy_(saved)
            else:
                now[name].data = saved.to(now[name].device, copy=True)
        return changed


def _same(one: Tensor, other: Tensor) -> bool:
    """As numbers: NaN where there was NaN is the same."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
