"""Real runs of lm-evaluation-harness on local documents, against the package's numbers and the harness's own model."""

import json
import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.evaluate import harness_model, lm_eval_task
from mechunlearn.model.tokens import encode

pytest.importorskip("lm_eval")

LETTERS = ["A", "B", "C", "D"]


def local(folder, documents, **config):
    """A task of the harness on these documents, from a JSONL file, without a network."""
    path = folder / "documents.jsonl"
    path.write_text("\n".join(json.dumps(document) for document in documents))
    files = {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")}
    return {"task": "local", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **config}


def choices(folder, prompts, answers, **config):
    documents = [{"text": t, "label": LETTERS.index(a)} for t, a in zip(prompts.texts, answers, strict=True)]
    asked = {"doc_to_text": "text", "doc_to_choice": LETTERS, "doc_to_target": "label"}
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    return local(folder, documents, output_type="multiple_choice", metric_list=metrics, **asked, **config)


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.fixture(scope="module")
def questions(shipped):
    prompts = mu.tasks.general_knowledge(shipped, n=40)
    return prompts, [shipped.tokenizer.decode([token]).strip() for token in prompts.answers[:, 0].tolist()]


@pytest.fixture(scope="module")
def damage(shipped):
    """An edit after which most answers are wrong, but not all."""
    return mu.edit.zeroed(shipped, mu.ComponentMask.of(["L0MLP"], mu.shape(shipped)))


def test_the_harness_finds_what_our_own_multiple_choice_finds(shipped, questions, damage, tmp_path):
    prompts, answers = questions
    config, right = choices(tmp_path, prompts, answers), []
    for edited in (nullcontext(shipped), damage.applied(shipped)):
        with edited as model:
            ours = mu.evaluate.accuracy(model, prompts).candidates
            with left_as_it_was(model):
                found = lm_eval_task(model, name=config)
        assert found.per_example.tolist() == ours.per_example.tolist()
        assert (found.chance, found.unit) == (0.25, "share")
        assert found.names == tuple(f"local/{i}" for i in range(40))
        right.append(found.value)
    assert right[0] > 0.9
    assert 0 < right[1] < 0.6


def test_each_log_likelihood_is_that_of_the_harness_own_model_on_an_export(shipped, questions, tmp_path_factory):
    """Choices, continuations of many tokens, no context, too long a context, whole texts, greedy generation."""
    from lm_eval.models.huggingface import HFLM

    path = tmp_path_factory.mktemp("export") / "model"
    mu.model.save_huggingface(shipped, path)
    theirs = HFLM(pretrained=str(path), device="cpu", batch_size=4, dtype="float32")
    ours = harness_model(shipped, batch_size=4)
    assert theirs.max_length == ours.max_length == shipped.cfg.n_ctx
    prompts = questions[0]
    asked = [(text, f" {letter}") for text in prompts.texts[:6] for letter in LETTERS]
    asked += [("Fact: LeBron James plays", " the sport of basketball"), ("", "The dog ran home."), ("The dog ", "ran")]
    asked += [("The dog ran home. " * 90, "The end.")]
    with pytest.warns(UserWarning, match="longer than the model's context"):
        mine = ours.loglikelihood(requests(*asked))
    other = theirs.loglikelihood(requests(*asked), disable_tqdm=True)
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in other], abs=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
    assert {True, False} == {greedy for _, greedy in mine}

    theirs.add_bos_token = False  # it would score the BOS as a part of the text
    texts = [("The dog ran home, for it was late.",), ("Once upon a time a fox lived in a wood. " * 40,)]
    whole = theirs.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests(*texts)) == pytest.approx(whole, rel=1e-5)

    theirs.add_bos_token = None
    said = [(text, {"until": ["\n", "."], "max_gen_toks": n}) for text in prompts.texts[:2] for n in (2, 7)]
    said += [("Fact: LeBron James plays the sport of", {"max_gen_toks": 3})]
    assert ours.generate_until(requests(*said)) == theirs.generate_until(requests(*said), disable_tqdm=True)


def test_log_likelihoods_by_hand_on_every_architecture(model):
    """One request at a time, by plain logits; the requests differ in length, so that batches are padded."""
    asked = [("w5 w6 w7", " w8"), ("w5 w6 w7", " w9"), ("w20", " w21 w22"), ("w5 w6 w7 w8 w9 w10", " w11 w12 w13")]
    with left_as_it_was(model):
        found = harness_model(model, batch_size=3).loglikelihood(requests(*asked))
        one = harness_model(model, batch_size=1).loglikelihood(requests(*asked))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in one], abs=1e-5)
    for (context, continuation), (value, greedy) in zip(asked, found, strict=True):
        tokens, n = list(encode(model, context + continuation).tokens), len(continuation.split())
        with torch.no_grad():
            log_probabilities = model(torch.tensor([tokens[:-1]]))[0, -n:].log_softmax(-1)
        expected = sum(float(row[token]) for row, token in zip(log_probabilities, tokens[-n:], strict=True))
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == (log_probabilities.argmax(-1).tolist() == tokens[-n:])


