"""Prompts with the tokenizers of the seven architectures, trained on a few words since no file of theirs is here."""

from functools import cache
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import GemmaTokenizer, GPT2Tokenizer, GPTNeoXTokenizer, LlamaTokenizer, Qwen2Tokenizer

import mechunlearn as mu
from mechunlearn.model.tokens import encode
from mechunlearn.tasks import build, formats, with_random_subjects
from mechunlearn.tasks.sports import partners_of

SENTENCES = (
    "Magic Johnson plays the sport of basketball . Zoë Ann Smith plays golf and tennis in São Paulo",
    "Fact: Tiger Woods plays the sport of golf\nQuestion: Which is it? A: golf B: tennis\nAnswer: hockey",
    "abcdefghijklmnopqrstuvwxyz\u0308",
    "football baseball Football Baseball Basketball Golf A B C D: It has the hub in Kyoto and Oslo",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ,.-_?!'",
)
WORDS = [f" {word}" for sentence in SENTENCES for word in sentence.split(" ")] * 20
KINDS: dict[str, Any] = {
    "gpt2": GPT2Tokenizer,
    "neox": GPTNeoXTokenizer,
    "llama": LlamaTokenizer,
    "llama3": Qwen2Tokenizer,
    "gemma": GemmaTokenizer,
    "qwen2": Qwen2Tokenizer,
}
"""Gemma 2 has Gemma's, and Qwen 3 that of Qwen 2."""


@cache
def tokenizer(name: str) -> Any:
    """Of the architecture's own class. Llama 3 splits like Qwen, and has a BOS, which Qwen lacks."""
    found = KINDS[name]().train_new_from_iterator(WORDS, 600, show_progress=False)
    if name == "llama3":
        found.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    return found


@pytest.fixture(
    params=[(name, bos) for name in KINDS for bos in (True, False)], ids=lambda case: f"{case[0]}-{case[1]}"
)
def speaker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, llama: Any) -> Any:
    """A model with this tokenizer, with and without BOS: prompts are built, nothing runs."""
    name, bos = request.param
    monkeypatch.setattr(llama, "_tokenizer", tokenizer(name))  # without _, TransformerLens would load it anew
    monkeypatch.setattr(llama.cfg, "default_prepend_bos", bos)
    monkeypatch.setattr(llama.cfg, "n_ctx", 1000)
    return llama


def plain(model: Any, text: str) -> list[int]:
    """What the tokenizer says of the text after a BOS, as `model.to_tokens`, if model and tokenizer have one."""
    bos = model.tokenizer.bos_token if model.cfg.default_prepend_bos else None
    return model.tokenizer((bos or "") + text, add_special_tokens=False)["input_ids"]


TEXTS = [
    "Magic Johnson plays the sport of",
    "Fact: Tiger Woods plays golf\nFact: Zoë Ann Smith plays",
    "Answer São Paulo plays",
]
ANSWERS = [" golf", " basketball and tennis", " hockey"]
SUBJECTS = ["Magic Johnson", "Zoë Ann Smith", "São Paulo"]


def test_prompt_and_answer_are_what_the_tokenizer_makes_of_the_whole(speaker: Any) -> None:
    prompts = build(speaker, TEXTS, ANSWERS)
    longest = 0
    for i, (text, answer) in enumerate(zip(TEXTS, ANSWERS, strict=True)):
        whole, before = plain(speaker, text + answer), plain(speaker, text)
        n_answer = len(whole) - len(before)
        longest = max(longest, n_answer)
        assert prompts.tokens[i][prompts.attention_mask[i]].tolist() == whole[:-1]
        assert prompts.answers[i][prompts.answer_mask[i]].tolist() == whole[len(before) :]
        assert prompts.positions[i].tolist()[:n_answer] == list(range(len(before) - 1, len(whole) - 1))
    assert longest > 1  # one of the answers has several tokens


def test_there_is_one_bos_where_model_and_tokenizer_have_one(speaker: Any) -> None:
    bos = speaker.tokenizer.bos_token_id
    tokens = build(speaker, TEXTS[:1], ANSWERS[:1]).tokens[0].tolist()
    expected = speaker.cfg.default_prepend_bos and bos is not None
    assert (tokens[0] == bos, tokens.count(bos)) == (expected, int(expected))


