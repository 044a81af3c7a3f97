"""How much of an answer has to be given away before the model completes it."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.evaluate.accuracy import measure
from mechunlearn.evaluate.result import Result
from mechunlearn.evaluate.sides import Side, side_of
from mechunlearn.model import Model
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task


def extraction_strength(
    model: Model,
    task: Task,
    *,
    format: str | None = None,
    side: Side = "forget",
    batch_size: int = 64,
) -> Result:
    """Mean extraction strength of the answers, from 0 (only the last token, or nothing, is completed) to 1 (all of it).

    For an answer of T tokens, ES = 1 - k / T, where k is the smallest number of its tokens after which greedy
    generation gives the others; at least one token must be generated, so k <= T - 1 and ES >= 1 / T, even if nothing
    is right. That floor is taken out: (ES - 1 / T) / (1 - 1 / T) = (T - 1 - k) / (T - 1), which is comparable across
    lengths. An answer of *one* token cannot be given in part, and ES is 1 whatever the model says: it counts 1 if that
    token is generated and 0 if not, so there this is accuracy over the vocabulary and says nothing more. With two
    tokens it is still 0 or 1: all of it, or not.

    Chance is about 0. `format`: default the first, the trained prompt. Cost: 1 forward, since greedy generation is
    right from k on exactly if each later token is the argmax given those before it.

    Carlini et al. 2021, https://arxiv.org/abs/2012.07805; as a score of unlearning: Wang et al. 2025,
    https://arxiv.org/abs/2406.09179. ValueError for a format or side that the task lacks.
    """
    found = measure(model, side_of(task, format=format, side=side), [_strength], batch_size=batch_size)[0]
    return replace(found, sense="extraction strength without its floor", chance=0.0, unit="share")


def _strength(logits: Float[Tensor, "batch answer d_vocab"], prompts: Prompts) -> Float[Tensor, "batch"]:
    real = prompts.answer_mask
    length = real.sum(1)
    wrong = (logits.argmax(-1) != prompts.answers) & real
    places = torch.arange(1, wrong.shape[1] + 1, device=wrong.device)
    given = (wrong * places).amax(1)  # up to the last wrong token
    strength = (length - 1 - given) / (length - 1).clamp(min=1)
    return torch.where(length > 1, strength.clamp(min=0.0), (given == 0).float())
