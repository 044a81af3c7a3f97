"""Full fine-tuning as an attack: every weight of attention and MLPs moves, and all of it is taken back."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch.optim import Optimizer

from mechunlearn.components import ComponentMask
from mechunlearn.evaluate.attacked import Asked, Scores
from mechunlearn.evaluate.relearning import check_rates
from mechunlearn.model import Model, differentiable, shape
from mechunlearn.training import MakesOptimizer, Term, fit
from mechunlearn.weights import Entries, Values, exclusively, read, select, write


@dataclass(frozen=True)
class Tuning:
    """One run for each learning rate."""

    learning_rates: Sequence[float]
    warmup: float
    """Over which share of the steps the learning rate rises to the scheduled one."""
    optimizer: MakesOptimizer
    micro_batch_size: int | None
    seed: int

    def scores(
        self, model: Model, terms: Sequence[Term], asked: Asked, *, steps: int, at: Sequence[int]
    ) -> dict[str, list[Scores]]:
        """Step -> the scores of every run that did not diverge before it. The model is left as it was."""
        return self.several_scores(model, terms, [(asked, at)], steps=steps)[0]

    def several_scores(
        self, model: Model, terms: Sequence[Term], questions: Sequence[tuple[Asked, Sequence[int]]], *, steps: int
    ) -> list[dict[str, list[Scores]]]:
        """The same for several questions about the same runs, each with the steps at which it is asked."""
        found: list[dict[str, list[Scores]]] = [{str(step): [] for step in at} for _, at in questions]
        for own, (asked, _) in zip(found, questions, strict=True):
            own["0"] = [asked.scores_of(model)]

        def on_step(row: Mapping[str, Any]) -> None:
            done = row["step"] + 1
            for own, (asked, at) in zip(found, questions, strict=True):
                if done in at:
                    own[str(done)].append(asked.scores_of(model))

        for rate in check_rates(self.learning_rates):
            with _taken_back(model) as (entries, original), suppress(FloatingPointError):
                fit(
                    model,
                    entries,
                    terms,
                    original=original,
                    steps=steps,
                    learning_rate=rate,
                    optimizer=_warmed_up(self.optimizer, round(self.warmup * steps)),
                    micro_batch_size=self.micro_batch_size,
                    seed=self.seed,
                    progress=False,
                    on_step=on_step,
                )
        return found


@contextmanager
def _taken_back(model: Model) -> Iterator[tuple[list[Entries], Values]]:
    """Inside, all weights of attention and MLPs may move; after, they are what they were, bit for bit."""
    sizes = shape(model)
    parts = [f"L{layer}{kind}" for layer in range(sizes.n_layers) for kind in ("ATTN", "MLP")]
    entries = select(model, ComponentMask.of(parts, sizes))
    original = read(entries)
    with exclusively(model):
        try:
            with differentiable(model):
                yield entries, original
        finally:
            write(entries, original)


def _warmed_up(optimizer: MakesOptimizer, steps: int) -> MakesOptimizer:
    """The same with a learning rate that rises to the scheduled one over the first steps."""

    def make(parameters: Sequence[torch.Tensor], *, lr: float) -> Optimizer:
        made, step = optimizer(parameters, lr=lr), count(1)

        def hold_back(found: Optimizer, *_: Any) -> None:
            share = min(1.0, next(step) / max(1, steps))
            for group in found.param_groups:
                group["lr"] *= share

        made.register_step_pre_hook(hold_back)
        return made

    return make
