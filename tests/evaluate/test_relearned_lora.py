"""LoRA as an attack: on a copy of which nothing stays, and never on what it is tested on."""

import re
import sys
import tempfile
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from conftest import HAS_HOOKED, shared
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.evaluate import halves, measure
from mechunlearn.evaluate.attacks import relearning_lora
from mechunlearn.evaluate.attacks.relearning_lora import relearn_halves, relearn_lora, relearn_two_facts
from mechunlearn.evaluate.scoring import side_of
from mechunlearn.metrics import candidate_probability

quick = partial(relearn_lora, rank=4, learning_rates=(0.05,), steps=2, batch_size=4, text_batch_size=2)


def curve(result):
    assert result.curve is not None
    return result.curve


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_every_architecture_is_attacked_and_nothing_stays(architecture, folder):
    """The files are there while it runs (tests/model/test_exported.py), and gone after."""
    model = shared("bridge", architecture)
    task, modules = tiny.task(model), [name for name, _ in model.named_modules()]
    random = torch.get_rng_state()
    with left_as_it_was(model):
        found = quick(model, task)
    before = measure(model, halves(task)[1], [candidate_probability])[0]
    assert curve(found).points == ("0", "1", "2")
    assert torch.allclose(curve(found).per_prompt[:, 0], before.per_example, atol=1e-4)
    assert not torch.allclose(curve(found).per_prompt[:, -1], before.per_example, atol=1e-3)
    assert (found.names, found.chance, found.sense) == (before.names, before.chance, before.sense)
    assert [name for name, _ in model.named_modules()] == modules
    assert not list(folder.iterdir())
    assert torch.equal(torch.get_rng_state(), random)


def test_nothing_stays_after_an_interrupt(llama, folder):
    calls = []

    def interrupting(logits, prompts):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return candidate_probability(logits, prompts)

    with left_as_it_was(llama), pytest.raises(KeyboardInterrupt):
        quick(llama, tiny.task(llama), metric=interrupting)
    assert not list(folder.iterdir())


def test_each_rate_starts_anew_and_the_best_counts(llama):
    """Also with dropout, whose random numbers the seed fixes."""
    task = tiny.task(llama)
    first, second = (curve(quick(llama, task, learning_rates=(rate,))) for rate in (0.01, 0.05))
    grid = curve(quick(llama, task, learning_rates=(0.01, 0.05)))
    assert torch.allclose(grid.mean, torch.maximum(first.mean, second.mean), atol=1e-6)
    assert not torch.allclose(first.mean, second.mean, atol=1e-4)


def test_two_steps_are_those_of_a_loop_written_out(llama):
    """With all prompts in each batch, no dropout, and the rates of a cosine over two steps: 1 and 1/2 of the first."""
    from peft import LoraConfig, get_peft_model

    task = tiny.task(llama)
    trained, tested = halves(task)
    options: dict[str, Any] = {"dropout": 0.0, "batch_size": 100, "retain_coefficient": 0.5, "text_coefficient": 0.0}
    found = quick(llama, task, **options)
    copy, settings = tiny.huggingface("llama"), LoraConfig(r=4, lora_alpha=32, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(copy, settings)

    def logits(prompts):
        every = adapted(input_ids=prompts.tokens, attention_mask=prompts.attention_mask.long()).logits
        return every[torch.arange(len(prompts))[:, None], prompts.positions]

    factors = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, weight_decay=0.0)
    for rate in (0.05, 0.025):
        optimizer.param_groups[0]["lr"] = rate
        losses = [torch.nn.functional.cross_entropy(logits(p)[:, 0], p.answers[:, 0]) for p in (trained, task.retain)]
        optimizer.zero_grad()
        (losses[0] + 0.5 * losses[1]).backward()
        optimizer.step()
    expected = candidate_probability(logits(tested).detach(), tested)
    assert torch.allclose(curve(found).per_prompt[:, -1], expected, atol=1e-4)


def test_no_batch_names_what_is_tested(shipped, monkeypatch):
    task = mu.tasks.sports_facts(shipped, forget=8)
    seen, compute = [], relearning_lora.exported_logits

    def recording(copy, tokens, mask, positions):
        if torch.is_grad_enabled():
            seen.extend(shipped.tokenizer.batch_decode(tokens))
        return compute(copy, tokens, mask, positions)

    monkeypatch.setattr(relearning_lora, "exported_logits", recording)
    found = quick(shipped, task)
    assert not [text for text in seen if any(tested in text for tested in found.names)]
    trained = set(task.forget.names) - set(found.names)
    assert all(any(name in text for text in seen) for name in trained)


def test_the_papers_protocols(llama, monkeypatch):
    """Rank, steps and points by name; two facts are seen of all."""
    sizes, compute = [], relearning_lora.relearning_terms

    def recording(model, task, trained, tested, *table, **options):
        terms = compute(model, task, trained, tested, *table, **options)
        sizes.append((len(trained), tuple(term.coefficient for term in terms)))
        return terms

    monkeypatch.setattr(relearning_lora, "relearning_terms", recording)
    task = tiny.task(llama)
    halved = relearn_halves(llama, task, rank=4)
    two = relearn_two_facts(llama, task, rank=4)
    assert curve(halved).points == ("0", "10", "20")
    assert curve(two).points == tuple(str(step) for step in range(11))
    assert sizes == [(len(halves(task)[0]), (1.0, 1.0, 1.0)), (2, (0.2, 1.0, 1.0))]
    assert relearn_two_facts.keywords["rank"] == 64


def test_named_facts_are_those_that_it_sees_and_all_others_are_asked(llama, monkeypatch):
    seen, compute = [], relearning_lora.relearning_terms

    def recording(model, task, trained, tested, *table, **options):
        seen.append((trained.names, tested.names))
        return compute(model, task, trained, tested, *table, **options)

    monkeypatch.setattr(relearning_lora, "relearning_terms", recording)
    task = tiny.task(llama)
    tested = side_of(task).names
    pair = tuple(dict.fromkeys(task.forget.names))[:2]
    found = relearn_two_facts(llama, task, rank=4, examples=pair, steps=1, at=(0, 1))
    [(trained, others)] = seen
    assert set(trained) == set(pair)
    assert others == found.names == tuple(name for name in tested if name not in pair)
    for names in ("one name", [], ["nobody of this name"]):
        with pytest.raises(ValueError, match="expected a list of names of facts to forget"):
            relearn_lora(llama, task, examples=names)


@pytest.mark.classes
@pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
def test_a_hooked_transformer_is_refused(folder):
    model = shared("hooked", "llama")
    with left_as_it_was(model), pytest.raises(ValueError, match="expected a TransformerBridge"):
        quick(model, tiny.task(model))
    assert not list(folder.iterdir())


def test_without_peft_the_error_names_the_extra(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with left_as_it_was(llama), pytest.raises(ImportError, match=r"mechunlearn\[peft\]"):
        quick(llama, tiny.task(llama))


def test_bad_input(llama, unchecked):
    task = tiny.task(llama)
    cases: dict[str, dict[str, Any]] = {
        "expected 1..6 examples": {"examples": 7},
        "one or more positive learning rates": {"learning_rates": ()},
        "trains on something": {"relearn_coefficient": 0, "retain_coefficient": 0, "text_coefficient": 0},
        "measure after 0..2 steps": {"at": (3,)},
    }
    for message, options in cases.items():
        with left_as_it_was(llama), pytest.raises(ValueError, match=re.escape(message)):
            quick(llama, task, **options)