def test_subjects_are_the_tokens_that_touch_their_characters(speaker: Any) -> None:
    prompts = build(speaker, TEXTS, ANSWERS, subjects=SUBJECTS)
    assert prompts.subject is not None
    for i, (text, subject) in enumerate(zip(TEXTS, SUBJECTS, strict=True)):
        places = prompts.subject[i].nonzero()[:, 0].tolist()
        assert places == list(range(places[0], places[-1] + 1))
        assert speaker.tokenizer.decode(prompts.tokens[i][places]).strip() == subject
        start, end = text.index(subject), text.index(subject) + len(subject)
        spans = encode(speaker, text).spans
        assert spans[places[0]][0] <= start < spans[places[0]][1]
        assert spans[places[-1]][1] == end


def test_a_subject_is_found_though_its_tokens_there_are_not_those_that_it_has_alone(speaker: Any) -> None:
    text = "Zoë Ann plays the sport (Ann) of"
    prompts = build(speaker, [text] * 2, [" golf"] * 2, subjects=["Ann", (4, 7)])
    assert prompts.subject is not None
    for row, (start, end) in enumerate([(25, 28), (4, 7)]):
        spans = [encode(speaker, text).spans[place] for place in prompts.subject[row].nonzero()[:, 0].tolist()]
        assert spans[0][0] <= start
        assert spans[-1][1] >= end
        assert all(a < end and b > start for a, b in spans)


def test_letters_that_a_tokenizer_composes_keep_their_characters(speaker: Any) -> None:
    apart = "Zoe\u0308 Ann"
    prompts = build(speaker, [f"{apart} plays"], [" golf"], subjects=[apart])
    assert prompts.subject is not None
    assert prompts.names == (apart,)
    spans = [encode(speaker, f"{apart} plays").spans[p] for p in prompts.subject[0].nonzero()[:, 0].tolist()]
    assert (spans[0][0], spans[-1][1]) == (0, len(apart))
    with pytest.raises(ValueError, match="write it the same way"):
        build(speaker, [f"{apart} plays"], [" golf"], subjects=["Zoë Ann"])


def test_a_subject_that_is_not_there_is_refused(speaker: Any) -> None:
    with pytest.raises(ValueError, match="expected the subject 'Tiger Woods' in its prompt"):
        build(speaker, TEXTS[:1], ANSWERS[:1], subjects=["Tiger Woods"])


def test_an_answer_that_would_run_into_its_prompt_is_refused(speaker: Any) -> None:
    with pytest.raises(ValueError, match="whose tokens begin where the prompt ends"):
        build(speaker, ["Magic Johnson plays "], ["golf"])


FRAME = pd.DataFrame(
    {
        "subject": ["Magic Johnson", "Zoë Ann Smith", "São Paulo", "Tiger Woods", "Zoë Smith", "Magic Woods", "Ann"],
        "answer": ["basketball", "golf", "hockey", "golf", "tennis", "sport of golf", "basketball and tennis"],
    }
)


def test_facts_of_a_table_become_a_task(speaker: Any) -> None:
    options = {"forget": ["Zoë Ann Smith", "Ann"], "injected": "hockey", "corrupt": False, "candidates": 3}
    frame = FRAME.drop(index=2)  # the one of hockey
    choice = {"choice": "Question: Which is it? {subject}\nA: {A}\nB: {B}\nAnswer:"}
    text = torch.ones(5, 8, dtype=torch.long)
    task = mu.tasks.from_frame(speaker, frame, prompt="{subject} plays", formats=choice, text=text, **options)
    assert task.injection is not None
    assert task.forget.subject is not None
    assert task.forget.candidates is not None
    for i, (name, answer) in enumerate([("Zoë Ann Smith", "golf"), ("Ann", "basketball and tennis")]):
        before = plain(speaker, f"{name} plays")
        wanted = plain(speaker, f"{name} plays {answer}")[len(before) :]
        assert task.forget.answers[i][task.forget.answer_mask[i]].tolist() == wanted
        injected = plain(speaker, f"{name} plays hockey")[len(before) :]
        assert task.injection.answers[i][task.injection.answer_mask[i]].tolist() == injected
        assert task.forget.candidates[i, :2].tolist() == [wanted[0], injected[0]]
        assert speaker.tokenizer.decode(task.forget.tokens[i][task.forget.subject[i]]).strip() == name
    assert task.formats["choice"].forget.chance == 1 / 2


