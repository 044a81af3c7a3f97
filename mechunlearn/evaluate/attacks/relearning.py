"""Relearning by full fine-tuning: on some forgotten facts, on a few of them, or on harmless text."""

import operator
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypedDict, Unpack

import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.evaluate.attacks.exam import Asked, Scores, check_apart, halves, worst_case
from mechunlearn.evaluate.results import Result
from mechunlearn.evaluate.scoring import side_of
from mechunlearn.losses import cross_entropy
from mechunlearn.metrics import Metric, candidate_probability
from mechunlearn.model import Model, differentiable
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task, text_of
from mechunlearn.tasks.text import as_prompts, pack
from mechunlearn.training import MakesOptimizer, Term, adamw, fit, warmup_schedule
from mechunlearn.weights import exclusively, read, write
from mechunlearn.weights.rounding import every_entry


class AttackOptions(TypedDict, total=False):
    """What every attack that trains takes. Of each option: type, default, sentence."""

    learning_rates: Annotated[
        Sequence[float],
        (1e-4, 3e-4, 1e-3),
        "There is a run for each learning rate, and at each point the best of them counts.",
    ]
    steps: Annotated[int, 100, "Each run takes this many steps."]
    batch_size: Annotated[int, 4, "A batch of facts has this many prompts."]
    micro_batch_size: Annotated[
        int | None, None, "This many prompts go through the model at once; None takes the whole batch."
    ]
    retain_coefficient: Annotated[float, 1.0, "The loss on retained facts is multiplied by it."]
    seed: Annotated[
        int, 0, "It decides which facts are trained on, the order of the batches, and whom the control asks about."
    ]


class QuestionOptions(TypedDict, total=False):
    """What the attacked model is asked, and when."""

    at: Annotated[
        Sequence[int] | None,
        None,
        "The facts are asked after these numbers of steps, by default 0, 1, 2, 4, ... and the last.",
    ]
    format: Annotated[str | None, None, "The facts are asked in this format of the task, by default the first."]
    metric: Annotated[Metric, candidate_probability, "The answers are scored by it."]


class TextOptions(TypedDict, total=False):
    """Text in the mix. Rows that name a tested fact are left out."""

    text_coefficient: Annotated[float, 0.0, "The loss on `task.text` is multiplied by it."]
    text_batch_size: Annotated[int, 4, "A batch of text has this many rows."]


class MixOptions(AttackOptions, TextOptions, total=False):
    """What every attack that trains on facts and text takes."""


class WeightOptions(TypedDict, total=False):
    """How all weights of attention and MLPs are trained."""

    warmup: Annotated[float, 0.1, "The learning rate rises for this share of the steps, then falls along a cosine."]
    optimizer: Annotated[MakesOptimizer, adamw, "A torch optimizer class, or any function of parameters and `lr`."]


class RunsOptions(MixOptions, WeightOptions, total=False):
    """The options of `relearn_and_ask`, which is given what to ask."""


class RelearnOptions(RunsOptions, QuestionOptions, total=False):
    """The options of `relearn` and `relearn_few`."""


class BenignOptions(AttackOptions, WeightOptions, QuestionOptions, total=False):
    """The options of `relearn_benign`, whose text has a coefficient of 1."""


class LoraOptions(MixOptions, QuestionOptions, total=False):
    """The options that `relearn_lora` shares with the other attacks that relearn."""


@with_options()
def relearn(model: Model, task: Task, **options: Unpack[RelearnOptions]) -> Result:
    """Accuracy on forgotten facts after training on *other* forgotten facts: the worst case over rates and steps.

        loss = relearned + retain_coefficient * retained + text_coefficient * text

    Each is a mean cross-entropy over answer tokens, in nats, on what `halves(task, seed=seed)` leaves to train on, on
    `task.retain` and on `task.text` without the rows that name a tested fact. The weight matrices of attention and MLPs
    are trained, nothing else. Gradients are clipped at norm 1.

    The curve has, at each step, the learning rate that does best there; the value is its highest point. A rate that
    diverges counts up to the step where it does. `control` has the same questions about strangers, put to the same
    attacked models: what the attack teaches to say about anybody. Retained facts keep that low.
    Where only one answer is forgotten (a whole sport), a model that never knew it may still learn it: attack that too.

    Deeb & Roger 2024 (https://arxiv.org/abs/2410.08827) train on relearned facts alone, with Lion, 24 steps of warm-up,
    6 epochs and rates in steps of 2. The default rates suit the shipped model; theirs for 7B-8B models are 1e-7 to
    3.2e-6. Cost: per rate and step F + B of each batch; F of the tested facts, twice, at each point.

    The weights are put back bit for bit, also after a failure, from a copy of those that are trained.
    ValueError for too few facts, an unknown format, prompts without names, processed or quantised weights.
    """
    question = Question(options.pop("format"), options.pop("metric"), options.pop("at"))
    return relearn_and_ask(model, task, [question], **options)[0]


