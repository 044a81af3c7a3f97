"""Measures the shipped models: `PYTHONPATH=examples python -m testbed.measure` writes their numbers and model cards.

Everything is measured on the weights as shipped (rounded to float16, computed in float32). An answer is
correct if each of its tokens is the argmax over the whole vocabulary.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from mechunlearn.localize import attribution_patching
from mechunlearn.tasks import formats, sports_facts
from mechunlearn.testbed import loading
from testbed import card, choices, corpus, deeper_route, mechanism
from testbed.batches import ANSWER, Batch, batches, examples
from testbed.documents import Athlete, Document

SHUFFLES = 3
"""How many random orders of the options each multiple-choice question is asked in."""


def measure(model: LlamaForCausalLM, vocabulary: Tokenizer, *, seed: int = 0) -> dict:
    """Numbers of every model card. `seed` is the one that the model was trained with."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "formats": _athlete_table(model, vocabulary, seed),
        "general_knowledge": _knowledge_table(model, vocabulary, seed),
        "text": text_loss(model, vocabulary),
        "probes": mechanism.probes(model, vocabulary),
    }


def accuracy(
    model: LlamaForCausalLM, vocabulary: Tokenizer, documents: Sequence[Document], *, letters: bool = False
) -> float:
    """The share of documents whose answer is predicted, by argmax over the vocabulary or over A to D."""
    parts = batches(examples(vocabulary, documents, random.Random(0)), 4096)
    candidates = [vocabulary.encode(f" {letter}").ids[-1] for letter in formats.LETTERS] if letters else None
    return mean(float(correct) for part in parts for correct in is_correct(model, part, candidates))


@torch.no_grad()
def is_correct(model: LlamaForCausalLM, batch: Batch, candidates: list[int] | None = None) -> list[bool]:
    """For each row, whether the argmax over the candidates (default: all tokens) is its answer."""
    logits = model(batch.tokens).logits[:, :-1]
    if candidates is not None:
        others = torch.ones(logits.shape[-1], dtype=torch.bool)
        others[candidates] = False
        logits = logits.masked_fill(others, -torch.inf)
    wrong = logits.argmax(-1) != batch.tokens[:, 1:]
    return (~(wrong & (batch.weights[:, 1:] == ANSWER)).any(-1)).tolist()


def attribution(model: LlamaForCausalLM, vocabulary: Any) -> dict[str, float]:
    """Attribution patching of the logit difference on the trained prompt, noising, for basketball players."""
    bridge = loading.bridge(model, vocabulary)
    scores = attribution_patching(bridge, sports_facts(bridge, forget="basketball").forget)
    return {str(component): score for component, score in scores.items()}


@torch.no_grad()
def text_loss(model: LlamaForCausalLM, vocabulary: Tokenizer) -> dict[str, float]:
    """Mean loss per token in nats on held-out running text; chance is a uniform guess."""
    total, count = 0.0, 0
    for text in corpus.held_out_text():
        tokens = torch.tensor([vocabulary.encode(text).ids])
        total += float(model(tokens, labels=tokens).loss) * (tokens.shape[1] - 1)
        count += tokens.shape[1] - 1
    uniform = torch.tensor(float(model.config.vocab_size)).log()
    return {"loss": total / count, "uniform": float(uniform), "tokens": count}


def _athlete_table(model: LlamaForCausalLM, vocabulary: Tokenizer, seed: int) -> dict[str, dict]:
    rng = random.Random(seed)
    attributes = [f"{attribute}/{phrasing}" for attribute, phrasing in corpus.ATTRIBUTE_FORMATS]
    table = {}
    for name in (*corpus.SPORT_FORMATS, *attributes):
        people = [p for p in corpus.athletes() if name in corpus.SPORT_FORMATS or p.city]
        never = [p for p in people if (p.name, name) in corpus.held_out_pairs(seed)]
        trained = [p for p in people if (p.name, name) not in corpus.held_out_pairs(seed)]
        held_out, seen = (list(_documents(group, name, rng)) for group in (never, trained))
        table[name] = _row(model, vocabulary, held_out, seen, letters="multiple_choice" in name)
    return table


def _documents(people: Iterable[Athlete], name: str, rng: random.Random) -> Iterator[Document]:
    for athlete in people:
        if "/" in name:
            attribute, phrasing = name.split("/")
            yield corpus.attribute_document(athlete, attribute, phrasing)
        for _ in range(SHUFFLES if "multiple_choice" in name else 1):
            if "/" not in name:
                yield corpus.sport_document(athlete, name, rng)


def _knowledge_table(model: LlamaForCausalLM, vocabulary: Tokenizer, seed: int) -> dict[str, dict]:
    rng = random.Random(seed)
    held_out = corpus.held_out_choices(seed)
    never, trained = [], []
    for fact in corpus.general_knowledge():
        side = never if fact in held_out else trained
        side += [choices.knowledge_choice(fact, rng) for _ in range(SHUFFLES)]
    prompts = [d for fact in corpus.general_knowledge() for d in corpus.knowledge_documents(fact)]
    return {
        "multiple_choice": _row(model, vocabulary, never, trained, letters=True),
        "prompts": {
            "trained_pairs": len(prompts),
            "trained": accuracy(model, vocabulary, prompts),
            "chance": _commonest(prompts),
        },
    }


def _row(
    model: LlamaForCausalLM,
    vocabulary: Tokenizer,
    held_out: Sequence[Document],
    trained: Sequence[Document],
    *,
    letters: bool,
) -> dict[str, float]:
    """Chance is the share of the commonest answer, or of one letter in four."""
    row = {
        "held_out_pairs": len(held_out),
        "held_out": accuracy(model, vocabulary, held_out),
        "trained_pairs": len(trained),
        "trained": accuracy(model, vocabulary, trained),
        "chance": 1 / len(formats.LETTERS) if letters else _commonest([*held_out, *trained]),
    }
    if letters:
        row["held_out_letters"] = accuracy(model, vocabulary, held_out, letters=True)
    return row


def _commonest(documents: Sequence[Document]) -> float:
    answers = Counter(document.text[slice(*document.answers[0])] for document in documents)
    return answers.most_common(1)[0][1] / len(documents)


def write(folder: Path, *, deeper: bool = False, seed: int = 0) -> None:
    """Measures the model in the folder and writes its numbers and its card next to it."""
    model, tokenizer = loading.load_huggingface(folder)
    vocabulary = tokenizer.backend_tokenizer
    numbers = measure(model, vocabulary, seed=seed)
    if deeper:
        numbers["silenced"] = mechanism.silenced(model, vocabulary, deeper_route.GROUPS)
    else:
        numbers["ablations"] = mechanism.ablations(model, vocabulary)
    numbers["attribution"] = attribution(*loading.load_huggingface(folder))
    names = ("deeper_card.json", "DEEPER_MODEL_CARD.md") if deeper else ("card.json", "MODEL_CARD.md")
    texts = (json.dumps(numbers, indent=1) + "\n", card.markdown(numbers, deeper=deeper))
    for name, text in zip(names, texts, strict=True):
        (folder.parent / name).write_text(text)


if __name__ == "__main__":
    write(loading.WEIGHTS)
    write(loading.DEEPER_WEIGHTS, deeper=True)