@pytest.mark.classes
def test_greedy_generation_by_hand_on_every_architecture(every_model):
    """Rows of three lengths, of which one is to say fewer tokens; the stop string is the third word of the first."""
    texts, limits = ("w5 w6 w7", "w20", "w5 w6 w7 w8 w9 w10"), (7, 5, 2)

    def by_hand(text, n):
        tokens = list(encode(every_model, text).tokens)
        start = len(tokens)
        while len(tokens) < start + n and 2 not in tokens[start:]:
            tokens.append(int(every_model(torch.tensor([tokens]))[0, -1].argmax()))
        return every_model.tokenizer.decode(tokens[start:], skip_special_tokens=True)

    ours = harness_model(every_model)
    expected = [by_hand(text, n) for text, n in zip(texts, limits, strict=True)]
    asked = [(text, {"until": [], "max_gen_toks": n}) for text, n in zip(texts, limits, strict=True)]
    with left_as_it_was(every_model):
        assert ours.generate_until(requests(*asked)) == expected
    stop = expected[0].split()[2]
    asked[0] = (texts[0], {"until": [stop], "max_gen_toks": 7})
    assert ours.generate_until(requests(*asked)) == [expected[0].split(stop)[0], *expected[1:]]


def test_choices_of_one_token_share_a_forward(llama):
    rows = []
    with llama.hooks(fwd_hooks=[("hook_embed", lambda value, hook: rows.append(len(value)))]):
        harness_model(llama).loglikelihood(requests(*[("w5 w6", f" w{i}") for i in range(10, 14)], ("w5", " w10")))
    assert rows == [2]


def test_free_generation_with_a_filter_and_no_effect_on_random_numbers(shipped, tmp_path, unchecked):
    """Known athletes are answered; a second filter looks for digits. (Beartype, too, takes random numbers.)"""
    people = [("LeBron James", "basketball"), ("Tom Brady", "football"), ("Derek Jeter", "baseball")]
    documents = [{"text": f"Fact: {name} plays the sport of", "sport": sport} for name, sport in people]
    read = [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]
    none = [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}]
    config = local(
        tmp_path,
        documents,
        output_type="generate_until",
        doc_to_text="text",
        doc_to_target="sport",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 3},
        metric_list=[{"metric": "exact_match"}],
        filter_list=[{"name": "word", "filter": read}, {"name": "digits", "filter": none}],
    )
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with left_as_it_was(shipped):
        found = lm_eval_task(shipped, name=config, metric="exact_match")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert (found.per_example.tolist(), found.chance) == ([1.0] * 3, None)
    assert lm_eval_task(shipped, name=config, metric="exact_match", filter="digits", limit=2).value == 0.0
    with pytest.raises(ValueError, match=r"expected a filter of the task \(word, digits\), got 'letters'"):
        lm_eval_task(shipped, name=config, metric="exact_match", filter="letters")


def test_examples_are_put_before_the_question_when_asked_for(shipped, questions, tmp_path):
    """And more documents than fit: the error comes from the model's context, and the model is as it was."""
    prompts, answers = questions
    config = choices(tmp_path, prompts[:4], answers[:4], fewshot_split="test")
    plain, with_example = lm_eval_task(shipped, name=config), lm_eval_task(shipped, name=config, num_fewshot=1)
    assert plain.names == with_example.names
    with pytest.raises(ValueError, match=r"expected a metric .* \(acc, acc_norm\), got 'f1'"):
        lm_eval_task(shipped, name=config, metric="f1")
    long = {**config, "doc_to_choice": ["the dog " * 300, "a"], "doc_to_target": 0}
    with left_as_it_was(shipped), pytest.raises(ValueError, match="expected a continuation of 1 to 256 tokens"):
        lm_eval_task(shipped, name=long)


def test_tasks_that_are_unknown_or_not_on_this_machine_say_so(llama, monkeypatch):
    """In an index of the harness's folder of MMLU alone: that of all its tasks takes seconds."""
    import lm_eval.tasks as harness

    index = harness.TaskManager(include_path=Path(harness.__file__).parent / "mmlu", include_defaults=False)
    monkeypatch.setattr("mechunlearn.evaluate.harness._tasks", lambda named: index)
    with pytest.raises(ValueError, match=r"expected a task of lm-eval.* got 'mmlu_anatom'.*mean .*mmlu_anatomy"):
        lm_eval_task(llama, name="mmlu_anatom")
    with pytest.raises(ConnectionError, match="expected the documents of 'mmlu_anatomy' on this machine"):
        lm_eval_task(llama, name="mmlu_anatomy")