@dataclass(frozen=True)
class Question:
    """What `relearn_and_ask` asks about the facts that it does not train on."""

    format: str | None = None
    """Of the task; by default the first."""
    metric: Metric = candidate_probability
    at: Sequence[int] | None = None
    """After how many steps; by default after 0, 1, 2, 4, ... and the last."""


@with_options()
def relearn_and_ask(
    model: Model, task: Task, questions: Sequence[Question], **options: Unpack[RunsOptions]
) -> list[Result]:
    """For each question what `relearn` gives with its format, metric and steps, bit for bit, but trained once for all.

    A format may lack facts, which leaves others to train on: questions share a run where what is trained on is the
    same. Everything else, cost and errors included, is as for `relearn`.
    """
    seed = options["seed"]
    sharing: dict[object, list[tuple[int, Prompts, Prompts]]] = {}
    for place, question in enumerate(questions):
        trained, tested = halves(task, format=question.format, seed=seed)
        named = frozenset(tested.names) if options["text_coefficient"] else None  # text that names them is left out
        sharing.setdefault((trained.names, named), []).append((place, trained, tested))
    results: dict[int, Result] = {}
    for run in sharing.values():
        terms: list[Term] = []
        for _, trained, tested in reversed(run):  # the first's terms remain; each is checked to be apart from its test
            terms = relearning_terms(model, task, trained, tested, options)
        asked = [Asked.of(model, task, tested, metric=questions[place].metric, seed=seed) for place, _, tested in run]
        points = [measured_at(options["steps"], questions[place].at) for place, *_ in run]
        scores = _scores(model, terms, list(zip(asked, points, strict=True)), options)
        for (place, *_), by_step, about in zip(run, scores, asked, strict=True):
            results[place] = worst_case(by_step, about, axis="steps")
    return [results[place] for place in range(len(questions))]


@with_options(steps=20)
def relearn_few(
    model: Model, task: Task, *, examples: Sequence[int] | None = None, **options: Unpack[RelearnOptions]
) -> Result:
    """`relearn` with 1, 2, 4, ... other forgotten facts: the curve is over how many, each in its worst case.

    `examples`: how many, in turn; by default powers of two up to 16, or to what `halves` leaves to train on. The facts
    of a smaller number are among those of a larger one. Each number has the same `steps`, whatever it is, and of them
    and of the learning rates the best one counts, the start ("0" examples) included.

    Łucki et al. 2024 (https://arxiv.org/abs/2409.18025) found that a handful of examples, some of them unrelated to
    what was unlearned, undo much. Cost: `relearn`'s for each number.
    """
    trained, tested = halves(task, format=options["format"], seed=options["seed"])
    if examples is None:
        examples = [count for count in (1, 2, 4, 8, 16) if count <= len(trained)]
    asked = Asked.of(model, task, tested, metric=options["metric"], seed=options["seed"])
    runs: dict[str, list[Scores]] = {"0": [asked.scores_of(model)]}
    for count in examples:
        terms = relearning_terms(model, task, some_of(trained, count, seed=options["seed"]), tested, options)
        points = measured_at(options["steps"], options["at"])
        (by_step,) = _scores(model, terms, [(asked, points)], options)
        runs[str(count)] = [scores for reached in by_step.values() for scores in reached]
    return worst_case(runs, asked, axis="examples")


