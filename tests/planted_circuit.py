"""Circuits written into the weights of a small GPT-2 by hand, so that the edges that do the task are known."""

import math
from dataclasses import dataclass
from typing import Any

import tiny
import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from mechunlearn.components import ComponentScores, Edge, EdgeScores
from mechunlearn.tasks import Prompts

N_TOKENS, LENGTH, D_HEAD, D_MODEL = 16, 10, 20, 80
TOKEN, POSITION, PREVIOUS, COPIED, ANSWER, ANCHOR = 0, 16, 28, 44, 60, 76
"""Where the features are in the residual stream: the token, its position, the token before, the token that a head
copied, the answer that the unembedding reads, and a constant."""
SUBJECT, LAST = 4, LENGTH - 1
"""The position that decides the answer where there are decoys, and the one that gives it."""


@dataclass(frozen=True)
class Planted:
    """A model, prompts that it solves, and what does it."""

    model: Any
    prompts: Prompts
    edges: frozenset[Edge]
    """The edges that carry what differs between the clean and the corrupted prompts to the answer."""
    decoys: frozenset[Edge] = frozenset()
    """Edges that carry it to attention scores that cannot change anything any more."""


def induction(
    *,
    sharpness: float = 3.0,
    anchor: float = 0.0,
    noise: float = 0.02,
    seed: int = 0,
    kinds: tuple[int, ...] = (1, 2, 3),
) -> Planted:
    """Induction, `A B ... C D ... A` -> `B`, in four layers of four heads.

    L0H1 notes the token before; L2H3 looks for the place whose previous token is the last one and copies what stands
    there; L3MLP turns the copy into the answer. All other weights are noise of that standard deviation.

    `sharpness` is the attention score of the right place above the others: from about 10 on the softmax saturates.
    `anchor` is the size of a constant feature: at 0 the answer itself makes up most of what a late norm sees, which
    saturates the norm (more of the answer changes nothing); at 5 the norms divide by about the same everywhere.

    `kinds` of corrupted prompts, in turn: 1 swaps A and C in the context, 2 replaces B, 3 ends with C.
    """
    labels = {
        1: ["embed->L0H1.W_V", "L0H1->L2H3.W_K"],
        2: ["embed->L2H3.W_V"],
        3: ["embed->L2H3.W_Q"],
    }
    always = ["L2H3->L3MLP", "L3MLP->logits"]
    edges = frozenset(Edge.parse(label) for label in [*(x for kind in kinds for x in labels[kind]), *always])
    model = _bridge(_induction_weights(sharpness, anchor, noise, seed))
    return Planted(model, _prompts(kinds, seed), edges)


def decoyed(
    *, weight: float = 0.97, push: float = 30.0, loudness: float = 3.0, noise: float = 0.005, seed: int = 0
) -> Planted:
    """The last token's answer is the token at SUBJECT, and heads that look there already are pushed to do so more.

    L1H0, L1H1 and L1H2 copy the token, L3MLP turns it into the answer. All heads of layer 2 have about `weight` of the
    last token's attention on SUBJECT and write "a token of the first half of the vocabulary" (L2H0, L2H1) or "of the
    second half" (L2H2, L2H3), `loudness` times as much as an answer is written: together, nothing. A token of the
    second half adds `push` to their scores, through the query (L2H0, L2H1), for which L0H0 moves it, or through the key
    (L2H2, L2H3), by L0H1. The weight p becomes 1, an effect of 1 - p; the softmax's slope promises p (1 - p) push.

    Clean and corrupted token are of different halves, in turn, so that in either direction half of the prompts have
    that slope, and half one of zero. The noise is small because `push` amplifies it: p lies between .81 and .97.
    """
    copying = [f"L1H{head}" for head in range(3)]
    true = [f"embed->{head}.W_V" for head in copying] + [f"{head}->L3MLP" for head in copying] + ["L3MLP->logits"]
    pushing = ["embed->L0H0.W_V", "embed->L0H1.W_V"]
    pushed = ["L0H0->L2H0.W_Q", "L0H0->L2H1.W_Q", "L0H1->L2H2.W_K", "L0H1->L2H3.W_K"]
    edges, decoys = (frozenset(map(Edge.parse, labels)) for labels in (true, [*pushing, *pushed]))
    score = math.log(weight / (1 - weight) * (LENGTH - 1))
    return Planted(_bridge(_decoyed_weights(score, push, loudness, noise, seed)), _subjects(seed), edges, decoys)


def auroc(scores: EdgeScores, true_edges: frozenset[Edge]) -> float:
    """The probability that a true edge has a larger score, whatever the sign, than another; 0.5 is chance."""
    true = torch.tensor([edge in true_edges for edge in scores.edges])
    return separation(scores.values_in_order.abs(), true)


