"""Soft prompt: an attack that learns input vectors before the prompt which bring the forgotten answers out."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Adam, Optimizer
from tqdm.auto import tqdm

from mechunlearn.evaluate.attacks.exam import Asked, check_apart, halves, worst_case
from mechunlearn.evaluate.results import Result
from mechunlearn.metrics import Metric, answer_log_probability, candidate_probability
from mechunlearn.model import Model, differentiable, preserved
from mechunlearn.model.running import check_length, embeddings, with_input_vectors
from mechunlearn.tasks.building import n_opening
from mechunlearn.tasks.prompts import Prompts, joined
from mechunlearn.tasks.task import Task


def soft_prompt(
    model: Model,
    task: Task,
    *,
    n_vectors: int = 4,
    radius: float | None = None,
    steps: int = 64,
    learning_rate: float = 0.03,
    batch_size: int = 16,
    restarts: int = 2,
    retain_coefficient: float = 1.0,
    every: int = 16,
    optimizer: Callable[..., Optimizer] = Adam,
    format: str | None = None,
    metric: Metric = candidate_probability,
    seed: int = 0,
    progress: bool = False,
) -> Result:
    """Accuracy on forgotten facts behind a soft prompt that was trained on *other* forgotten facts, along its training.

    `n_vectors` input vectors stand between BOS and the text of every prompt, in place of token embeddings. They
    minimise

        mean -log p(answer) over the attack's half + retain_coefficient * the same over `task.retain`

    - `batch_size`: how many facts of each side a step has.
    - `radius`: after each step, every vector is put back into the ball |v| <= radius. Default: the mean norm of the
      prompts' token embeddings, as the first layer sees them.
    - `restarts`: each begins at the embeddings of other random tokens of the attack's half. The one with the lowest
      loss on its own training facts is reported.
    - `every`: the steps between two points of the curve, of which the tested facts choose the best.

    The retained facts keep the prompt from always saying the forgotten answer. It may still learn to say it of
    everybody whom the model does not know (https://arxiv.org/abs/2502.15836): the control asks about nobody. Guo et al.
    2025, https://arxiv.org/abs/2410.12949, train keys and values of an attention behind the embeddings instead, with
    radius 6, learning rate 1e-5, 128 steps of 16 facts, 4 restarts and no retained facts.

    Cost: restarts * steps * (F + B) of both batches, and a forward of the tested half for each `every` steps.
    """
    numbers = {"n_vectors": n_vectors, "steps": steps, "batch_size": batch_size, "restarts": restarts, "every": every}
    for name, value in {**numbers, "radius": 1.0 if radius is None else radius}.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    trained, tested = halves(task, format=format, seed=seed)
    check_apart(task.retain, tested)
    asked = Asked.of(model, task, tested, metric=metric, seed=seed)
    start = min(n_bos(model, prompts) for prompts in (trained, task.retain, tested))
    sides = [with_room(model, prompts, n_vectors, start) for prompts in (trained, task.retain)]
    nobody = asked.nobody and with_room(model, asked.nobody, n_vectors, start)
    behind = replace(asked, tested=with_room(model, asked.tested, n_vectors, start), nobody=nobody)
    reach = mean_norm(model, trained) if radius is None else radius
    training = VectorTraining(model, sides[0], sides[1], n_vectors, start, reach, retain_coefficient, batch_size)
    attempts = []
    for restart in tqdm(range(restarts), desc="soft prompt", disable=not progress, leave=False):
        snapshots = training.run(steps, every, learning_rate, optimizer, seed=1000 * seed + restart)
        attempts.append((training.loss(snapshots[steps]), snapshots))
    best = min(attempts, key=lambda attempt: attempt[0])[1]
    runs = {"0": [asked.scores_of(model)]}
    for step, vectors in best.items():
        with with_input_vectors(model, vectors, start):
            runs[str(step)] = [behind.scores_of(model)]
    return worst_case(runs, asked, axis="steps")


@dataclass(frozen=True, eq=False)
class VectorTraining:
    """The training of input vectors; both sets of prompts have room for them at `start`."""

    model: Model
    forgotten: Prompts
    retained: Prompts
    n_vectors: int
    start: int
    radius: float
    retain_coefficient: float
    batch_size: int

    def run(
        self, steps: int, every: int, learning_rate: float, optimizer: Callable[..., Optimizer], *, seed: int
    ) -> dict[int, Float[Tensor, "vector d_model"]]:
        """The vectors after each `every` steps, and after the last."""
        generator, snapshots = torch.Generator().manual_seed(operator.index(seed)), {}
        with differentiable(self.model):
            vectors = within(self._tokens(generator), self.radius).requires_grad_()
            moving = optimizer([vectors], lr=learning_rate)
            batches = [_batches(len(p), self.batch_size, generator) for p in (self.forgotten, self.retained)]
            for step in range(1, steps + 1):
                loss = self._loss(vectors, next(batches[0]), next(batches[1]))
                if not bool(torch.isfinite(loss)):
                    raise FloatingPointError(f"expected a finite loss, got {float(loss)} at step {step} of a search.")
                (vectors.grad,) = torch.autograd.grad(loss, [vectors])
                moving.step()
                with torch.no_grad():
                    vectors.copy_(within(vectors, self.radius))
                if step % every == 0 or step == steps:
                    snapshots[step] = vectors.detach().clone()
        return snapshots

    def loss(self, vectors: Float[Tensor, "vector d_model"]) -> float:
        """The loss on the whole attack's half and as many retained facts."""
        total = 0.0
        with preserved(self.model), torch.no_grad():
            for rows in torch.arange(len(self.forgotten)).split(64):
                total += len(rows) * float(self._loss(vectors, rows, rows % len(self.retained)))
        return total / len(self.forgotten)

    def _loss(self, vectors: Tensor, forgotten: Tensor, retained: Tensor) -> Tensor:
        batch = self.forgotten[forgotten]
        if self.retain_coefficient:
            batch = joined(batch, self.retained[retained])
        with with_input_vectors(self.model, vectors, self.start):
            losses = -answer_log_probability(batch.logits(self.model), batch)
        loss = losses[: len(forgotten)].mean()
        return loss + self.retain_coefficient * losses[len(forgotten) :].mean() if self.retain_coefficient else loss

    def _tokens(self, generator: torch.Generator) -> Float[Tensor, "vector d_model"]:
        """The embeddings of random tokens of the attack's half."""
        prompts = self.forgotten
        kept = prompts.attention_mask.clone()
        kept[:, : self.start + self.n_vectors] = False
        chosen = torch.randint(int(kept.sum()), (self.n_vectors,), generator=generator)
        tokens = prompts.tokens[kept].cpu()[chosen][None].to(prompts.tokens.device)
        return embeddings(self.model, tokens, torch.ones_like(tokens, dtype=torch.bool))[0].detach().float().clone()


def within(vectors: Float[Tensor, "vector d_model"], radius: float) -> Float[Tensor, "vector d_model"]:
    """The nearest vectors of norm `radius` or less."""
    norms = vectors.norm(dim=1, keepdim=True)
    return vectors * (radius / norms.clamp(min=radius))


def with_room(model: Model, prompts: Prompts, count: int, start: int) -> Prompts:
    """The prompts with room for `count` vectors after the first `start` tokens, padded on the right."""
    prompts = prompts.on(model)
    # Padding moves to the right first: then the room is in the same columns of every row.
    begin = prompts.attention_mask.int().argmax(1, keepdim=True)
    real = _inserted(_shifted(prompts.attention_mask, begin, fill=False), count, start)
    check_length(model, int(real.sum(1).max()), f"prompts, with {count} vectors before them,")
    tokens = _inserted(_shifted(prompts.tokens, begin, fill=0), count, start)
    room = replace(prompts, subject=None, corrupt=None, texts=())
    return replace(room, tokens=tokens, attention_mask=real, positions=prompts.positions - begin + count)


def n_bos(model: Model, prompts: Prompts) -> int:
    """After how many first tokens the vectors stand: behind BOS, unless it opens messages and comes again."""
    opening = n_opening(model, prompts)
    bos = None if model.tokenizer is None else model.tokenizer.bos_token_id
    is_again = ((prompts.tokens == bos) & prompts.attention_mask).sum(1) > 1
    return 0 if bool(is_again.any()) else opening


def mean_norm(model: Model, prompts: Prompts) -> float:
    """The mean norm of the prompts' token embeddings, as the first layer sees them (without learned positions)."""
    prompts = prompts.on(model)
    with preserved(model):
        vectors = embeddings(model, prompts.tokens, prompts.attention_mask)[prompts.attention_mask]
    return float(vectors.float().norm(dim=1).mean())


def _shifted(values: Tensor, begin: Tensor, *, fill: int | bool) -> Tensor:
    """Each row from its first real token on, filled up on the right."""
    places = torch.arange(values.shape[1], device=values.device) + begin
    shifted = values.gather(1, places.clamp(max=values.shape[1] - 1))
    return shifted.masked_fill(places >= values.shape[1], fill)


def _inserted(values: Tensor, count: int, start: int) -> Tensor:
    """The values with `count` copies of the first column behind the first `start` columns."""
    # The first column is a real token in every row, and any token will do: its embedding is replaced.
    return torch.cat([values[:, :start], values[:, :1].expand(-1, count), values[:, start:]], 1)


def _batches(length: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows in random order, each once before any comes again."""
    while True:
        yield from torch.randperm(length, generator=generator).split(operator.index(size))
