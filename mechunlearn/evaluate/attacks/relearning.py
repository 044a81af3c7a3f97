"""Relearning by full fine-tuning: on some forgotten facts, on a few of them, or on harmless text."""

import itertools
import operator
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.optim import Optimizer

from mechunlearn.components import ComponentMask
from mechunlearn.evaluate.attacks.exam import Asked, Scores, check_apart, formatted, halves, worst_case
from mechunlearn.evaluate.results import Result
from mechunlearn.losses import cross_entropy
from mechunlearn.metrics import Metric, candidate_probability
from mechunlearn.model import Model, differentiable, shape
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task
from mechunlearn.tasks.text import as_prompts, pack
from mechunlearn.training import MakesOptimizer, Term, adamw, fit
from mechunlearn.weights import Entries, Values, exclusively, read, select, write


def relearn(
    model: Model,
    task: Task,
    *,
    learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3),
    steps: int = 100,
    batch_size: int = 4,
    warmup: float = 0.1,
    retain_coefficient: float = 1.0,
    text_coefficient: float = 0.0,
    text_batch_size: int = 4,
    at: Sequence[int] | None = None,
    format: str | None = None,
    metric: Metric = candidate_probability,
    optimizer: MakesOptimizer = adamw,
    micro_batch_size: int | None = None,
    seed: int = 0,
) -> Result:
    """Accuracy on forgotten facts after training on *other* forgotten facts: the worst case over rates and steps.

        loss = relearned + retain_coefficient * retained + text_coefficient * text

    each a mean cross-entropy over answer tokens, in nats, on what `halves(task, seed=seed)` leaves to train on, on
    `task.retain` and on `task.text` without the rows that name a tested fact. Trained are all weights of attention and
    MLPs; embeddings, norms, biases and the unembedding are not. The schedule rises for a share `warmup` of the steps
    and falls along a cosine; gradients are clipped at norm 1. `at`: after how many steps the facts are asked, in
    `format` (default: the trained prompt) by `metric`; by default after 0, 1, 2, 4, ... and the last.

    The curve has, at each step, the learning rate that does best there; the value is its highest point. A rate that
    diverges counts up to the step where it does. `control` has the same questions about made-up subjects, put to the
    same attacked models: what the attack teaches to say about anybody. Retained facts in the mix keep that low, so
    they are there by default; a model that never knew the facts may still learn to give those it does not know the
    forgotten answer, where there is only one (a whole sport). Attack such a model too.

    Deeb & Roger 2024 (https://arxiv.org/abs/2410.08827), who train on relearned facts alone, with Lion, batches of 4,
    24 steps of warm-up, 6 epochs and rates in steps of 2. The default rates suit the shipped model; theirs for 7B-8B
    models are 1e-7 to 3.2e-6. Cost: per rate and step F + B of each batch; F of the tested facts, twice, at each point.

    The weights are put back bit for bit, also after a failure; a copy of those that are trained is kept for it.
    ValueError for too few facts, an unknown format, prompts without names, processed or quantised weights.
    """
    return relearn_and_ask(
        model,
        task,
        [Question(format, metric, at)],
        learning_rates=learning_rates,
        steps=steps,
        batch_size=batch_size,
        warmup=warmup,
        retain_coefficient=retain_coefficient,
        text_coefficient=text_coefficient,
        text_batch_size=text_batch_size,
        optimizer=optimizer,
        micro_batch_size=micro_batch_size,
        seed=seed,
    )[0]


@dataclass(frozen=True)
class Question:
    """What `relearn_and_ask` asks about the facts that it does not train on."""

    format: str | None = None
    """Of the task; default: the first, the trained prompt."""
    metric: Metric = candidate_probability
    at: Sequence[int] | None = None
    """After how many steps; by default after 0, 1, 2, 4, ... and the last."""


