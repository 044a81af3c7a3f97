import sys
from contextlib import nullcontext
from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.evaluate import accuracy, continuations, extraction_strength, generated, says
from mechunlearn.evaluate.generation import greedy
from mechunlearn.model import logits_at, preserved
from mechunlearn.model.running import kept_in_cache, last_logits
from mechunlearn.tasks import Format, build, facts, sports_facts
from mechunlearn.tasks.building import padded

TEXT = ["The rain fell softly on the roof all night. " * 40] * 3
SAID = {
    "w4": "w10 w50 w50",  # the answer, then anything
    "w5 w6": "w20 w21 <eos>",  # both tokens of the answer, and the end
    "w7": "w30 w99 w31",  # the second token is wrong, with the first one given or not
    "w8 w9": "w99 w41 w42",  # the second would be right if the first were given
}
ANSWERS = (" w10", " w20 w21", " w30 w31", " w40 w41")


@pytest.fixture
def toy(llama, monkeypatch):
    """Four prompts, and a model that continues them by heart."""
    ids = {text: llama.tokenizer.encode(text) for text in SAID}
    lines = [ids[text] + llama.tokenizer.encode(said, add_special_tokens=False) for text, said in SAID.items()]

    def by_heart(model, tokens, mask, positions, **options):
        assert mask.gather(1, positions).all()
        logits = torch.zeros(len(tokens), 1, tiny.N_VOCAB)
        for row, (own, place) in enumerate(zip(tokens, positions[:, 0], strict=True)):
            assert mask[row, : int(place) + 1].all()
            seen = own[: int(place) + 1].tolist()
            line = next((line for line in lines if line[: len(seen)] == seen), None)
            logits[row, 0, 3 if line is None or len(line) == len(seen) else line[len(seen)]] = 5.0
        return logits

    module = sys.modules[generated.__module__]
    monkeypatch.setattr(module, "logits_at", by_heart)
    monkeypatch.setattr(module, "_NewTokens", module._WholeRows)
    prompts = build(llama, list(SAID), ANSWERS, subjects=list(SAID))
    return replace(tiny.task(llama), formats={"toy": Format(prompts, prompts)})


@pytest.mark.parametrize("size", [1, 3, 4])
def test_four_examples_by_hand(llama, toy, size):
    found = generated(llama, toy, batch_size=size)
    assert found.per_example.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert (found.value, found.chance, found.unit) == (0.5, 0.0, "share")
    assert found.names == tuple(SAID)
    said = continuations(llama, toy.formats["toy"].forget, 3, batch_size=size)
    assert said == ("w10 w50 w50", "w20 w21", "w30 w99 w31", "w99 w41 w42")


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (" golf", " golf", True),
        (" golf, of course", " golf", True),
        (" golf's", " golf", True),
        (" golfing", " golf", False),
        (" golf2", " golf", False),
        ("\n Golf.", " golf", True),
        (" the golf", " golf", False),
        (" New\n  York City", " New York", True),
        (" New", " New York", False),
        ("", " golf", False),
        (" A", " A", True),
        (" A: Golf", " A", True),
        (" a guard", " A", False),
        (" Ä", " A", False),
        (" AB", " A", False),
    ],
)
def test_an_answer_is_said_in_whole_words(text, answer, expected):
    assert says(text, answer) is expected


def reference(model, prompts, n_tokens):
    """One prompt at a time, without padding."""
    found = []
    for row in range(len(prompts)):
        one = prompts[[row]]
        tokens = one.tokens[:, : int(one.positions[0, 0]) + 1]
        start = tokens.shape[1]
        for _ in range(n_tokens):
            logits = model(tokens, attention_mask=torch.ones_like(tokens))
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        new = tokens[0, start:].tolist()
        found.append(model.tokenizer.decode(new[: new.index(2)] if 2 in new else new))
    return tuple(found)


@pytest.mark.classes
def test_texts_are_those_of_one_prompt_at_a_time_whatever_the_batch_and_the_padding(every_model):
    model = every_model
    expected = reference(model, tiny.prompts(model, answer=3), 4)
    for size, padding in ((2, "right"), (6, "left")):
        prompts = tiny.prompts(model, answer=3, padding=padding)
        with left_as_it_was(model):
            assert continuations(model, prompts, 4, batch_size=size) == expected


