"""Relearning by LoRA on an exported copy: train on some forgotten facts, ask about the others."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from mechunlearn.evaluate.attacks.exam import Asked, Scores, halves, named_and_others, worst_case
from mechunlearn.evaluate.attacks.relearning import LoraOptions, check_rates, measured_at, relearning_terms, some_of
from mechunlearn.evaluate.results import Result
from mechunlearn.model import Model, differentiable
from mechunlearn.model.huggingface import exported, exported_logits
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task
from mechunlearn.training import Term
from mechunlearn.training.terms import shuffled


@with_options(learning_rates=(2e-4,), steps=20, batch_size=32, text_coefficient=1.0, text_batch_size=16)
def relearn_lora(
    model: Model,
    task: Task,
    *,
    rank: int = 512,
    alpha: float = 32.0,
    dropout: float = 0.05,
    examples: int | Sequence[str] | None = None,
    relearn_coefficient: float = 1.0,
    **options: Unpack[LoraOptions],
) -> Result:
    """Accuracy on forgotten facts after LoRA training on *other* forgotten facts: the worst case over rates and steps.

        loss = relearn_coefficient * relearned + retain_coefficient * retained + text_coefficient * text

    as for `relearn`, whose words on the curve, `control` and divergence hold here too. PEFT trains a copy of the
    model, exported to a temporary folder that is removed whatever happens: adapters on all linear layers but the
    unembedding, AdamW without weight decay, cosine schedule, no clipping. Dropout acts on the adapters' inputs alone.
    `examples`: train on this many of the forgotten facts only; or on those of these names, and ask about all others.

    The defaults are those of Guo et al. 2025 (https://arxiv.org/abs/2410.12949) for 7B-9B models; `relearn_halves` and
    `relearn_two_facts` are their two protocols by name. A small model needs larger rates: on the shipped one, pass for
    example `learning_rates=(1e-3, 3e-3)`. Cost: the copy (its memory too), and per rate and step F + B of each batch.

    It needs PEFT (`pip install 'mechunlearn[peft]'`). ValueError for a `HookedTransformer`, which cannot be exported
    (`relearn` takes one).
    """
    adapted, seed = _peft(rank, alpha, dropout), options["seed"]
    if isinstance(examples, Sequence):
        trained, tested = named_and_others(task, examples, format=options["format"])
    else:
        trained, tested = halves(task, format=options["format"], seed=seed)
        trained = some_of(trained, examples, seed=seed)
    terms = relearning_terms(model, task, trained, tested, options, coefficient=relearn_coefficient)
    asked = Asked.of(model, task, tested, metric=options["metric"], seed=seed)
    runs: dict[str, list[Scores]] = {str(step): [] for step in measured_at(options["steps"], options["at"])}
    with differentiable(model), exported(model) as copy:
        for rate in check_rates(options["learning_rates"]):
            with adapted(copy, seed) as factors:
                for step, scores in _scores_in_training(copy, terms, factors, rate, options, asked):
                    runs[str(step)].append(scores)
    return worst_case(runs, asked, axis="steps")


relearn_halves = partial(relearn_lora, at=(0, 10, 20))
"""The relearning of Guo et al. 2025 (https://arxiv.org/abs/2410.12949): one half for 20 iterations at rank 512."""

relearn_two_facts = partial(
    relearn_lora, examples=2, rank=64, learning_rates=(1e-4,), steps=10, relearn_coefficient=0.2, at=range(11)
)
"""That of its workshop version: two facts for 10 iterations at rank 64. Its own are `examples=("Boris Diaw", "Jae
Crowder")` where basketball is forgotten, and ("DeForest Buckner", "Walter Payton") where athletes are."""


def _peft(rank: int, alpha: float, dropout: float) -> Callable[..., Any]:
    """A context that adds adapters to a Hugging Face model and takes them away."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            "expected peft for relearning by LoRA, got none installed: pip install 'mechunlearn[peft]', or use "
            "mu.evaluate.relearn, which trains the weights themselves."
        ) from error
    settings = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": "all-linear"}

    @contextmanager
    def adapted(copy: Any, seed: int) -> Iterator[list[nn.Parameter]]:
        """Inside, the copy has adapters, whose parameters these are."""
        with torch.random.fork_rng():
            torch.manual_seed(operator.index(seed))
            wrapped = get_peft_model(copy, LoraConfig(**settings))
            try:
                yield [p for p in wrapped.parameters() if p.requires_grad]
            finally:
                wrapped.unload()

    return adapted


def _scores_in_training(
    copy: Any, terms: Sequence[Term], factors: list[nn.Parameter], rate: float, options: LoraOptions, asked: Asked
) -> Iterator[tuple[int, Scores]]:
    """The scores after each step that is measured, for as long as logits and losses are finite.

    The adapters are trained by AdamW without weight decay, with a cosine schedule and no clipping.
    """
    at = measured_at(options["steps"], options["at"])
    optimizer = torch.optim.AdamW(factors, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options["steps"])
    batches = [(term, shuffled(term, _prompts(term), options["seed"])) for term in terms]

    def logits(prompts: Prompts) -> Tensor:
        return exported_logits(copy, prompts.tokens, prompts.attention_mask, prompts.positions)

    def backward(term: Term, batch: Prompts) -> None:
        """The gradient of a term on a batch, a mean over its answer tokens."""
        total = int(batch.answer_mask.sum())
        for part in batch.batches(options["micro_batch_size"] or len(batch)):
            part = part.to(copy.device)
            values = term.loss(logits=logits(part)[part.answer_mask], targets=part.answers[part.answer_mask])
            loss = term.coefficient * values.sum() / total
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"expected a finite {term.name} loss, got {loss.item()}.")
            loss.backward()

    try:
        for step in range(options["steps"] + 1):
            if step in at:
                _drop(copy, False)
                yield step, asked.scores(logits)
            if step < options["steps"]:
                _drop(copy, True)
                for term, rows in batches:
                    backward(term, _prompts(term).rows(next(rows)))
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    except FloatingPointError:
        return


def _drop(copy: nn.Module, dropping: bool) -> None:
    """Whether the adapters' dropout is in training mode, as nothing else of the copy is."""
    for name, module in copy.named_modules():
        module.training = dropping and "lora_dropout" in name


def _prompts(term: Term) -> Prompts:
    assert isinstance(term.prompts, Prompts)
    return term.prompts
