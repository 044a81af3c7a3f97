"""How far the edited model has moved from the original on general text."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.evaluate.results import Result
from mechunlearn.losses import kl_to_original
from mechunlearn.model import Model, check_model, device_of, preserved
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task
from mechunlearn.tasks.text import as_prompts


def text_kl(
    model: Model,
    task: Task,
    *,
    original: Callable[[], AbstractContextManager[Model]] | None = None,
    batch_size: int = 16,
) -> Result:
    """Mean KL(original || tested) over the tokens of `task.text_test`, one value per row, in nats per token.

        sum over v of p0(v) (log p0(v) - log p(v)),   p0 = the original model's prediction of the next token

    0 for the original itself; larger is worse. There is no chance level. It sees damage that `text_loss` misses:
    text is about as likely, but other words than before are expected. `compare` passes `original`.

    Cost: 2 forwards over the text, and memory for the logits of two batches; `original` is entered once per batch.
    ValueError without `original`, or if the result is not finite.
    """
    if original is None:
        raise ValueError(
            "expected the original model to compare with, got none: run text_kl by mu.evaluate.compare, or pass "
            "original=..., a function whose result is a context: inside `with original() as model:` is the original."
        )
    check_model(model)
    batches = as_prompts(task.text_test).to(device_of(model)).batches(batch_size)
    values = torch.cat([_per_row(model, batch, original) for batch in batches])
    if not bool(torch.isfinite(values).all()):
        raise ValueError("expected finite predictions on task.text_test, got NaN or infinity: check the model's dtype.")
    return Result(values, "KL(original || tested)", unit="nats per token")


def _per_row(
    model: Model, batch: Prompts, original: Callable[[], AbstractContextManager[Model]]
) -> Float[Tensor, "batch"]:
    with torch.no_grad():
        with original() as untouched, preserved(untouched):
            before = batch.logits(untouched)
        with preserved(model):
            after = batch.logits(model)
        # Row by row: two more tensors of the size of the logits would double the memory.
        rows = zip(after, before.to(after.device), batch.answer_mask, strict=True)
        return torch.stack([kl_to_original(a[real], b[real]).mean() for a, b, real in rows]).cpu()