ROWS = [[1, *range(10, 10 + n)] for n in (24, 3, 11)]
"""The longest is longer than the window of the tiny Gemma 2."""


def never(i, new):
    return False


def counted(monkeypatch):
    """How many tokens each forward of the new tokens alone was given."""
    module, widths = sys.modules[generated.__module__], []
    inner = module.last_logits

    def count(model, tokens, *arguments):
        widths.append(tuple(tokens.shape))
        return inner(model, tokens, *arguments)

    monkeypatch.setattr(module, "last_logits", count)
    monkeypatch.setattr(module, "_exact_up_to", WeakKeyDictionary())
    return widths


@pytest.mark.classes
def test_kept_keys_and_values_give_the_logits_of_whole_rows(every_model):
    """At every step of rows of three lengths, of which one ends early; with an edit, too."""
    tokens, mask = padded(ROWS, 0, "left")
    edit = mu.edit.zeroed(every_model, mu.ComponentMask.of(["L0H1", "L1MLP"], mu.shape(every_model)))
    for weights in (nullcontext(), edit.applied(every_model)):
        with weights, preserved(every_model), torch.no_grad():
            cache, rows = None, torch.arange(3)
            expected = logits_at(every_model, tokens, mask)
            for place in range(10, tokens.shape[1] + 1):
                new = tokens[:, :10] if place == 10 else tokens[:, place - 1 : place]
                if place == 15:
                    rows = torch.tensor([2, 0])
                    kept_in_cache(cache, rows)
                logits, cache = last_logits(every_model, new[rows], mask[rows, :place], cache)
                real = mask[rows, place - 1]
                torch.testing.assert_close(logits[real], expected[rows, place - 1][real], atol=2e-5, rtol=1e-5)


@pytest.mark.classes
def test_generation_reads_new_tokens_alone_and_says_what_whole_rows_say(every_model, monkeypatch):
    widths = counted(monkeypatch)
    with preserved(every_model), torch.no_grad():
        said = greedy(every_model, ROWS, [6, 2, 9], lambda i, new: i == 2 and len(new) == 4)
        assert widths == [(3, 25), (3, 1), (2, 1), (2, 1), (1, 1), (1, 1)]
        assert [len(new) for new in said] == [6, 2, 4]
        assert sys.modules[generated.__module__]._exact_up_to[every_model] == {True: 30}
        for row, new in zip(ROWS, said, strict=True):
            for n, token in enumerate(new):
                assert int(every_model(torch.tensor([[*row, *new[:n]]]))[0, -1].argmax()) == token


def test_a_half_precision_model_keeps_them_and_unembeds_in_float32(monkeypatch):
    half, widths = tiny.bridge("gemma2").to(torch.bfloat16), counted(monkeypatch)
    with torch.no_grad():
        assert last_logits(half, torch.tensor(ROWS[:1]), torch.ones(1, 25, dtype=torch.bool))[0].dtype == torch.float32
        greedy(half, ROWS, [5] * 3, never)
    assert widths == [(3, 25), *[(3, 1)] * 4]
    assert sys.modules[generated.__module__]._exact_up_to[half] == {True: 29}


def forgetful(model, tokens, mask, cache=None):
    """The logits of the new tokens by themselves, which are wrong."""
    return last_logits(model, tokens, mask[:, -tokens.shape[1] :])


def without_a_cache(model, tokens, mask, cache=None):
    raise ValueError("expected a model that gives the keys and values of its tokens")


@pytest.mark.classes
@pytest.mark.parametrize("fake", [forgetful, without_a_cache])
def test_whole_rows_are_read_where_a_model_does_not_keep_what_it_read(model, fake, monkeypatch):
    """It is asked once, and not again."""
    expected = greedy(model, ROWS, [4] * 3, never)
    monkeypatch.setattr(sys.modules[generated.__module__], "last_logits", fake)
    widths = counted(monkeypatch)
    for _ in range(2):
        assert greedy(model, ROWS, [4] * 3, never) == expected
    assert widths == [(3, 25), (3, 1), (3, 1), (3, 1)][: 1 if fake is without_a_cache else 4]


