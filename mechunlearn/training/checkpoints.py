"""Checkpoints of a training run, so that one that was killed goes on to the same result, bit for bit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechunlearn import files
from mechunlearn.training.movers import Fleeting, Moving
from mechunlearn.training.optimizers import Steering


@dataclass(frozen=True)
class Checkpoints:
    """One file, replaced every `every` steps, at one stroke: a run that is killed leaves the last whole one."""

    path: str | Path
    every: int
    identity: Mapping[str, Any]
    """Settings, data and the model's fingerprint: a run goes on from a file only if all of them are equal."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be 1 or more, got {self.every}.")
        if not Path(self.path).absolute().parent.is_dir():
            raise ValueError(f"expected a checkpoint in a folder that exists, got {self.path}: make the folder first.")

    def save(
        self,
        moving: Sequence[Moving],
        steering: Steering,
        history: Sequence[Mapping[str, Any]],
        streams: Mapping[str, str],
    ) -> None:
        """`streams`: term -> a digest of the text that was read for it."""
        if len(history) % self.every:
            return
        tensors = [_with_memory(mover) for mover in moving]
        content = {"moving": tensors, "optimizer": steering.state()}
        content |= {"identity": self.identity, "history": [dict(row) for row in history], "streams": streams}
        files.write(self.path, "Checkpoint", content)

    def resume(
        self, moving: Sequence[Moving], steering: Steering, skip: Callable[[int], Mapping[str, str]]
    ) -> list[Mapping[str, Any]]:
        """The history so far, empty without a file. ValueError for a damaged file or one of another run.

        `skip` passes over the batches of that many steps and gives digests of the streams, as `save` takes them.
        """
        if not Path(self.path).exists():
            return []
        content = files.read(self.path, "Checkpoint")
        stored, own = content["identity"], self.identity
        if stored == own:  # then its text is read again, and must be the same
            stored, own = {"streams": content["streams"]}, {"streams": skip(len(content["history"]))}
        other = [name for name in sorted({*stored, *own}) if stored.get(name) != own.get(name)]
        if other:
            shown = "; ".join(f"{name}: {stored.get(name)}, here {own.get(name)}" for name in other[:5])
            raise ValueError(
                f"expected a checkpoint of this run, got one of another at {self.path} ({shown}): "
                f"delete it or give another path."
            )
        with torch.no_grad():
            for mover, tensor in zip(moving, content["moving"], strict=True):
                # A fleeting tensor needs memory to be copied into; `publish` shows the model the weights and frees it.
                if isinstance(mover, Fleeting):
                    mover.fetch()
                mover.tensor.copy_(tensor)
                mover.publish()
        # Now the optimizer's moments. The batches are not stored: `skip` has drawn the used ones again.
        steering.load(content["optimizer"])
        return content["history"]


def _with_memory(mover: Moving) -> Tensor:
    """The mover's tensor, or a copy of a fleeting one, which has no memory now."""
    if not isinstance(mover, Fleeting):
        return mover.tensor
    mover.fetch()
    copy = mover.tensor.clone()
    mover.publish()
    return copy
