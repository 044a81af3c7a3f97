"""The optimizers of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from mechunlearn.training.moving import Fleeting, Moving
from mechunlearn.training.optimizers import MakesOptimizer


class Steering:
    """One optimizer for all that moves; one each for what is in memory during its own step only."""

    def __init__(self, optimizer: MakesOptimizer, movers: Sequence[Moving], learning_rate: float) -> None:
        together = [mover for mover in movers if not isinstance(mover, Fleeting)]
        alone = [[mover] for mover in movers if isinstance(mover, Fleeting)]
        self.groups = [*([together] if together else []), *alone]
        self.optimizers = [optimizer([mover.tensor for mover in group], lr=learning_rate) for group in self.groups]

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def step(self) -> None:
        """One step, and the model shows it."""
        for optimizer, group in zip(self.optimizers, self.groups, strict=True):
            for mover in group:
                if isinstance(mover, Fleeting):
                    mover.fetch()
            optimizer.step()
            for mover in group:
                mover.publish()

    def state(self) -> dict[str, Any]:
        """What the optimizers remember."""
        return {str(place): optimizer.state_dict()["state"] for place, optimizer in enumerate(self.optimizers)}

    def load(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Remember that again."""
        for place, optimizer in enumerate(self.optimizers):
            state = optimizer.state_dict()
            state["state"] = {int(key): value for key, value in states[str(place)].items()}
            optimizer.load_state_dict(state)
