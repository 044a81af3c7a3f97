"""Optimizers, anything called as `optimizer(parameters, lr=learning_rate)`; schedules; the optimizers of one run."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from mechunlearn.training.movers import Fleeting, Moving

MakesOptimizer: TypeAlias = Callable[..., Optimizer]
"""Called as `optimizer(parameters, lr=learning_rate)`; a torch optimizer class is one."""

adamw = partial(torch.optim.AdamW, weight_decay=0.0)
"""AdamW without weight decay, which would pull every localized weight to zero whatever the data say."""


def adamw_8bit(parameters: Sequence[Tensor], *, lr: float) -> Optimizer:
    """AdamW without weight decay whose two moments take one byte each, as Guo et al. 2025 used for Gemma-2-9B.

    From bitsandbytes (`pip install mechunlearn[bitsandbytes]`), on CPU and GPU; tensors of fewer than 4,096 numbers
    keep float32 moments. Dettmers et al. 2022, https://arxiv.org/abs/2110.02861.
    """
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise ImportError(
            "expected bitsandbytes for 8-bit AdamW, got none installed: pip install 'mechunlearn[bitsandbytes]', or "
            "use the default optimizer."
        ) from error
    return AdamW8bit(parameters, lr=lr, weight_decay=0.0)


Schedule: TypeAlias = Callable[[int, int], float]
"""(step, counted from 0; number of steps) -> what the learning rate is multiplied by in that step."""


def cosine_schedule(step: int, steps: int) -> float:
    """From 1 to 0 along half a cosine: (1 + cos(pi * step / steps)) / 2."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def constant_schedule(step: int, steps: int) -> float:
    """1 in every step."""
    return 1.0


def warmup_schedule(step: int, steps: int, *, share: float = 0.1, then: Schedule = cosine_schedule) -> float:
    """Another schedule, times a factor that rises in equal parts to 1 over the first `share` of the steps."""
    return min(1.0, (step + 1) / max(1, round(share * steps))) * then(step, steps)


class Steering:
    """The optimizers of a run: one for all movers that keep their memory, and one for each fleeting mover."""

    def __init__(self, optimizer: MakesOptimizer, movers: Sequence[Moving], learning_rate: float) -> None:
        together = [mover for mover in movers if not isinstance(mover, Fleeting)]
        alone = [[mover] for mover in movers if isinstance(mover, Fleeting)]
        self.groups = [*([together] if together else []), *alone]
        self.optimizers = [optimizer([mover.tensor for mover in group], lr=learning_rate) for group in self.groups]
        self.rate = learning_rate

    def set_rate(self, rate: float) -> None:
        self._check_rate()
        self.rate = rate
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def step(self) -> None:
        """Take a step, after which the model computes with the new values."""
        for optimizer, group in zip(self.optimizers, self.groups, strict=True):
            for mover in group:
                if isinstance(mover, Fleeting):
                    mover.fetch()
            optimizer.step()
            for mover in group:
                mover.publish()
        self._check_rate()

    def _check_rate(self) -> None:
        """ValueError if something else than `set_rate` has set a learning rate: the history would show another one."""
        rates = {float(group["lr"]) for optimizer in self.optimizers for group in optimizer.param_groups}
        if rates != {self.rate}:
            raise ValueError(
                f"expected an optimizer with the learning rate that it is given ({self.rate:.6g}), got one with "
                f"{', '.join(f'{rate:.6g}' for rate in sorted(rates))}: pass schedule=..., a function of step and "
                f"steps, in place of a scheduler or rates of your own."
            )

    def state(self) -> list[dict[int, Any]]:
        """The state of each optimizer (moments, counts), by the number of the parameter."""
        return [optimizer.state_dict()["state"] for optimizer in self.optimizers]

    def load(self, states: Sequence[Mapping[int, Any]]) -> None:
        """Restore the optimizers from what `state` returned."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(state)})
            for parameter, own in optimizer.state.items():
                for name, value in own.items():
                    # A file has no order of axes, but fused optimizers want that of the parameter.
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
