"""Circuits written into the weights of a small GPT-2 by hand, so that the edges that do the task are known."""

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
"""Where the features are in the residual stream: the token, its position, the token before, the token that induction
copied, the answer that the unembedding reads, and a constant."""


@dataclass(frozen=True)
class Planted:
    """A model, prompts that it solves, and what does it."""

    model: Any
    prompts: Prompts
    edges: frozenset[Edge]
    """The edges that carry what differs between the clean and the corrupted prompts to the answer."""


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


def auroc(scores: EdgeScores, true_edges: frozenset[Edge]) -> float:
    """The probability that a true edge has a larger score, whatever the sign, than another; 0.5 is chance."""
    true = torch.tensor([edge in true_edges for edge in scores.edges])
    return separation(scores.values_in_order.abs(), true)


def node_auroc(scores: ComponentScores, true: set[str]) -> float:
    """`auroc` for components."""
    return separation(scores.tensor.abs(), torch.tensor([str(component) in true for component in scores]))


def separation(values: Tensor, true: Bool[Tensor, "value"]) -> float:
    higher = (values[true][:, None] > values[~true]).double() + (values[true][:, None] == values[~true]).double() / 2
    return float(higher.mean())


def _induction_weights(sharpness: float, anchor: float, noise: float, seed: int) -> GPT2LMHeadModel:
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
        before = torch.arange(LENGTH - 1)
        early, late = (((features + 2 * anchor**2) / D_MODEL) ** 0.5 for features in (2, 3))  # the norms' scales
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
        body.h[3].mlp.c_fc.weight[COPIED + tokens, tokens] += 1.0
        body.h[3].mlp.c_proj.weight[tokens, ANSWER + tokens] += 1.0
        model.lm_head.weight[tokens, ANSWER + tokens] += 1.0
    return model.eval()


def _head(block: Any, head: int, matrix: str, features: Tensor, inner: Tensor, size: float) -> None:
    """Connects features of the residual stream one to one with coordinates of the head."""
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
