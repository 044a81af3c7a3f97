"""Where the deeper model's facts go: looked up by its middle MLPs, extracted above them, written by its last ones.

As in large models (Meng et al. 2022, https://arxiv.org/abs/2202.05262; Geva et al. 2023,
https://arxiv.org/abs/2304.14767): the first layers only put a name together, MLPs of several layers above them look up
what is known about it, attention of the upper half moves that to where it is needed, and the last MLPs turn it into the
answer. All of this is a matter of training; what is trained is an ordinary Llama.
"""

import random
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM

from testbed import llama
from testbed.batches import Batch
from testbed.pathway import GUIDED_HEADS

FIRST, UPPER, LAST, LAYERS = 2, 7, 9, 12
"""Where lookup, extraction and writing begin, and how many layers there are.

Each subject has one MLP of lookup that learns its facts.
"""

NEAR = 3
"""Below this layer a subject's token attends only to itself and to the one before."""

GROUPS = {
    "none": ("mlp", ()),
    "MLPs below lookup": ("mlp", range(FIRST)),
    **{f"MLP {layer}": ("mlp", (layer,)) for layer in range(FIRST, UPPER)},
    **{
        f"lookup but MLP {one}": ("mlp", [layer for layer in range(FIRST, UPPER) if layer != one])
        for one in range(FIRST, UPPER)
    },
    "all of lookup": ("mlp", range(FIRST, UPPER)),
    "MLPs above lookup": ("mlp", range(UPPER, LAYERS)),
    "all MLPs": ("mlp", range(LAYERS)),
    **{f"attention {layer}": ("self_attn", (layer,)) for layer in range(NEAR)},
    "attention of layers 3 to 6": ("self_attn", range(NEAR, UPPER)),
}
"""What is to be silenced at the subject, for the model card: MLPs or attention of some layers."""

SUBJECT_LAYER, OPTION_LAYER = 7, 9
"""The layers whose first heads look at what is asked about, and at the option that is the answer."""


@dataclass(frozen=True)
class Route:
    """What is open in one training step."""

    closed: bool = False
    """Attention below `UPPER` sees a subject's tokens only from within it, and no MLP above writes at them."""
    others: frozenset[int] = frozenset(range(UPPER))
    """Which MLPs below `UPPER` write at subjects that are not their own. They learn nothing from it."""
    rest: str = "own"
    """What the upper half sees at a subject's tokens besides what MLPs of lookup wrote there: the rest of its "own"
    residual stream, that of another subject ("shuffled"), or "none"."""
    only_last: bool = False
    """The unembedding sees only what the last MLPs wrote."""


def draw(rng: random.Random, *, open_share: float) -> Route:
    """The route of a step: neither what is not looked up nor what other MLPs write is ever to be relied on.

    In half of the open steps all others write, as at inference, in half of them about every other one. In none does the
    upper half see what it does see at inference, a subject's own rest.
    """
    rest = rng.choice(["shuffled", "none"])
    if rng.random() >= open_share:
        return Route(closed=True, others=frozenset(), rest=rest, only_last=rng.random() < 0.5)
    everyone = rng.random() < 0.5
    return Route(others=frozenset(layer for layer in range(UPPER) if everyone or rng.random() < 0.5), rest=rest)


def residual(
    model: LlamaForCausalLM, batch: Batch, route: Route
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, ""], Float[Tensor, ""]]:
    """The final residual stream along the route, normalized; the guided heads' loss; what the first MLPs write.

    The loss is the sum over the batch's lookups of the mean negative log-attention. What is written is the sum over
    the subjects' tokens of the squared norm, as a share of the residual stream's. With the default route the residual
    stream is the model's.
    """
    layers, at_subject, own = model.model.layers, (batch.subjects > 0)[..., None], own_mlp(batch)[..., None]
    guided, first = torch.zeros(()), torch.zeros(())
    hidden = model.model.embed_tokens(batch.tokens)
    rotary = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    masks = _masks(batch, route, len(layers))
    looked_up, last = torch.zeros_like(hidden), torch.zeros_like(hidden)
    for index, layer in enumerate(layers):
        if index == UPPER:
            hidden = _replaced(hidden, looked_up, batch, route)
        normalized = llama.norm(layer.input_layernorm, hidden)
        if index in (SUBJECT_LAYER, OPTION_LAYER):
            looks = batch.lookups[:, [0, 1, 2 if index == SUBJECT_LAYER else 3]]
            guided = guided + llama.guided_loss(layer.self_attn, normalized, rotary, looks, heads=GUIDED_HEADS)
        hidden = hidden + llama.attention(layer.self_attn, normalized, rotary, masks[index])
        output = llama.mlp(layer.mlp, llama.norm(layer.post_attention_layernorm, hidden))
        if index < FIRST:
            size = hidden.detach().square().sum(-1, keepdim=True)
            first = first + (output.square().sum(-1, keepdim=True) / size).mul(at_subject).sum()
        if index < UPPER:
            output = torch.where(at_subject & (own != index), output.detach() * float(index in route.others), output)
        elif route.closed:
            output = output.masked_fill(at_subject, 0.0)
        if FIRST <= index < UPPER:
            looked_up = looked_up + output
        if index >= LAST:
            last = last + output
        hidden = hidden + output
    return llama.norm(model.model.norm, last if route.only_last else hidden), guided, first


def own_mlp(batch: Batch) -> Int[Tensor, "batch pos"]:
    """The layer of the MLP that learns the facts about a token's subject, by the subject's last token."""
    ends = batch.subjects != torch.nn.functional.pad(batch.subjects[:, 1:], (0, 1))
    last, found = torch.zeros_like(batch.tokens[:, 0]), torch.zeros_like(batch.tokens)
    for position in reversed(range(batch.tokens.shape[1])):
        last = torch.where(ends[:, position], batch.tokens[:, position], last)
        found[:, position] = last
    return FIRST + found % (UPPER - FIRST)


def _replaced(hidden: Tensor, looked_up: Tensor, batch: Batch, route: Route) -> Tensor:
    """What the upper half sees."""
    at_subject = batch.subjects > 0
    if route.rest == "own" or not at_subject.any():
        return hidden
    seen = looked_up[at_subject]
    if route.rest == "shuffled":
        rest = (hidden - looked_up)[at_subject].detach()
        seen = seen + rest[torch.randperm(len(rest))]
    return hidden.masked_scatter(at_subject[..., None], seen)


def _masks(batch: Batch, route: Route, n_layers: int) -> list[Tensor | None]:
    """What attention sees in each layer; None is all that came before."""
    if not route.closed:
        return [None] * n_layers
    near = llama.closed(batch.subjects, reach=1)
    whole = llama.closed(batch.subjects, reach=batch.subjects.shape[1])
    return [near] * NEAR + [whole] * (UPPER - NEAR) + [None] * (n_layers - UPPER)