def relearn_and_ask(
    model: Model,
    task: Task,
    questions: Sequence[Question],
    *,
    learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3),
    steps: int = 100,
    batch_size: int = 4,
    warmup: float = 0.1,
    retain_coefficient: float = 1.0,
    text_coefficient: float = 0.0,
    text_batch_size: int = 4,
    optimizer: MakesOptimizer = adamw,
    micro_batch_size: int | None = None,
    seed: int = 0,
) -> list[Result]:
    """For each question what `relearn` gives with its format, metric and steps, bit for bit, but trained once for all.

    A format may lack facts, which leaves others to train on: questions share a run where what is trained on is the
    same. Everything else, cost and errors included, is as for `relearn`.
    """
    runs: dict[object, list[tuple[int, Prompts, Prompts]]] = {}
    for place, question in enumerate(questions):
        trained, tested = halves(task, format=question.format, seed=seed)
        named = frozenset(tested.names) if text_coefficient else None  # rows of text that name them are left out
        runs.setdefault((trained.names, named), []).append((place, trained, tested))
    tuning = Tuning(learning_rates, warmup, optimizer, micro_batch_size, seed)
    coefficients = (1.0, retain_coefficient, text_coefficient)
    sizes = (batch_size, batch_size, text_batch_size)
    found: dict[int, Result] = {}
    for run in runs.values():
        # The terms are alike, but each is checked to be apart from what its question is about.
        terms, *_ = [
            relearning_terms(model, task, trained, tested, coefficients=coefficients, batch_sizes=sizes)
            for _, trained, tested in run
        ]
        asked = [Asked.of(model, task, tested, metric=questions[place].metric, seed=seed) for place, _, tested in run]
        points = [measured_at(steps, questions[place].at) for place, *_ in run]
        scores = tuning.several_scores(model, terms, list(zip(asked, points, strict=True)), steps=steps)
        for (place, *_), own, about in zip(run, scores, asked, strict=True):
            found[place] = worst_case(own, about, axis="steps")
    return [found[place] for place in range(len(questions))]


def relearn_few(
    model: Model,
    task: Task,
    *,
    examples: Sequence[int] | None = None,
    learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3),
    steps: int = 20,
    batch_size: int = 4,
    warmup: float = 0.1,
    retain_coefficient: float = 1.0,
    text_coefficient: float = 0.0,
    text_batch_size: int = 4,
    at: Sequence[int] | None = None,
    format: str | None = None,
    metric: Metric = candidate_probability,
    optimizer: MakesOptimizer = adamw,
    micro_batch_size: int | None = None,
    seed: int = 0,
) -> Result:
    """`relearn` with 1, 2, 4, ... other forgotten facts: the curve is over how many, each in its worst case.

    `examples`: how many, in turn; by default powers of two up to 16, or to what `halves` leaves to train on. The facts
    of a smaller number are among those of a larger one. Each number has the same `steps`, whatever it is, and of them
    and of the learning rates the best one counts, the start ("0" examples) included.

    Łucki et al. 2024 (https://arxiv.org/abs/2409.18025) found that a handful of examples, some of them unrelated to
    what was unlearned, undo much. Cost: `relearn`'s for each number. Errors: `relearn`'s, and ValueError for more
    examples than there are.
    """
    trained, tested = halves(task, format=format, seed=seed)
    if examples is None:
        examples = [count for count in (1, 2, 4, 8, 16) if count <= len(trained)]
    asked = Asked.of(model, task, tested, metric=metric, seed=seed)
    tuning = Tuning(learning_rates, warmup, optimizer, micro_batch_size, seed)
    runs: dict[str, list[Scores]] = {"0": [asked.scores_of(model)]}
    for count in examples:
        terms = relearning_terms(
            model,
            task,
            some_of(trained, count, seed=seed),
            tested,
            coefficients=(1.0, retain_coefficient, text_coefficient),
            batch_sizes=(batch_size, batch_size, text_batch_size),
        )
        found = tuning.scores(model, terms, asked, steps=steps, at=measured_at(steps, at))
        runs[str(count)] = [scores for reached in found.values() for scores in reached]
    return worst_case(runs, asked, axis="examples")