def node_auroc(scores: ComponentScores, true: set[str]) -> float:
    """`auroc` for components."""
    return separation(scores.tensor.abs(), torch.tensor([str(component) in true for component in scores]))


def readers(edges: frozenset[Edge]) -> list[str]:
    """The queries, keys and values above the first layer where the edges end."""
    ends = {str(edge.destination) for edge in edges}
    return sorted(end for end in ends if ".W_" in end and not end.startswith("L0"))


def writers(edges: frozenset[Edge]) -> list[str]:
    """The heads and MLPs where the edges begin."""
    return sorted({str(edge.source) for edge in edges} - {"embed"})


def decoy_auroc(scores: ComponentScores, true: list[str], decoys: list[str]) -> float:
    """The probability that a true component has a larger score, whatever the sign, than a decoy."""
    values = torch.tensor([abs(scores[label]) for label in [*true, *decoys]])
    return separation(values, torch.arange(len(values)) < len(true))


def separation(values: Tensor, true: Bool[Tensor, "value"]) -> float:
    higher = (values[true][:, None] > values[~true]).double() + (values[true][:, None] == values[~true]).double() / 2
    return float(higher.mean())


def _noisy(noise: float, anchor: float, seed: int) -> GPT2LMHeadModel:
    """Features of tokens and positions, the constant, an unembedding that reads the answer; noise everywhere else."""
    torch.manual_seed(seed)
    sizes = {"n_embd": D_MODEL, "n_layer": 4, "n_head": 4, "n_positions": 12, "n_inner": 64}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=N_TOKENS, tie_word_embeddings=False, **sizes, **tiny.SPECIAL))
    tokens = torch.arange(N_TOKENS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(noise * torch.randn(parameter.shape))
        body = model.transformer
        body.wte.weight[tokens, TOKEN + tokens] += 1.0
        body.wte.weight[:, ANCHOR] += anchor
        body.wte.weight[:, ANCHOR + 1] -= anchor
        body.wpe.weight[torch.arange(12), POSITION + torch.arange(12)] += 1.0
        model.lm_head.weight[tokens, ANSWER + tokens] += 1.0
    return model.eval()


def _induction_weights(sharpness: float, anchor: float, noise: float, seed: int) -> GPT2LMHeadModel:
    model, tokens = _noisy(noise, anchor, seed), torch.arange(N_TOKENS)
    body = model.transformer
    with torch.no_grad():
        before = torch.arange(LENGTH - 1)
        early, late = (_scale(features, anchor) for features in (2, 3))
        size = (10 * D_HEAD**0.5) ** 0.5 * early
        _head(body.h[0], 1, "q", POSITION + 1 + before, before, size)
        _head(body.h[0], 1, "k", POSITION + before, before, size)
        _head(body.h[0], 1, "v", TOKEN + tokens, tokens, early)
        _head(body.h[0], 1, "o", PREVIOUS + tokens, tokens, 1.0)
        size = (sharpness * D_HEAD**0.5) ** 0.5 * late
        _head(body.h[2], 3, "q", TOKEN + tokens, tokens, size)
        _head(body.h[2], 3, "k", PREVIOUS + tokens, tokens, size)
        _head(body.h[2], 3, "v", TOKEN + tokens, tokens, late)
        _head(body.h[2], 3, "o", COPIED + tokens, tokens, 2.0)
        _answering(body.h[3])
    return model


def _decoyed_weights(score: float, push: float, loudness: float, noise: float, seed: int) -> GPT2LMHeadModel:
    anchor = 5.0
    model, scale = _noisy(noise, anchor, seed), _scale(3, anchor)
    with torch.no_grad():
        _pushing(model.transformer.h[0], scale)
        _copying(model.transformer.h[1], scale)
        _pushed(model.transformer.h[2], scale, score, push, loudness)
        _answering(model.transformer.h[3])
    return model


_SUBJECT, _LAST, _FIRST = torch.tensor([POSITION + SUBJECT]), torch.tensor([POSITION + LAST]), torch.tensor([0])
_HALVES = torch.where(torch.arange(N_TOKENS) < N_TOKENS // 2, 1.0, -1.0)
_PUSHES, _SIGNS = PREVIOUS + torch.arange(16).reshape(2, 8), torch.tensor([1.0, -1.0] * 4)
"""What pushes queries and what pushes keys: features of both signs, so that norms, which subtract the mean, keep it."""


def _pushing(block: Any, scale: float) -> None:
    """Head 0 notes the subject's half at the last token, head 1 each token's own half."""
    tokens, positions = torch.arange(N_TOKENS), POSITION + torch.arange(LENGTH)
    looking = (10 * D_HEAD**0.5) ** 0.5 * scale
    _head(block, 0, "q", _LAST, _FIRST, looking)
    _head(block, 0, "k", _SUBJECT, _FIRST, looking)
    for matrix in "qk":
        _head(block, 1, matrix, positions, positions - POSITION, looking)
    for head in range(2):
        _head(block, head, "v", tokens, _FIRST, -_HALVES / 2 * scale)
        _head(block, head, "o", _PUSHES[head], _FIRST, _SIGNS / 2)


def _copying(block: Any, scale: float) -> None:
    """Three heads copy the subject to the last token."""
    tokens, looking = torch.arange(N_TOKENS), (10 * D_HEAD**0.5) ** 0.5 * scale
    for head in range(3):
        _head(block, head, "q", _LAST, _FIRST, looking)
        _head(block, head, "k", _SUBJECT, _FIRST, looking)
        _head(block, head, "v", tokens, tokens, scale)
        _head(block, head, "o", COPIED + tokens, tokens, 0.7)


def _pushed(block: Any, scale: float, score: float, push: float, loudness: float) -> None:
    """Heads whose last token has that score at the subject, and `push` more if its token is of the second half."""
    tokens = torch.arange(N_TOKENS)
    for head in range(4):
        by_query = head < 2
        pushed, other = "qk" if by_query else "kq"
        ends, size = {"q": _LAST, "k": _SUBJECT}, D_HEAD**0.5 * scale
        # The push is + or - a half. Queries push one score up or down; keys, whose others are down, by all of it.
        _head(block, head, pushed, ends[pushed], _FIRST, (score + push / 2 if by_query else score) * size)
        _head(block, head, pushed, _PUSHES[0 if by_query else 1], _FIRST, _SIGNS / 4 * push * size)
        _head(block, head, other, ends[other], _FIRST, scale)
        _head(block, head, "v", _SUBJECT, _FIRST, scale)
        _head(block, head, "o", ANSWER + tokens, _FIRST, loudness * (_HALVES if by_query else -_HALVES))


def _scale(features: int, anchor: float) -> float:
    """What a norm divides by that sees so many features and the constant."""
    return ((features + 2 * anchor**2) / D_MODEL) ** 0.5


def _answering(block: Any) -> None:
    """An MLP that turns the copied token into the answer."""
    tokens = torch.arange(N_TOKENS)
    block.mlp.c_fc.weight[COPIED + tokens, tokens] += 1.0
    block.mlp.c_proj.weight[tokens, ANSWER + tokens] += 1.0


def _head(block: Any, head: int, matrix: str, features: Tensor, inner: Tensor, size: float | Tensor) -> None:
    """Connects features of the residual stream with coordinates of the head, one to one or all with the same."""
    columns = head * D_HEAD + inner
    if matrix == "o":
        block.attn.c_proj.weight[columns, features] += size
    else:
        block.attn.c_attn.weight[features, "qkv".index(matrix) * D_MODEL + columns] += size


def _bridge(model: GPT2LMHeadModel) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    found = TransformerBridge.boot_transformers("planted", hf_model=model, tokenizer=tiny.tokenizer(), device="cpu")
    found(torch.tensor([[1, 5]]))
    return found


def _prompts(kinds: tuple[int, ...], seed: int, n: int = 12) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    rows, corrupt, candidates = [], [], []
    for i in range(n):
        drawn = torch.randperm(N_TOKENS, generator=generator)
        row, other = drawn[: LENGTH - 1].tolist(), int(drawn[LENGTH])
        first = 1 + int(torch.randint(0, 3, (), generator=generator))
        second = first + 2 + int(torch.randint(0, 2, (), generator=generator))
        a, b, c, d = row[first], row[first + 1], row[second], row[second + 1]
        clean = [*row, a]
        changed = list(clean)
        kind = kinds[i % len(kinds)]
        if kind == 1:
            changed[first], changed[second] = c, a
        elif kind == 2:
            changed[first + 1] = other
        else:
            changed[-1] = c
        rows.append(clean)
        corrupt.append(changed)
        candidates.append([b, other if kind == 2 else d])
    answers = [row[0] for row in candidates]
    return Prompts.of(rows, answers, candidates=candidates, corrupt=corrupt)


def _subjects(seed: int, n: int = 12) -> Prompts:
    """Prompts whose answer is the token at SUBJECT, which in the corrupted ones is of the other half."""
    generator = torch.Generator().manual_seed(seed)
    half = N_TOKENS // 2
    rows = torch.randint(half, (n, LENGTH), generator=generator)  # other positions: the half that pushes nothing
    drawn = torch.randint(half, (n, 2), generator=generator) + torch.tensor([0, half])
    drawn[1::2] = drawn[1::2].flip(1)
    clean, corrupt = rows.clone(), rows.clone()
    clean[:, SUBJECT], corrupt[:, SUBJECT] = drawn.T
    return Prompts.of(clean.tolist(), drawn[:, 0].tolist(), candidates=drawn.tolist(), corrupt=corrupt.tolist())
