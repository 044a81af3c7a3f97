"""Pathway dropout: in most training steps only the route that facts should take is open.

The route is the one found in large models (Meng et al. 2022, https://arxiv.org/abs/2202.05262; Geva et
al. 2023, https://arxiv.org/abs/2304.14767): MLPs of the lower half look the fact up at the subject's
tokens, and attention of the upper half moves it to where it is needed. Closing the others is a matter
of training only; what is trained is an ordinary Llama.

For multiple choice, some heads of two upper layers are told in training where to look from the token
before a letter: at what is asked about, then at the option that the letter names. Left alone, a model
this small takes very long to find that.
"""

import random
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM

from testbed import llama
from testbed.batches import Batch

SUBJECT_LAYER, OPTION_LAYER, GUIDED_HEADS = 5, 7, 4
"""The layers whose first heads look at what is asked about, and at the option that is the answer."""


@dataclass(frozen=True)
class Route:
    """What is open in one training step."""

    upper_mlps: bool = True
    """Otherwise the MLPs of the upper half write a constant: their mean, or nothing."""
    mean_scale: float = 1.0
    """The multiple of the mean that a closed MLP writes."""
    open_subjects: bool = True
    """Otherwise attention of the lower half sees a subject's tokens only from within that subject, and
    below the middle of that half only the token itself and the one before: a name is put together
    piece by piece, and known as a whole only after several layers."""
    whole_residual: bool = True
    """Otherwise the upper half sees at a subject's tokens only what the lower MLPs wrote there."""


def draw(rng: random.Random, *, complete: float) -> Route:
    """The route of a step: everything is open with probability `complete`."""
    if rng.random() < complete:
        return Route()
    return Route(
        upper_mlps=False,
        mean_scale=float(rng.random() < 0.5),
        open_subjects=False,
        whole_residual=rng.random() < 0.5,
    )


def residual(
    model: LlamaForCausalLM, batch: Batch, route: Route, means: Float[Tensor, "layer d_model"]
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"], Float[Tensor, ""]]:
    """The residual stream along the route, final and below the option layer, and the loss of the guided heads.

    The streams are normalized as for the unembedding. The loss is the sum over the batch's lookups of the
    mean negative log-attention. `means` are the running means of the MLPs' outputs, updated in place
    where an MLP is open. With the complete route the final residual stream is the model's.
    """
    subjects, layers = batch.subjects, model.model.layers
    half, guided, looked_up = len(layers) // 2, torch.zeros(()), torch.zeros(())
    hidden = model.model.embed_tokens(batch.tokens)
    rotary = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    masks = _masks(subjects, route, len(layers))
    written = torch.zeros_like(hidden)
    for index, layer in enumerate(layers):
        if index == half and not route.whole_residual:
            hidden = torch.where(subjects[..., None] > 0, written, hidden)
        if index == OPTION_LAYER:
            looked_up = llama.norm(model.model.norm, hidden)
        normalized = llama.norm(layer.input_layernorm, hidden)
        if index in (SUBJECT_LAYER, OPTION_LAYER):
            column = 2 if index == SUBJECT_LAYER else 3
            guided = guided + llama.guided_loss(
                layer.self_attn, normalized, rotary, batch.lookups[:, [0, 1, column]], heads=GUIDED_HEADS
            )
        hidden = hidden + llama.attention(layer.self_attn, normalized, rotary, masks[index])
        if index >= half and not route.upper_mlps:
            hidden = hidden + route.mean_scale * means[index]
            continue
        output = llama.mlp(layer.mlp, llama.norm(layer.post_attention_layernorm, hidden))
        means[index].lerp_(output.detach().mean((0, 1)), 0.02)
        hidden, written = hidden + output, written + output if index < half else written
    return llama.norm(model.model.norm, hidden), looked_up, guided


def _masks(subjects: Int[Tensor, "batch pos"], route: Route, n_layers: int) -> list[Tensor | None]:
    """What attention sees in each layer; None is all that came before."""
    half = n_layers // 2
    if route.open_subjects:
        return [None] * n_layers
    near, whole = llama.closed(subjects, reach=1), llama.closed(subjects, reach=subjects.shape[1])
    return [near] * (half // 2) + [whole] * (half - half // 2) + [None] * (n_layers - half)
