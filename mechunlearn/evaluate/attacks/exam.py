"""The exam of an attack: what it may train on, what it is asked at each budget, and its strongest run as a result."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.curve import Curve
from mechunlearn.evaluate.results import LIMITS, Result
from mechunlearn.evaluate.scoring import result_of, side_of
from mechunlearn.metrics import Metric, scored
from mechunlearn.model import Model, check_model, preserved
from mechunlearn.tasks.building import padded
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task

Scores = Float[Tensor, "asked example"]
"""The scores of one run: row 0 about the facts; row 1, if there is one, the same questions about nobody."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Prompts that test an attack, and the same questions about nobody: subjects that the model does not know."""

    tested: Prompts
    nobody: Prompts | None
    metric: Metric

    @classmethod
    def of(cls, model: Model, task: Task, tested: Prompts, *, metric: Metric, seed: int) -> "Asked":
        check_model(model)
        nobody = strangers_to(model, tested, task, seed=seed)
        return cls(tested.on(model), nobody and nobody.on(model), metric)

    @torch.no_grad()
    def scores(self, logits: Callable[[Prompts], Tensor]) -> Scores:
        """The scores of the model whose logits these are. FloatingPointError if they are not finite."""
        asked = [prompts for prompts in (self.tested, self.nobody) if prompts is not None]
        values = [[self._values(logits, batch) for batch in prompts.batches(64)] for prompts in asked]
        return torch.stack([torch.cat(of_prompts) for of_prompts in values])

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
    about = (meaning.sense, meaning.chance, axis, LIMITS.get(meaning.unit))
    facts, *nobody = (Curve(tuple(best), scores, *about) for scores in stacked)
    control, sense = None, f"{meaning.sense}, about nobody"
    if nobody:
        chosen = nobody[0].per_prompt[:, int(facts.mean.argmax())]
        control = Result(chosen, sense, meaning.chance, meaning.unit, meaning.names, nobody[0])
    return Result.strongest(facts, meaning.sense, unit=meaning.unit, names=meaning.names, control=control)


def strangers_to(model: Model, prompts: Prompts, task: Task, *, seed: int = 0) -> Prompts | None:
    """The same questions about subjects that the model does not know; None without subjects.

    They are those of `task.strangers`; where it has none, names made of the first word of one subject of the task and
    the other words of another.
    """
    if prompts.subject is None or task.retain.subject is None:
        return None
    generator = random.Random(f"strangers {index(seed)}")
    if task.strangers is not None:
        names = _subjects(task.strangers)
        drawn = [generator.choice(names) for _ in range(len(prompts) - len(names))]
        chosen = [*generator.sample(names, min(len(names), len(prompts))), *drawn]
        return _about(prompts, chosen)
    known = [*_subjects(prompts), *_subjects(task.retain)]
    starts = [_second_word(model, subject) for subject in known]
    firsts = [subject[:start] for subject, start in zip(known, starts, strict=True)]
    rests = [subject[start:] for subject, start in zip(known, starts, strict=True)]
    made = [generator.choice(firsts) + generator.choice(rests) for _ in range(20 * len(prompts))]
    unknown = [name for name in made if name not in known] or made
    return _about(prompts, unknown[: len(prompts)])


def _subjects(prompts: Prompts) -> list[list[int]]:
    assert prompts.subject is not None
    rows = zip(prompts.tokens, prompts.subject, strict=True)
    return [row[where].tolist() for row, where in rows if bool(where.any())]


def _second_word(model: Model, subject: Sequence[int]) -> int:
    """Where it starts; in a subject of one word, or without a tokenizer, the middle."""
    words = [] if model.tokenizer is None else model.tokenizer.convert_ids_to_tokens(list(subject))
    starts = [place for place, token in enumerate(words) if place and str(token).startswith(("\u0120", "\u2581", " "))]
    return starts[0] if starts else (len(subject) + 1) // 2


def _about(prompts: Prompts, subjects: Sequence[Sequence[int]]) -> Prompts:
    """The prompts with other subjects in the place of their own, padded on the same side."""
    assert prompts.subject is not None
    rows, marks, positions = [], [], prompts.positions.clone()
    for number, (subject, where) in enumerate(zip(subjects, prompts.subject, strict=True)):
        real = prompts.attention_mask[number]
        tokens, inside = prompts.tokens[number][real].tolist(), where[real].tolist()
        first, old = (inside.index(True), sum(inside)) if any(inside) else (0, 0)
        new = list(subject) if old else []
        rows.append(tokens[:first] + new + tokens[first + old :])
        marks.append([0] * first + [1] * len(new) + [0] * (len(tokens) - first - old))
        places = real.cumsum(0)[prompts.positions[number]] - 1
        positions[number] = places + (len(new) - old) * (places >= first + old - 1)
    side = "right" if bool(prompts.attention_mask[:, 0].all()) else "left"
    tokens, mask = (values.to(prompts.tokens.device) for values in padded(rows, 0, side))
    marked = padded(marks, 0, side)[0].bool().to(mask.device)
    positions += mask.int().argmax(1, keepdim=True)  # what stands before the first real token
    about = {"tokens": tokens.to(prompts.tokens.dtype), "attention_mask": mask, "subject": marked}
    return replace(prompts, **about, positions=positions, corrupt=None, texts=())


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


def named_and_others(task: Task, names: Sequence[str], *, format: str | None = None) -> tuple[Prompts, Prompts]:
    """The prompts of `task.forget` about these facts, and those of the test split about all others."""
    tested = side_of(task, format=format)
    known = [name for name in names if name in task.forget.names]
    if isinstance(names, str) or not names or len(known) < len(names):
        raise ValueError(
            f"expected a list of names of facts to forget ({', '.join(task.forget.names[:3]) or 'the task has none'}, "
            f"...), got {names if isinstance(names, str) else [name for name in names if name not in known]!r}."
        )
    rows = [i for i, name in enumerate(task.forget.names) if name in names]
    others = [i for i, name in enumerate(tested.names) if name not in names]
    if not others:
        raise ValueError("expected forgotten facts besides those that the attack sees, got none: name fewer.")
    return task.forget.rows(torch.tensor(rows)), tested.rows(torch.tensor(others))


def check_apart(trained: Prompts, tested: Prompts) -> None:
    """ValueError if an attack trains on a fact that it is tested on, or if names to tell that are missing."""
    shared = sorted(set(trained.names) & set(tested.names))
    if shared or not (trained.names and tested.names):
        raise ValueError(
            f"expected an attack on other facts than it is tested on, got {shared[:5] or 'prompts without names'} "
            "in both: take them from mu.evaluate.halves(task)."
        )
