"""Prompts and texts that are longer than the model's context are refused, before any work, by everything that takes
them: rotary models would give numbers for them without a word."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.edit.inject.facts import in_contexts
from mechunlearn.evaluate.attacks.few_shot import shown_before
from mechunlearn.tasks import Prompts

CONTEXT = 64
REFUSED = rf"of at most {CONTEXT} tokens, the model's context \(cfg.n_ctx\), got {CONTEXT + 1}: shorten them; if"
"""What is refused is longer by one token."""


class WorkError(Exception):
    """A forward pass."""


@pytest.fixture
def idle(llama: Any) -> Iterator[Any]:
    """A model that must not run."""

    def stop(module: Any, inputs: Any) -> None:
        raise WorkError

    with llama.blocks[0].register_forward_pre_hook(stop):
        yield llama


def words(n: int, *, subject: str = "w40") -> str:
    """A text of n tokens, BOS among them."""
    return " ".join([subject, *["w5"] * (n - 2)])


def text_of(model: Any, n: int, **options: Any) -> Prompts:
    """Prompts of n tokens, behind the builder's back."""
    before, model.cfg.n_ctx = model.cfg.n_ctx, 1000
    try:
        texts, answers = [words(n), words(n, subject="w41")], [" w6", " w7"]
        options = {"subjects": ["w40", "w41"], "candidates": [[" w6", " w7"], [" w7", " w6"]], **options}
        return mu.tasks.build(model, texts, answers, **options)
    finally:
        model.cfg.n_ctx = before


def too_long(model: Any) -> Prompts:
    return text_of(model, CONTEXT + 1, corrupt=[words(CONTEXT + 1, subject=other) for other in ("w42", "w43")])


def by_hand(_: Any) -> Prompts:
    tokens = torch.arange(2 * (CONTEXT + 1)).reshape(2, -1) % 90 + 4
    grid: dict[str, Any] = {
        "candidates": [[5, 6], [6, 5]],
        "corrupt": tokens.flip(1),
        "subject": tokens == tokens[:, 1:2],
    }
    return Prompts.of(tokens, [5, 6], **grid)


def with_long(model: Any, part: str) -> mu.Task:
    """A task in which one part alone is too long."""
    task, long = tiny.task(model), too_long(model)
    if part in ("text", "text_test"):
        return replace(task, text=torch.full((9, CONTEXT + 2), 5), text_test=torch.full((9, CONTEXT + 2), 5))
    if part == "format":
        return replace(
            task, formats={**task.formats, "question": mu.tasks.Format(long, task.formats["question"].retain)}
        )
    return replace(task, **{part: long})


BUILDERS: dict[str, Callable[[Any], Any]] = {
    "build": lambda m: mu.tasks.build(m, ["w4", words(CONTEXT + 1)], [" w5", " w6"]),
    "build, padding left": lambda m: mu.tasks.build(m, ["w4", words(CONTEXT + 1)], [" w5", " w6"], padding="left"),
    "build, a long answer": lambda m: mu.tasks.build(m, [words(CONTEXT)], [" w5 w6"]),
    "answered": lambda m: mu.tasks.answered(m, text_of(m, CONTEXT), " w5 w6"),
    "from_frame": lambda m: mu.tasks.from_frame(m, FRAME, prompt=words(CONTEXT - 1) + " {subject} w9", **SMALL),
    "from_frame, a format": lambda m: mu.tasks.from_frame(
        m, FRAME, prompt="{subject}", formats={"long": words(CONTEXT - 1) + " {subject} w9"}, **SMALL
    ),
    "from_frame, text": lambda m: mu.tasks.from_frame(
        m, FRAME, prompt="{subject}", **{**SMALL, "text": torch.full((9, CONTEXT + 2), 5)}
    ),
    "pack": lambda m: mu.tasks.pack(m, ["w5 " * 900], length=CONTEXT + 1),
    "rows_of": lambda m: mu.tasks.rows_of(m, ["w5 " * 900], length=CONTEXT + 1),
    "contexts": lambda m: in_contexts(m, text_of(m, CONTEXT - 1)[[0]], ["w5 w6"]),
    "prefixes": lambda m: mu.edit.generated_prefixes(m, lengths=(CONTEXT - 1,)),
    "demonstrations": lambda m: shown_before(m, text_of(m, CONTEXT + 1)[[0]], [[]]),
}  # fmt: skip
FRAME = pd.DataFrame({"subject": ["w10", "w11", "w12", "w13", "w14"], "answer": ["w50", "w51", "w52", "w50", "w51"]})
SMALL: dict[str, Any] = {"forget": 2, "train": 0.5, "text": ["w4 w5 w6 w7"] * 80, "corrupt": False}


@pytest.mark.parametrize("builder", BUILDERS)
def test_builders_refuse_what_is_too_long(idle: Any, builder: str) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        BUILDERS[builder](idle)