@with_options(steps=50)
def relearn_benign(
    model: Model,
    task: Task,
    *,
    text: Iterable[str | Sequence[int]] | None = None,
    text_length: int = 64,
    **options: Unpack[BenignOptions],
) -> Result:
    """Accuracy on all forgotten facts after training on text and retained facts: in the worst case.

    `text` (default: `task.text`) is packed to rows of `text_length` tokens; rows that name a forgotten fact are left
    out. A batch of it has `batch_size` rows. With `retain_coefficient=0` it is text alone. No answer is taught for any
    forgotten fact, so what comes back was there; this also holds where one answer is forgotten, such as a whole sport,
    and `relearn` teaches it.

    Hu et al. 2024 (https://arxiv.org/abs/2406.13356). Everything else, cost and errors included, is as for `relearn`.
    """
    tested = side_of(task, format=options["format"])
    rows = None if text is None else pack(model, text, length=text_length)
    mix: MixOptions = {**options, "text_coefficient": 1.0, "text_batch_size": options["batch_size"]}
    terms = relearning_terms(model, task, None, tested, mix, text=rows)
    asked = Asked.of(model, task, tested, metric=options["metric"], seed=options["seed"])
    (runs,) = _scores(model, terms, [(asked, measured_at(options["steps"], options["at"]))], options)
    return worst_case(runs, asked, axis="steps")


def _scores(
    model: Model,
    terms: Sequence[Term],
    questions: Sequence[tuple[Asked, Sequence[int]]],
    options: BenignOptions | RunsOptions,
) -> list[dict[str, list[Scores]]]:
    """For each question and its steps: step -> the scores of every run (learning rate) that did not diverge before."""
    answers: list[dict[str, list[Scores]]] = [{str(step): [] for step in at} for _, at in questions]
    for by_step, (asked, _) in zip(answers, questions, strict=True):
        by_step["0"] = [asked.scores_of(model)]

    def on_step(row: Mapping[str, Any]) -> None:
        done = row["step"] + 1
        for by_step, (asked, at) in zip(answers, questions, strict=True):
            if done in at:
                by_step[str(done)].append(asked.scores_of(model))

    entries = every_entry(model)
    original = read(entries)
    for rate in check_rates(options["learning_rates"]):
        try:
            with exclusively(model), differentiable(model), suppress(FloatingPointError):
                fit(
                    model,
                    entries,
                    terms,
                    original=original,
                    steps=options["steps"],
                    learning_rate=rate,
                    schedule=partial(warmup_schedule, share=options["warmup"]),
                    optimizer=options["optimizer"],
                    micro_batch_size=options["micro_batch_size"],
                    seed=options["seed"],
                    progress=False,
                    on_step=on_step,
                )
        finally:
            write(entries, original)
    return answers


def relearning_terms(
    model: Model,
    task: Task,
    trained: Prompts | None,
    tested: Prompts,
    options: MixOptions,
    *,
    coefficient: float = 1.0,
    text: Int[Tensor, "row pos"] | None = None,
) -> list[Term]:
    """Cross-entropy on what is relearned (times `coefficient`), on retained facts and on text (default: the task's).

    None of them is about a tested fact: ValueError if a prompt is; rows of text that name one are left out.
    """
    terms = []
    facts = (("relearn", trained, coefficient), ("retain", task.retain, options["retain_coefficient"]))
    for name, prompts, factor in facts:
        if prompts is not None and factor:
            check_apart(prompts, tested)
            terms.append(Term(name, prompts, cross_entropy, factor, options["batch_size"]))
    if options["text_coefficient"]:
        rows = as_prompts(unnamed(model, text_of(task) if text is None else text, tested))
        terms.append(Term("text", rows, cross_entropy, options["text_coefficient"], options["text_batch_size"]))
    for term in terms:
        assert isinstance(term.prompts, Prompts)
        term.prompts.check_length(model)
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
    name = re.compile(rf"(?<!\w)(?:{names})(?!\w)")
    kept = [row for row, words in enumerate(model.tokenizer.batch_decode(text)) if not name.search(words)]
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
    order = random.Random(operator.index(seed)).sample(range(len(prompts)), len(prompts))
    return prompts.rows(torch.tensor(order[:count]))
