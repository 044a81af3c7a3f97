"""Which special tokens stand before a text: those of `model.to_tokens`, none twice, and prompts say which."""

import itertools
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from tokenizers import AddedToken, processors
from transformers import GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer

import mechunlearn as mu
from mechunlearn.edit.inject.facts import essence, in_contexts
from mechunlearn.evaluate.attacks.few_shot import demonstrations_of, few_shot, shown_before
from mechunlearn.evaluate.attacks.soft_prompt import n_bos
from mechunlearn.model.tokens import encode, encode_all

CHATS: dict[str, tuple[Any, str, list[str], str, str]] = {
    # BOS opens each message, as SmolLM2's does, whose tokenizer adds none.
    "chatml": (
        Qwen2Tokenizer,
        "<|im_start|>",
        ["<|im_end|>"],
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>bot\n",
        "<|im_end|>\n",
    ),
    "gemma": (
        GemmaTokenizer,
        "<bos>",
        ["<start_of_turn>", "<end_of_turn>"],
        "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n",
    ),
    "llama3": (
        Qwen2Tokenizer,
        "<|begin|>",
        ["<|start|>", "<|end|>", "<|eot|>"],
        "<|begin|><|start|>system\n\nsay it<|eot|><|start|>user<|end|>\n\n{}<|eot|><|start|>model<|end|>\n\n",
        "<|eot|>",
    ),
    "mistral": (LlamaTokenizer, "<s>", ["[INST]", "[/INST]"], "<s>[INST] {}[/INST]", "</s>"),
    "phi": (LlamaTokenizer, "<s>", ["<|user|>", "<|end|>", "<|bot|>"], "<|user|>\n{}<|end|>\n<|bot|>\n", "<|end|>\n"),
}
"""Name -> tokenizer, BOS, other special tokens, the template around a message, and what ends an answer."""
WORDS = ["Which sport does Ann play? golf tennis user\nmodel\n\nanswer. system say it Bo Magic Zoë plays. "] * 20


