"""The terms of a training loss: their batches in an order that a seed fixes, and the gradient of each."""

import hashlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.identity import digest, name_of
from mechunlearn.losses import Loss, is_per_row, needs
from mechunlearn.model import device_of
from mechunlearn.model.running import unembedded
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.text import as_prompts
from mechunlearn.training.trained_layers import Part, Reader, Readings


@dataclass(frozen=True)
class Term:
    """One term of the loss: coefficient * mean over the answer tokens (or the prompts) of a batch of `prompts`.

    Where there are fewer prompts than `batch_size`, each batch is all of them, once.
    """

    name: str
    prompts: Prompts | Iterator[Int[Tensor, "pos"]] | None
    """Prompts, or an iterator over rows of text of one length, each used once; None where the coefficient is 0."""
    loss: Loss
    coefficient: float
    batch_size: int
    alternative: Prompts | None = None
    """The same prompts with the answers that a loss such as `dpo` prefers, row by row."""


def shuffled(term: Term, prompts: Prompts, seed: int) -> Iterator[Int[Tensor, "row"]]:
    """Row numbers without end: every row once per epoch, in a new order each epoch, by the seed and the term's name."""
    digest = hashlib.sha256(f"{seed} {term.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
    waiting, size = torch.empty(0, dtype=torch.long), min(term.batch_size, len(prompts))
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(len(prompts), generator=generator)])
        yield waiting[:size]
        waiting = waiting[size:]


def text_batches(rows: Iterator[Int[Tensor, "pos"]], size: int) -> Iterator[Prompts]:
    """Batches of a stream of text. ValueError, which says after how many tokens, when the stream ends."""
    count = length = 0
    while True:
        # A stream is read only when a batch is asked for, and never further than that batch.
        batch = list(islice(rows, size))
        count, length = count + len(batch), len(batch[-1]) if batch else length
        if len(batch) < size:
            raise ValueError(
                f"expected text for another batch of {size} rows, but the stream ended after {count * length} tokens "
                f"({count} whole rows of {length}): pass more text, fewer steps, shorter rows or smaller batches."
            )
        yield as_prompts(torch.stack(batch))


LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 25}
"""How many logits exist at once: 16 MiB of float32 on the CPU, of which a loss needs three times as much. A GPU takes
more, because starting its kernels costs more."""


