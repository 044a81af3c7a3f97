import sys
from dataclasses import replace

import pytest
import tiny
import torch
from state import left_as_it_was

from mechunlearn.evaluate import accuracy, continuations, extraction_strength, generated, says
from mechunlearn.tasks import Format, build, facts, sports_facts

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

    monkeypatch.setattr(sys.modules[generated.__module__], "logits_at", by_heart)
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


def test_texts_are_those_of_one_prompt_at_a_time_whatever_the_batch_and_the_padding(model):
    expected = reference(model, tiny.prompts(model, answer=3), 4)
    for size, padding in ((2, "right"), (6, "left")):
        prompts = tiny.prompts(model, answer=3, padding=padding)
        with left_as_it_was(model):
            assert continuations(model, prompts, 4, batch_size=size) == expected


def test_the_model_is_left_as_it_was_after_a_failure(llama, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("interrupted")

    monkeypatch.setattr(sys.modules[generated.__module__], "logits_at", broken)
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