ON_PROMPTS: dict[str, Callable[[Any, Prompts], Any]] = {
    "knows": mu.tasks.knows,
    "accuracy": mu.evaluate.accuracy,
    "measure": lambda m, p: mu.evaluate.measure(m, p, [mu.metrics.answer_probability]),
    "continuations": lambda m, p: mu.evaluate.continuations(m, p, 1),
    "attribution_patching": mu.localize.attribution_patching,
    "relp": mu.localize.relp,
    "atp_star": mu.localize.atp_star,
    "integrated_gradients": mu.localize.integrated_gradients,
    "activation_patching": mu.localize.activation_patching,
    "activation_patching_by_position": mu.localize.activation_patching_by_position,
    "set_patching": lambda m, p: mu.localize.set_patching(m, p, {"one": ["L0MLP"]}),
    "path_patching": lambda m, p: mu.localize.path_patching(m, p, receivers=["L2MLP"]),
    "edge_patching": lambda m, p: mu.localize.edge_patching(m, p, edges=["L0MLP->L2MLP"]),
    "edge_attribution_patching": mu.localize.edge_attribution_patching,
    "causal_tracing": partial(mu.localize.causal_tracing, window=1),
    "direct_logit_attribution": mu.localize.direct_logit_attribution,
    "logit_lens": mu.localize.logit_lens,
    "fisher": mu.localize.fisher,
    "snip": mu.localize.snip,
    "gradient_times_weight": mu.localize.gradient_times_weight,
}


@pytest.mark.parametrize("made", [too_long, by_hand])
@pytest.mark.parametrize("method", ON_PROMPTS)
def test_methods_on_prompts_refuse_them(idle: Any, method: str, made: Any) -> None:
    prompts = made(idle)
    with pytest.raises(
        ValueError, match=rf"prompts .*{REFUSED}|leave room for 1 tokens in the model's context of {CONTEXT}"
    ):
        ON_PROMPTS[method](idle, prompts)


def mask(model: Any) -> mu.ComponentMask:
    return mu.ComponentMask.of(["L0MLP"], mu.shape(model))


ON_TASKS: dict[str, tuple[Callable[[Any, mu.Task], Any], tuple[str, ...]]] = {
    "finetune": (lambda m, t: mu.edit.finetune(m, t, mask(m)), ("forget", "retain", "text")),
    "lora": (lambda m, t: mu.edit.lora(m, t, mask(m)), ("forget", "retain", "text")),
    "finetune, inject": (lambda m, t: mu.edit.finetune(m, t, mask(m), inject=True), ("injection",)),
    "learn_weight_mask": (lambda m, t: mu.edit.learn_weight_mask(m, t, mask(m)), ("forget", "retain", "text")),
    "rome": (lambda m, t: mu.edit.rome(m, t, mask(m), prefixes=()), ("injection",)),
    "memit": (lambda m, t: mu.edit.memit(m, t, mask(m), prefixes=()), ("injection",)),
    "dampened": (lambda m, t: mu.edit.dampened(m, t, mask(m)), ("forget",)),
    "mean_ablated": (lambda m, t: mu.edit.mean_ablated(m, t, mask(m)), ("text",)),
    "in_format": (lambda m, t: mu.evaluate.in_format(m, t, name="question"), ("format",)),
    "generated": (lambda m, t: mu.evaluate.generated(m, t, format="question"), ("format",)),
    "text_loss": (mu.evaluate.text_loss, ("text_test",)),
    "text_kl": (lambda m, t: mu.evaluate.text_kl(m, t, original=lambda: None), ("text_test",)),  # type: ignore[arg-type]
    "knowledge": (mu.evaluate.knowledge, ("knowledge",)),
    "injected": (mu.evaluate.injected, ("injection",)),
    "relearn": (mu.evaluate.relearn, ("retain",)),
    "relearn, format": (lambda m, t: mu.evaluate.relearn(m, t, format="question"), ("format",)),
    "relearn_benign": (mu.evaluate.relearn_benign, ("retain", "text")),
    "few_shot": (lambda m, t: mu.evaluate.few_shot(m, t, format="question"), ("format",)),
    "soft_prompt": (lambda m, t: mu.evaluate.soft_prompt(m, t, format="question"), ("format",)),
    "compare": (
        lambda m, t: mu.evaluate.compare(m, t, {}, metrics={"loss": mu.evaluate.text_loss}),
        ("forget", "retain", "format", "text", "text_test", "knowledge", "injection"),
    ),
}


@pytest.mark.parametrize(("verb", "part"), [(verb, part) for verb, (_, parts) in ON_TASKS.items() for part in parts])
def test_verbs_refuse_a_task_with_a_part_that_is_too_long(idle: Any, verb: str, part: str) -> None:
    task = with_long(idle, part)
    message = (
        rf"{REFUSED.replace(str(CONTEXT + 1), '6[5-9]')}|leave room for . tokens in the model's context of {CONTEXT}"
    )
    with left_as_it_was(idle), pytest.raises(ValueError, match=message):
        ON_TASKS[verb][0](idle, task)


def test_vectors_that_make_prompts_too_long_are_refused_before_they_are_learned(idle: Any) -> None:
    task = tiny.task(idle)
    with pytest.raises(ValueError, match=r"prompts, with 60 vectors before them, of at most 64 tokens"):
        mu.evaluate.soft_prompt(idle, task, n_vectors=60)


def test_a_prompt_as_long_as_the_context_is_taken(model: Any) -> None:
    before, model.cfg.n_ctx = model.cfg.n_ctx, CONTEXT
    try:
        prompts = text_of(model, CONTEXT)
        assert torch.isfinite(mu.evaluate.measure(model, prompts, [mu.metrics.answer_probability])[0].per_example).all()
        text = mu.tasks.as_prompts(torch.full((2, CONTEXT + 1), 5))
        assert torch.isfinite(text.on(model).logits(model)).all()
    finally:
        model.cfg.n_ctx = before


def test_a_forward_of_one_s_own_is_refused_too(llama: Any) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        by_hand(llama).logits(llama)
