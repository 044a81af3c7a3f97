"""Several sets of prompts as one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mechunlearn.tasks.prompts import IGNORED, Prompts


def joined(*sets: Prompts) -> Prompts:
    """The prompts of all sets, in order, such as `joined(task.forget, task.retain)`.

    Candidates, subjects, corrupted counterparts, texts and names are kept if every set has them.
    ValueError for sets with different numbers of candidates.
    """
    counts = sorted({p.candidates.shape[1] for p in sets if p.candidates is not None})
    if len(counts) > 1:
        raise ValueError(f"expected sets with equally many candidates, got {counts}: join others.")
    return Prompts(
        _stacked([p.tokens for p in sets], fill=0),
        _stacked([p.attention_mask for p in sets], fill=False),
        _stacked([p.positions for p in sets], fill=None),
        _stacked([p.answers for p in sets], fill=IGNORED),
        _if_all([p.candidates for p in sets]),
        _if_all([p.subject for p in sets]),
        _if_all([p.corrupt for p in sets]),
        tuple(text for p in sets for text in p.texts) if all(p.texts for p in sets) else (),
        tuple(name for p in sets for name in p.names) if all(p.names for p in sets) else (),
    )


def _if_all(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return _stacked(present, fill=0) if len(present) == len(parts) else None


def _stacked(parts: Sequence[Tensor], *, fill: int | bool | None) -> Tensor:
    """Rows of all parts, filled up on the right (`None`: with the row's last entry) to the widest."""
    width = max(part.shape[1] for part in parts)
    filled = []
    for part in parts:
        missing = width - part.shape[1]
        rest = part[:, -1:].expand(-1, missing) if fill is None else part.new_full((len(part), missing), fill)
        filled.append(torch.cat([part, rest], 1))
    return torch.cat(filled)