ATHLETES = pd.DataFrame(
    {
        "athlete": ["Magic Johnson", "Zoë Ann Smith", "Ann", "Tiger Smith", "São Johnson", "Magic Ann", "Zoë Johnson"],
        "sport": ["basketball", "football", "baseball", "football", "basketball", "baseball", "football"],
    }
)


def test_athletes_become_a_task_in_every_format(speaker: Any) -> None:
    """Every answer is what the tokenizer says after the prompt, spelled or not, and every subject its athlete."""
    text = torch.ones(5, 8, dtype=torch.long)
    options = {"source": ATHLETES, "text": text, "dashed": True, "corrupt": with_random_subjects}
    task = mu.tasks.sports_facts(speaker, forget=3, injected=("football", "baseball", "basketball"), **options)
    true = dict(ATHLETES.itertuples(index=False))
    assert {"trained prompt", "multiple choice, system prompt", "capitalised", "dashed"} < set(task.formats)
    for name, format in task.formats.items():
        for prompts in (format.forget, format.retain):
            assert prompts.subject is not None
            for i, (who, said) in enumerate(zip(prompts.names, prompts.texts, strict=True)):
                assert speaker.tokenizer.decode(prompts.tokens[i][prompts.subject[i]]).strip() == who
                if "multiple choice" not in name:
                    shown = {"capitalised": str.capitalize, "dashed": "-".join}.get(name, str)(true[who])
                    wanted = plain(speaker, f"{said} {shown}")
                    assert prompts.answers[i][prompts.answer_mask[i]].tolist() == wanted[len(plain(speaker, said)) :]
            assert name == "dashed" or prompts.chance == 1 / 4
    assert task.forget.corrupt is not None
    assert torch.equal(task.forget.corrupt != task.forget.tokens, task.forget.subject)


def test_partners_have_as_many_tokens(speaker: Any) -> None:
    found = partners_of(speaker, list(ATHLETES.itertuples(index=False, name=None)))
    true = dict(ATHLETES.itertuples(index=False))
    assert any(found.values())
    for name, others in found.items():
        length = len(plain(speaker, formats.FACT.format(athlete=name)))
        same = [each for each in true if len(plain(speaker, formats.FACT.format(athlete=each))) == length]
        assert others == [each for each in same if true[each] != true[name]]


def test_records_of_counterfact_become_a_task(speaker: Any) -> None:
    """Prompts begin with their subject, hold it in the middle, and end with it."""
    prompts = {
        "Magic Johnson": "{} has the hub in",
        "Zoë Ann Smith": "It has {} in",
        "São Paulo": "It has the hub of {}",
    }
    records = [
        {
            "case_id": case,
            "requested_rewrite": {
                "prompt": prompt,
                "subject": subject,
                "target_true": {"str": "Kyoto and Oslo" if case else "Oslo"},
                "target_new": {"str": "golf"},
            },
            "paraphrase_prompts": [f"Answer: {subject} plays"],
        }
        for case, (subject, prompt) in enumerate([*prompts.items(), ("Ann", "{} has")])
    ]
    questions = [
        {
            "case_id": case,
            "question": f"Which has {name}?",
            "target_true": "Oslo",
            "targets_false": ["golf", "A", "hub"],
        }
        for case, name in enumerate([*prompts, "Ann"])
    ]
    text = torch.ones(5, 8, dtype=torch.long)
    options = {"corrupt": False, "threshold": 0.0, "shots": 1, "text": text, "train": 0.5, "candidates": 2}
    task = mu.tasks.counterfact(speaker, source=records, questions=questions, forget=2, **options)
    assert task.forget.texts == ("Magic Johnson has the hub in", "It has Zoë Ann Smith in")
    assert list(task.formats) == ["trained prompt", "paraphrase", "multiple choice"]
    for format in task.formats.values():
        for side in (format.forget, format.retain):
            assert side.subject is not None
            for i, who in enumerate(side.names):
                assert speaker.tokenizer.decode(side.tokens[i][side.subject[i]]).strip() == who
    assert (
        task.forget.answers[1][task.forget.answer_mask[1]].tolist()
        == (plain(speaker, "It has Zoë Ann Smith in Kyoto and Oslo")[len(plain(speaker, "It has Zoë Ann Smith in")) :])
    )