def speaking(llama: Any, monkeypatch: pytest.MonkeyPatch, name: str, bos: bool = True) -> Any:
    """The tiny Llama with a tokenizer of this chat template: prompts are built, nothing runs."""
    kind, begin, special, _, _ = CHATS[name]
    tokenizer = kind().train_new_from_iterator(WORDS, 400, show_progress=False)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in (begin, *special)])
    tokenizer.bos_token = begin
    tokenizer.eos_token = tokenizer.eos_token or special[0]
    tokenizer.pad_token = tokenizer.eos_token
    if kind is LlamaTokenizer:
        before = [(begin, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A", None, before)
    monkeypatch.setattr(llama, "_tokenizer", tokenizer)
    monkeypatch.setattr(llama.cfg, "default_prepend_bos", bos)
    prepends = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    monkeypatch.setattr(llama.cfg, "tokenizer_prepends_bos", prepends)
    return llama


@pytest.fixture(params=CHATS)
def chatty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, llama: Any) -> tuple[Any, str, str]:
    """A model, its template and what ends an answer."""
    return speaking(llama, monkeypatch, request.param), *CHATS[request.param][3:]


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("prepend_bos", [None, True, False])
@pytest.mark.parametrize("name", CHATS)
def test_a_text_has_the_tokens_that_the_model_gives_it(
    llama: Any, monkeypatch: pytest.MonkeyPatch, name: str, prepend_bos: bool | None, default: bool
) -> None:
    model = speaking(llama, monkeypatch, name, default)
    for text in ("Ann plays", "Zoë Ann\nplays golf", " Bo"):
        expected = model.to_tokens(text, prepend_bos=prepend_bos)[0].tolist()
        assert list(encode(model, text, prepend_bos=prepend_bos).tokens) == expected


@pytest.mark.parametrize("prepend_bos", [None, True, False])
@pytest.mark.parametrize("name", CHATS)
def test_what_a_text_begins_with_is_not_put_before_it(
    llama: Any, monkeypatch: pytest.MonkeyPatch, name: str, prepend_bos: bool | None
) -> None:
    model, bos = speaking(llama, monkeypatch, name), CHATS[name][1]
    begun = encode(model, f"{bos}user\nAnn plays", prepend_bos=prepend_bos)
    assert begun.tokens[0] == model.tokenizer.bos_token_id != begun.tokens[1]
    assert (begun.added, begun.spans[0]) == (0, (0, len(bos)))
    assert encode_all(model, ["Bo", f"{bos}Bo"], prepend_bos=True)[0].added == 1


def test_what_a_tokenizer_puts_around_a_text_is_kept_before_it_and_cut_behind_it(llama: Any) -> None:
    tokenizer, own = tiny.tokenizer(), llama.tokenizer
    pieces = [("<unk>", 3), ("<bos>", 1), ("<eos>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<unk> <bos> $A <eos>", None, pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "_tokenizer", tokenizer)
        assert encode(llama, "w5").tokens == (3, 1, 5)
        assert encode(llama, "w5", prepend_bos=False).tokens == (3, 5)
        assert encode(llama, "<bos> w5").tokens == (3, 1, 5)
        assert encode(llama, "<unk> <bos> w5").tokens == (3, 1, 5)
    assert llama.tokenizer is own


FRAME = pd.DataFrame({"subject": ["w10", "w11", "w12", "w13", "w14"], "answer": ["w50", "w51", "w52", "w50", "w51"]})
TEXT = ["w4 w5 w6 w7"] * 80


def from_frame(model: Any, prepend_bos: bool | None, before: str) -> list[mu.tasks.Prompts]:
    options: dict[str, Any] = {
        "forget": 2,
        "train": 0.5,
        "text": TEXT,
        "injected": "w90",
        "formats": {"asked": before + "w9 {subject}"},
    }
    task = mu.tasks.from_frame(model, FRAME, prompt=before + "w8 {subject}", prepend_bos=prepend_bos, **options)
    assert task.injection is not None
    return [
        task.forget,
        task.retain,
        task.injection,
        *(side for f in task.formats.values() for side in (f.forget, f.retain)),
    ]


def counterfact(model: Any, prepend_bos: bool | None, before: str) -> list[mu.tasks.Prompts]:
    records = [
        {
            "case_id": case,
            "requested_rewrite": {
                "prompt": before + "w8 {}",
                "subject": f"w{10 + case}",
                "target_true": {"str": f"w{50 + case}"},
                "target_new": {"str": "w90"},
            },
            "paraphrase_prompts": [f"{before}w9 w{10 + case}"],
        }
        for case in range(5)
    ]
    options: dict[str, Any] = {"threshold": 0.0, "forget": 2, "train": 0.5, "text": TEXT}
    task = mu.tasks.counterfact(model, source=records, prepend_bos=prepend_bos, **options)
    return [task.forget, task.retain, *(side for f in task.formats.values() for side in (f.forget, f.retain))]


def build(model: Any, prepend_bos: bool | None, before: str) -> list[mu.tasks.Prompts]:
    texts, answers = [f"{before}w8 w10", f"{before}w8 w11 w7"], [" w50", " w51 w52"]
    options: dict[str, Any] = {"prepend_bos": prepend_bos, "candidates": [[" w50", " w60"], [" w51 w52", " w60"]]}
    built = mu.tasks.build(model, texts, answers, corrupt=texts, subjects=["w10", "w11"], padding="left", **options)
    shown = shown_before(model, built, [demonstrations_of(model, built[[1]], built[[0]]), []])
    return [
        built,
        built.corrupted(),
        mu.tasks.answered(model, built, " w70"),
        built[[1]],
        shown,
        mu.tasks.joined(built, shown),
    ]


def facts_in_contexts(model: Any, prepend_bos: bool | None, before: str) -> list[mu.tasks.Prompts]:
    [built, *_] = build(model, prepend_bos, before)
    rows = [made for fact in built.batches(1) for made in (in_contexts(model, fact, ["w30 w31"]), essence(model, fact))]
    return [*rows, built]


BUILDERS: list[Callable[..., list[mu.tasks.Prompts]]] = [build, from_frame, counterfact, facts_in_contexts]


@pytest.mark.parametrize(
    ("default", "prepend_bos", "before"), itertools.product((True, False), (None, True, False), ("", "<bos> "))
)
@pytest.mark.parametrize("builder", BUILDERS)
def test_every_prompt_begins_with_one_bos_or_none(
    llama: Any, monkeypatch: pytest.MonkeyPatch, builder: Any, default: bool, prepend_bos: bool | None, before: str
) -> None:
    monkeypatch.setattr(llama.cfg, "default_prepend_bos", default)
    wanted = default if prepend_bos is None else prepend_bos
    for prompts in builder(llama, prepend_bos, before):
        for row, real in zip(prompts.tokens, prompts.attention_mask, strict=True):
            tokens = row[real].tolist()
            assert (tokens[:1] == [1], tokens.count(1)) == (wanted or bool(before), int(wanted or bool(before)))
        if prompts.added:
            assert set(prompts.added) == {"<bos>" if wanted and not before else ""}
    assert llama.cfg.default_prepend_bos is default


@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_text_and_knowledge_begin_as_asked(shipped: Any, prepend_bos: bool | None) -> None:
    wanted = shipped.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    bos = shipped.tokenizer.bos_token_id
    for tokens in (
        mu.tasks.general_knowledge(shipped, n=5, prepend_bos=prepend_bos).tokens[:, 0],
        mu.tasks.pack(shipped, ["The golf"] * 50, length=8, prepend_bos=prepend_bos),
        next(mu.tasks.rows_of(shipped, ["The golf"] * 50, length=8, prepend_bos=prepend_bos)),
    ):
        assert bool((tokens == bos).any()) == wanted
    task = mu.tasks.sports_facts(shipped, forget=3, prepend_bos=prepend_bos)
    assert all(bool((tokens == bos).any()) == wanted for tokens in (task.forget.tokens, task.text, task.text_test))
    assert ("<bos> added" in repr(task)) == wanted


def test_prompts_tasks_edits_and_reports_say_what_was_added(llama: Any) -> None:
    one = mu.tasks.build(llama, ["w8"], [" w9"])
    none = mu.tasks.build(llama, ["w8"], [" w9"], prepend_bos=False)
    assert (one.added, none.added, mu.tasks.joined(one, none).added) == (("<bos>",), ("",), ("<bos>", ""))
    assert "; <bos> added;" in repr(one)
    assert "; no special token added;" in repr(none)
    assert "; <bos> added to 1 of 2;" in repr(mu.tasks.joined(one, none))
    assert "added" not in repr(mu.tasks.Prompts.of([[1, 5]], [6]))
    task = tiny.task(llama)
    assert task.special_tokens == "<bos> added"
    where = mu.ComponentMask.of(["L0MLP"], mu.shape(llama))
    edit = mu.edit.finetune(llama, task, where, steps=1, progress=False)
    assert edit.provenance["special_tokens"] == "<bos> added"
    report = mu.evaluate.compare(llama, task, {}, metrics={"text": mu.evaluate.text_loss}, progress=False)
    assert report.provenance["task"]["special_tokens"] == "<bos> added"


def asked(model: Any, template: str) -> mu.tasks.Prompts:
    names, answers = ["Ann", "Bo", "Zoë"], ["golf", "tennis", "golf"]
    texts = [template.format(f"Which sport does {name} play?") for name in names]
    return mu.tasks.build(model, texts, answers, subjects=names)


def written(model: Any, tokens: Any) -> str:
    return model.tokenizer.decode(tokens, skip_special_tokens=False).replace("▁", " ")


def test_demonstrations_are_whole_messages(chatty: tuple[Any, str, str]) -> None:
    model, template, ending = chatty
    prompts = asked(model, template)
    shown = shown_before(model, prompts[[0]], [demonstrations_of(model, prompts[[1, 2]], prompts[[0]])]).texts[0]
    start = template.rindex("<|start|>user") if "<|start|>user" in template else 0
    begin = template[: template.index("[INST]")] if "[INST]" in template else template[:start]
    begin = "<bos>" if template.startswith("<bos>") else begin
    one = template.removeprefix(begin)
    turns = [one.format(f"Which sport does {name} play?") for name in ("Bo", "Zoë", "Ann")]
    assert shown == f"{begin}{turns[0]}tennis{ending}{turns[1]}golf{ending}{turns[2]}"


def test_a_prefix_stands_in_the_message_and_no_header_is_torn(chatty: tuple[Any, str, str]) -> None:
    model, template, _ = chatty
    prompts = asked(model, template)
    contexts = in_contexts(model, prompts[[0]], ["Magic plays golf. "])
    rows = [written(model, row[real]) for row, real in zip(contexts.tokens, contexts.attention_mask, strict=True)]
    assert rows[0] == written(model, prompts.tokens[0][prompts.attention_mask[0]])
    rows = [row.replace(" ", "") for row in rows]
    header = rows[0][: rows[0].index("Which")]
    assert header.removeprefix("<s>") == template[: template.index("{}")].removeprefix("<s>").replace(" ", "")
    assert rows[1] == f"{header}Magicplaysgolf.{rows[0].removeprefix(header)}"
    assert contexts.subject is not None
    assert written(model, contexts.tokens[1][contexts.subject[1]]).strip() == "Ann"


def test_vectors_stand_behind_bos_unless_it_opens_messages(chatty: tuple[Any, str, str]) -> None:
    model, template, _ = chatty
    assert n_bos(model, asked(model, template)) == int(not template.startswith("<|im_start|>"))


def test_a_bos_of_the_text_gives_the_logits_of_one_that_is_added(model: Any) -> None:
    texts = ("w5 w6", "<bos> w5 w6")
    added, written_ = (mu.tasks.build(model, [text], [" w9"], prepend_bos=True) for text in texts)
    assert torch.equal(added.logits(model), written_.logits(model))
    assert not torch.allclose(added.logits(model), model(torch.tensor([[1, 1, 5, 6]]))[:, -1:], atol=0.1)


def test_few_shot_builds_its_prompts_as_the_task_s(llama: Any) -> None:
    options: dict[str, Any] = {"forget": 3, "train": 0.5, "text": TEXT, "corrupt": False, "prepend_bos": False}
    task = mu.tasks.from_frame(llama, FRAME, prompt="w8 {subject}", **options)
    seen = []

    def first(logits: torch.Tensor, prompts: mu.tasks.Prompts) -> torch.Tensor:
        seen.append(prompts.tokens[prompts.attention_mask].tolist())
        return logits[:, 0, 0]

    few_shot(llama, task, shots=(0, 1), metric=first)
    assert len(seen) > 1
    assert all(1 not in tokens for tokens in seen)
