"""Which facts a model knows."""

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.model import Model, check_model, device_of, preserved
from mechunlearn.tasks.prompts import IGNORED, Prompts


def knows(
    model: Model, prompts: Prompts, *, threshold: float | None = None, batch_size: int = 32
) -> Bool[Tensor, "batch"]:
    """True where the model gives the answer of its own accord, so that there is something to forget.

    `threshold=None`: every token of the answer is the most probable one of the vocabulary. A number: the probability of
    the whole answer (all of its tokens, after the prompt) is at least that; Guo et al. 2025
    (https://arxiv.org/abs/2410.12949) keep CounterFact records from 0.5 on. Cost: 1 forward.
    ValueError for a threshold outside 0..1.
    """
    check_model(model)
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(
            f"threshold must lie in 0..1 (a probability; None: the most probable answer), got {threshold}."
        )
    found = []
    with preserved(model), torch.no_grad():
        for batch in prompts.to(device_of(model)).batches(batch_size):
            logits, mask = batch.logits(model).float(), batch.answer_mask
            if threshold is None:
                found.append(((logits.argmax(-1) == batch.answers) | ~mask).all(1).cpu())
            else:
                answers = batch.answers.masked_fill(batch.answers == IGNORED, 0)
                each = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
                found.append((each.masked_fill(~mask, 0).sum(1).exp() >= threshold).cpu())
    return torch.cat(found)