def test_what_transformers_leaves_behind_is_no_hook(monkeypatch):
    """It records hidden states by hooks, which stay once these were asked for."""
    own, widths = tiny.bridge("gpt2"), counted(monkeypatch)
    own.original_model(torch.tensor(ROWS[:1]), output_hidden_states=True)
    greedy(own, ROWS[:1], [3], lambda i, new: False)
    assert widths[0] == (1, 25)


@pytest.mark.classes
def test_hooks_are_given_all_tokens_of_every_row(model, monkeypatch):
    widths, seen = counted(monkeypatch), []
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: seen.append(tuple(value.shape[:2])))]):
        greedy(model, ROWS, [3, 3, 2], never)
    assert (widths, seen) == ([], [(3, 25), (3, 26), (2, 27)])
    handle = model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: None)
    greedy(model, ROWS, [2] * 3, never)
    handle.remove()
    assert widths == []
    greedy(model, ROWS, [2] * 3, never)
    assert widths == [(3, 25), (3, 1)]


def test_rows_that_end_after_one_token_do_not_count_as_a_trial(llama, monkeypatch):
    widths = counted(monkeypatch)
    exact = sys.modules[generated.__module__]._exact_up_to
    greedy(llama, ROWS, [4] * 3, lambda i, new: True)
    assert (widths, exact[llama]) == ([(3, 25)], {})
    greedy(llama, ROWS, [4] * 3, lambda i, new: i != 1)
    assert exact[llama] == {True: 7}
    greedy(llama, ROWS[1:2], [4], never)
    assert exact[llama] == {True: 7, False: 7}


def test_rows_that_fit_only_without_padding_are_read_whole(llama, monkeypatch):
    widths = counted(monkeypatch)
    rows = [list(range(4, 62)), [1, 5]]
    assert [len(new) for new in greedy(llama, rows, [2, 20], never)] == [2, 20]
    assert widths == []


def test_the_model_is_left_as_it_was_after_a_failure(llama, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("interrupted")

    monkeypatch.setattr(sys.modules[generated.__module__], "logits_at", broken)
    monkeypatch.setattr(sys.modules[generated.__module__], "last_logits", broken)
    with left_as_it_was(llama), pytest.raises(RuntimeError, match="interrupted"):
        generated(llama, tiny.task(llama))


def test_what_cannot_be_generated_is_refused(llama, monkeypatch):
    prompts = tiny.prompts(llama)
    with pytest.raises(ValueError, match="expected n_tokens of 1 or more, got 0"):
        continuations(llama, prompts, 0)
    length = int(prompts.attention_mask.sum(1).max())
    assert len(continuations(llama, prompts[:1], llama.cfg.n_ctx - length + 1)) == 1
    with pytest.raises(ValueError, match=r"leave room for 64 tokens in the model's context of 64, got room for 5\d"):
        continuations(llama, prompts, 64)
    monkeypatch.setattr(llama, "tokenizer", None)
    with pytest.raises(ValueError, match=r"expected a model with a tokenizer.*set model\.tokenizer"):
        continuations(llama, prompts, 1)


def test_the_shipped_model_says_what_it_knows(shipped):
    known = [row["athlete"] for row in facts.athletes() if row["sport"] == "basketball"][:12]
    task = sports_facts(shipped, forget=known, text=TEXT)
    for side in ("forget", "retain"):
        assert generated(shipped, task, format="question", side=side).value == 1.0
        assert generated(shipped, task, format="neighbourhood, city", side=side).value > 0.9  # of one to three tokens
        assert accuracy(shipped, getattr(task.formats["capitalised"], side)).vocabulary.value == 0.0
        assert generated(shipped, task, format="capitalised", side=side).value > 0.9  # in small letters
    assert generated(shipped, task, format="question", side="injected").value == 0.0
    assert extraction_strength(shipped, task, format="neighbourhood, city").value > 0.9