@dataclass(eq=False)
class Source:
    """A term and its batches.

    For prompts, batches are row numbers, in an order that the seed fixes. For a stream of text they are the rows
    themselves, each used once. What the layers below the trained ones and the unedited model say about prompts is kept,
    if prompts come again; otherwise it is computed for each batch.
    """

    part: Part
    term: Term
    seed: int
    micro_batch_size: int | None
    steps: int
    names: tuple[str, ...] = field(init=False)
    wanted: list[str] = field(init=False)
    original: list[str] = field(init=False)
    other: Prompts | None = field(init=False, default=None)
    """The preferred answers, for a loss that compares two."""
    batches: Iterator[Tensor] | Iterator[Prompts] = field(init=False)
    kept: tuple[Reader, ...] = field(init=False, default=())
    read: str = field(init=False, default="")
    """A digest of what a stream of text has given so far; empty for prompts."""

    def __post_init__(self) -> None:
        term = self.term
        if term.batch_size < 1:
            raise ValueError(f"the batch size of {term.name} must be 1 or more, got {term.batch_size}.")
        self.names = needs(term.loss)
        self.wanted = _readings([name for name in self.names if not name.startswith("original_")])
        self.original = _readings([n.removeprefix("original_") for n in self.names if n.startswith("original_")])
        prompts, compares = term.prompts, any("alternative" in name for name in self.names)
        if prompts is None:
            raise ValueError(f"expected prompts for the {term.name} term, got None: give some, or a coefficient of 0.")
        if not isinstance(prompts, Prompts):
            if compares:
                raise ValueError(
                    f"expected a loss of text, got {name_of(term.loss)}, which compares two answers: use cross_entropy "
                    f"or kl_to_original."
                )
            self.batches = text_batches(prompts, term.batch_size)
            return
        self.other = term.alternative if compares else None
        alternatives = 0 if self.other is None else len(self.other)
        if compares and alternatives != len(prompts):
            raise ValueError(
                f"expected an alternative answer for each of the {len(prompts)} {term.name} prompts, as "
                f"{name_of(term.loss)} compares two answers, got {alternatives}: give the task an injection."
            )
        self.batches = shuffled(term, prompts, self.seed)
        if self.steps * term.batch_size > len(prompts):  # then prompts come again
            self.kept = self._readers(prompts, self.other)

    def skip(self, steps: int) -> None:
        """Pass over the batches of earlier steps; a stream of text is read up to the same place."""
        for _ in range(steps):
            self._batch()

    def backward(self, step: int) -> float:
        """The value of the term on its next batch, without the coefficient; its gradient is added to the weights'."""
        rows, readers = self._next()
        per_row = is_per_row(self.term.loss)
        total = len(rows) if per_row else int(readers[0].prompts.answer_mask[rows].sum())
        value = 0.0
        size = self.micro_batch_size or len(rows)
        if per_row:  # all logits of a prompt exist at once
            size = min(size, max(1, self._at_once() // readers[0].prompts.answers.shape[1]))
        for micro_batch in rows.split(operator.index(size)):
            with self.part.computing():
                value += (self._rows if per_row else self._tokens)(readers, micro_batch, total, step)
        return value

    def _tokens(self, readers: tuple[Reader, ...], rows: Tensor, total: int, step: int) -> float:
        """For a loss of tokens. Each piece of the logits is used up before the next is computed."""
        reader, real = readers[0], readers[0].prompts.answer_mask[rows]
        lengths = real.sum(1, keepdim=True).expand_as(real)
        alike = {"targets": reader.prompts.answers[rows][real], "length": lengths[real]}
        # The graph of the model ends in these readings. Copies without it, leaves, take up the gradient of one piece of
        # the logits after the other; then one backward pass goes on from them through the model.
        graph = {name: value[real] for name, value in reader.now(rows, self.wanted).items()}
        leaves = {name: value.detach().requires_grad_() for name, value in graph.items()}
        before = {name: value[rows][real] for name, value in reader.before.items()}
        value = 0.0
        size = self._at_once() if "final" in {*graph, *before} else int(real.sum())
        for piece in torch.arange(int(real.sum())).split(operator.index(size)):
            inputs = {name: value[piece] for name, value in alike.items()} | self._inputs(leaves, piece)
            with torch.no_grad():
                inputs |= {f"original_{name}": reading for name, reading in self._inputs(before, piece).items()}
            value += self._step({name: inputs[name] for name in self.names}, len(piece), "token", total, step)
        reached = [name for name in graph if leaves[name].grad is not None]
        if reached:
            torch.autograd.backward([graph[name] for name in reached], [leaves[name].grad for name in reached])
        return value

    def _rows(self, readers: tuple[Reader, ...], rows: Tensor, total: int, step: int) -> float:
        """For a loss of prompts, by the log-probability of their answers."""
        inputs = {"length": readers[0].prompts.answer_mask[rows].sum(1)}
        for prefix, reader in zip(("", "alternative_"), readers, strict=False):
            now = reader.now(rows, self.wanted)["final"]
            inputs[f"{prefix}log_probability"] = self._log_probability(reader.prompts, rows, now)
            if self.original:
                with torch.no_grad():
                    before = self._log_probability(reader.prompts, rows, reader.before["final"][rows])
                inputs[f"original_{prefix}log_probability"] = before
        return self._step({name: inputs[name] for name in self.names}, len(rows), "prompt", total, step)

    def _step(self, inputs: dict[str, Tensor], count: int, unit: str, total: int, step: int) -> float:
        """The share of some tokens or prompts in the mean; its gradient is added."""
        term = self.term
        values = term.loss(**inputs)
        if values.shape != (count,):
            raise ValueError(
                f"expected {name_of(term.loss)} to give one value per {unit}, shape ({count},), got "
                f"{tuple(values.shape)}: do not average inside the loss (reduction='none')."
            )
        loss = values.sum() / total
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"expected a finite loss, got {loss.item()} from {term.name} ({name_of(term.loss)}) "
                f"at step {step}: stopped; lower the learning rate."
            )
        if loss.requires_grad:  # not where every value was cut off
            (term.coefficient * loss).backward()
        return loss.item()

    def _inputs(self, readings: Readings, piece: Tensor) -> dict[str, Tensor]:
        """The inputs of a loss for some answer tokens, with logits in place of the stream before the final norm."""
        inputs = {name: value[piece] for name, value in readings.items()}
        if "final" in inputs:
            inputs["logits"] = unembedded(self.part.model, inputs.pop("final"), precise=False)
        return inputs

    def _log_probability(
        self, prompts: Prompts, rows: Tensor, final: Float[Tensor, "row answer d_model"]
    ) -> Float[Tensor, "row"]:
        real, answers = prompts.answer_mask[rows], prompts.answers[rows]
        logits = unembedded(self.part.model, final[real], precise=False)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        of_tokens = logits.log_softmax(-1).gather(1, answers[real][:, None])[:, 0]
        # The log-probability of a whole answer is the sum over its tokens: each is added to the row that it is from.
        row = torch.arange(len(rows), device=of_tokens.device)[:, None].expand_as(real)[real]
        return of_tokens.new_zeros(len(rows)).index_add(0, row, of_tokens)

    def _at_once(self) -> int:
        """The number of tokens whose logits exist at once."""
        numbers = LOGITS_AT_ONCE.get(device_of(self.part.model).type, LOGITS_AT_ONCE["cpu"])
        return max(1, numbers // self.part.model.cfg.d_vocab)

    def _batch(self) -> Tensor | Prompts:
        batch = next(self.batches)
        if isinstance(batch, Prompts):
            self.read = digest((self.read, batch.tokens))
        return batch

    def _next(self) -> tuple[Tensor, tuple[Reader, ...]]:
        """Rows of the next batch, and their readers: of all prompts, or of this batch alone."""
        batch, prompts, other = self._batch(), self.term.prompts, self.other
        if self.kept and isinstance(batch, Tensor):
            return batch, self.kept
        if isinstance(batch, Tensor) and isinstance(prompts, Prompts):
            readers = self._readers(prompts.rows(batch), other and other.rows(batch))
            return torch.arange(len(batch)), readers
        assert isinstance(batch, Prompts)
        return torch.arange(len(batch)), self._readers(batch, None)

    def _readers(self, *chosen: Prompts | None) -> tuple[Reader, ...]:
        device, block = device_of(self.part.model), self.micro_batch_size or 64
        with self.part.computing():
            return tuple(Reader.of(self.part, p.to(device), self.original, block) for p in chosen if p is not None)


def _readings(names: list[str]) -> list[str]:
    """The residual streams (`Readings`) from which these inputs of a loss are computed."""
    final = [name for name in names if name not in ("targets", "length", "residual")]
    return [*(["residual"] if "residual" in names else []), *(["final"] if final else [])]