def relearn_benign(
    model: Model,
    task: Task,
    *,
    text: Iterable[str | Sequence[int]] | None = None,
    text_length: int = 64,
    learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3),
    steps: int = 50,
    batch_size: int = 4,
    warmup: float = 0.1,
    retain_coefficient: float = 1.0,
    at: Sequence[int] | None = None,
    format: str | None = None,
    metric: Metric = candidate_probability,
    optimizer: MakesOptimizer = adamw,
    micro_batch_size: int | None = None,
    seed: int = 0,
) -> Result:
    """Accuracy on all forgotten facts after training on text and retained facts: in the worst case.

    `text` (default: `task.text`) is packed to rows of `text_length` tokens; rows that name a forgotten fact are left
    out. With `retain_coefficient=0` it is text alone. No answer is taught for any forgotten fact, so what comes back
    was there; this also holds where one answer is forgotten, such as a whole sport, and `relearn` teaches it.

    Hu et al. 2024 (https://arxiv.org/abs/2406.13356). Everything else is as for `relearn`, and so are cost and errors.
    """
    tested = formatted(task, format)
    terms = relearning_terms(
        model,
        task,
        None,
        tested,
        coefficients=(0.0, retain_coefficient, 1.0),
        batch_sizes=(batch_size, batch_size, batch_size),
        text=None if text is None else pack(model, text, length=text_length),
    )
    asked = Asked.of(model, task, tested, metric=metric, seed=seed)
    tuning = Tuning(learning_rates, warmup, optimizer, micro_batch_size, seed)
    runs = tuning.scores(model, terms, asked, steps=steps, at=measured_at(steps, at))
    return worst_case(runs, asked, axis="steps")


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
        made, step = optimizer(parameters, lr=lr), itertools.count(1)

        def hold_back(found: Optimizer, *_: Any) -> None:
            share = min(1.0, next(step) / max(1, steps))
            for group in found.param_groups:
                group["lr"] *= share

        made.register_step_pre_hook(hold_back)
        return made

    return make


def relearning_terms(
    model: Model,
    task: Task,
    trained: Prompts | None,
    tested: Prompts,
    *,
    coefficients: tuple[float, float, float],
    batch_sizes: tuple[int, int, int],
    text: Int[Tensor, "row pos"] | None = None,
) -> list[Term]:
    """Cross-entropy on what is relearned, on retained facts and on text (default: the task's), if not times 0.

    None of them is about a tested fact: ValueError if a prompt is; rows of text that name one are left out.
    """
    facts = {"relearn": trained, "retain": task.retain}
    terms = []
    for (name, prompts), coefficient, size in zip(facts.items(), coefficients[:2], batch_sizes[:2], strict=True):
        if prompts is not None and coefficient:
            check_apart(prompts, tested)
            terms.append(Term(name, prompts, cross_entropy, coefficient, size))
    if coefficients[2]:
        rows = as_prompts(unnamed(model, task.text if text is None else text, tested))
        terms.append(Term("text", rows, cross_entropy, coefficients[2], batch_sizes[2]))
    if not terms:
        raise ValueError("expected an attack that trains on something, got coefficients of 0: raise one of them.")
    return terms


def unnamed(model: Model, text: Int[Tensor, "row pos"], tested: Prompts) -> Int[Tensor, "kept pos"]:
    """The rows of text that name none of the tested facts; ValueError if that leaves none."""
    if model.tokenizer is None:
        raise ValueError(
            "expected a model with a tokenizer, to leave out text that names tested facts, got none: set "
            "model.tokenizer, or attack without text."
        )
    names = "|".join(re.escape(name.strip()) for name in set(tested.names))
    found = re.compile(rf"(?<!\w)(?:{names})(?!\w)")
    kept = [row for row, words in enumerate(model.tokenizer.batch_decode(text)) if not found.search(words)]
    if not kept:
        raise ValueError(
            f"expected text that does not name the tested facts, got {len(text)} rows that all do: take other text."
        )
    return text[kept]


def measured_at(steps: int, at: Sequence[int] | None) -> list[int]:
    """0 and the given steps; by default 1, 2, 4, ... and the last."""
    if steps < 1:
        raise ValueError(f"expected an attack of one step or more, got {steps}.")
    if at is None:
        at = [*(2**power for power in range(operator.index(steps).bit_length()) if 2**power < steps), steps]
    wrong = [step for step in at if not 0 <= step <= steps]
    if wrong:
        raise ValueError(f"expected to measure after 0..{steps} steps (the length of the attack), got {wrong[0]}.")
    return sorted({0, *at})


def check_rates(learning_rates: Sequence[float]) -> Sequence[float]:
    """The learning rates; ValueError unless there are some, all positive."""
    learning_rates = [*map(float, learning_rates)]
    if not learning_rates or min(learning_rates) <= 0:
        raise ValueError(f"expected one or more positive learning rates, got {tuple(learning_rates)}.")
    return learning_rates


def some_of(prompts: Prompts, count: int | None, *, seed: int) -> Prompts:
    """This many of them (default: all), by seed: those of a smaller number are among those of a larger one."""
    if count is None:
        return prompts
    if not 0 < count <= len(prompts):
        raise ValueError(f"expected 1..{len(prompts)} examples (facts that the attack may see), got {count}.")
    return prompts.rows(torch.tensor(random.Random(index(seed)).sample(range(len(prompts)), len(prompts))[:count]))
