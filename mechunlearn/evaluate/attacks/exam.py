"""The exam of an attack: what it may train on, what it is asked at each budget, and its strongest run as a result."""

import operator
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.curve import Curve
from mechunlearn.evaluate.results import Result
from mechunlearn.evaluate.scoring import result_of, side_of
from mechunlearn.metrics import Metric, scored
from mechunlearn.model import Model, check_model, preserved
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task

Scores = Float[Tensor, "asked example"]
"""The scores of one run: row 0 about the facts; row 1, if there is one, the same questions about nobody."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Prompts that test an attack, and the same questions about subjects who do not exist."""

    tested: Prompts
    nobody: Prompts | None
    metric: Metric

    @classmethod
    def of(cls, model: Model, task: Task, tested: Prompts, *, metric: Metric, seed: int) -> "Asked":
        check_model(model)
        nobody = made_up(tested, task.retain, seed=seed)
        return cls(tested.on(model), nobody and nobody.on(model), metric)

    def scores(self, logits: Callable[[Prompts], Tensor], *, batch_size: int = 64) -> Scores:
        """The scores of the model whose logits these are. FloatingPointError if they are not finite."""
        rows = []
        with torch.no_grad():
            for prompts in (self.tested, self.nobody):
                if prompts is not None:
                    values = [self._values(logits, batch) for batch in prompts.batches(batch_size)]
                    rows.append(torch.cat(values))
        return torch.stack(rows)

    def scores_of(self, model: Model) -> Scores:
        with preserved(model):
            return self.scores(lambda prompts: prompts.logits(model))

    def _values(self, logits: Callable[[Prompts], Tensor], prompts: Prompts) -> Tensor:
        def finite(asked: Prompts) -> Tensor:
            values = logits(asked)
            if not bool(torch.isfinite(values).all()):
                raise FloatingPointError("expected finite logits, got NaN or infinity: lower the learning rate.")
            return values

        return scored(self.metric, finite, prompts).float().cpu()


def worst_case(runs: Mapping[str, Sequence[Scores]], asked: Asked, *, axis: str) -> Result:
    """The best run (by its mean on the facts) at each point, and the best point; as control the same about nobody."""
    best = {point: max(tries, key=lambda scores: float(scores[0].mean())) for point, tries in runs.items() if tries}
    stacked = torch.stack(list(best.values()), -1)
    meaning = result_of(stacked[0, :, 0], asked.metric, asked.tested)
    facts, *nobody = (Curve(tuple(best), scores, meaning.sense, meaning.chance, axis) for scores in stacked)
    result = Result.strongest(facts, meaning.sense, unit=meaning.unit, names=meaning.names)
    if not nobody:
        return result
    chosen = nobody[0].per_prompt[:, int(facts.mean.argmax())]
    sense = f"{meaning.sense}, about nobody"
    return replace(result, control=Result(chosen, sense, meaning.chance, meaning.unit, meaning.names, nobody[0]))


def made_up(prompts: Prompts, others: Prompts, *, seed: int = 0) -> Prompts | None:
    """The same questions about made-up names, with the parts and lengths of real ones; None without subjects."""
    # Each token of a name is replaced by the one at the same place in a random name of either set.
    if prompts.subject is None or others.subject is None:
        return None
    generator = torch.Generator().manual_seed(operator.index(seed))
    pool = [*_subjects(prompts.tokens, prompts.subject), *_subjects(others.tokens, others.subject)]
    pool = [subject for subject in pool if subject]
    tokens = prompts.tokens.clone()
    for row, where in enumerate(prompts.subject):
        count = int(where.sum())
        drawn = torch.randint(len(pool), (count,), generator=generator).tolist()
        drawn_tokens = [pool[other][place % len(pool[other])] for place, other in enumerate(drawn)]
        tokens[row, where] = torch.tensor(drawn_tokens, dtype=tokens.dtype, device=tokens.device)
    return replace(prompts, tokens=tokens, corrupt=None, texts=())


def _subjects(tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]) -> list[list[int]]:
    return [row[chosen].tolist() for row, chosen in zip(tokens, where, strict=True)]


def halves(task: Task, *, format: str | None = None, seed: int = 0) -> tuple[Prompts, Prompts]:
    """The prompts that an attack may train on, and those about other facts that test it.

    It trains on `task.forget` and is tested on the forgotten facts of the test split in `format` (default: the first,
    the trained prompt). Where the two share facts, as in tasks that forget single athletes, a random half of the names
    is tested and the others are trained on (Deeb & Roger 2024, https://arxiv.org/abs/2410.08827).
    """
    tested = side_of(task, format=format)
    if not (task.forget.names and tested.names):
        raise ValueError("expected prompts with names, to tell facts apart, got none: build them with subjects=....")
    names = sorted(set(tested.names))
    shared = set(names) & set(task.forget.names)
    kept = set(random.Random(index(seed)).sample(names, (len(names) + 1) // 2)) if shared else set(names)
    trained = [i for i, name in enumerate(task.forget.names) if name not in kept]
    if not trained:
        raise ValueError(
            f"expected at least two forgotten facts, one to attack with and one to test, got {len(names)}: take a task "
            f"that forgets more."
        )
    rows = [i for i, name in enumerate(tested.names) if name in kept]
    return task.forget.rows(torch.tensor(trained)), tested.rows(torch.tensor(rows))


def check_apart(trained: Prompts, tested: Prompts) -> None:
    """ValueError if an attack trains on a fact that it is tested on, or if names to tell that are missing."""
    shared = sorted(set(trained.names) & set(tested.names))
    if shared or not (trained.names and tested.names):
        raise ValueError(
            f"expected an attack on other facts than it is tested on, got {shared[:5] or 'prompts without names'} "
            "in both: take them from mu.evaluate.halves(task)."
        )
