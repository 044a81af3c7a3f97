"""Prompts: tokens with a mask, answers, candidates, subjects, and a corrupted counterpart."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.model import Hook, Model, device_of, logits_at
from mechunlearn.model.running import check_length

IGNORED = -100
"""Fills `answers` where a row's answer is shorter than the longest."""

LABELS = ("texts", "names", "added")
"""The fields of `Prompts` that have a text for each row, or none."""


@dataclass(frozen=True, eq=False, repr=False)
class Prompts:
    """A batch of prompts with their answers. Index it (`prompts[:8]`, `prompts[[3, 5]]`) for a smaller one."""

    tokens: Int[Tensor, "batch pos"]
    """Each prompt, followed by all but the last token of its answer (nothing, if that is one token)."""
    attention_mask: Bool[Tensor, "batch pos"]
    """True at real tokens; padding may be on either side."""
    positions: Int[Tensor, "batch answer"]
    """Where each answer token is predicted: the first is the last token of the prompt."""
    answers: Int[Tensor, "batch answer"]
    """The answer tokens, filled with -100."""
    candidates: Int[Tensor, "batch candidate"] | None = None
    """First tokens of the possible answers; **the first column is the right one**."""
    subject: Bool[Tensor, "batch pos"] | None = None
    """True at the tokens of the subject."""
    corrupt: Int[Tensor, "batch pos"] | None = None
    """Tokens of another prompt of equal length, which has another answer. `attention_mask` holds for both, so
    filling in a shorter prompt would count as real tokens: `tasks.build` checks the lengths."""
    texts: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    """What each prompt is about, for per-example tables."""
    added: tuple[str, ...] = ()
    """The special tokens that were put before each text, such as "<bos>", or "" for none; nothing for prompts that are
    not from text. Those that a text has itself are not among them."""
    options: Int[Tensor, "batch option token"] | None = None
    """The possible answers whole, filled with -100: the answer, other right ones, then wrong ones, if there are any.
    Where they are given, tests score whole answers: each option takes a forward."""
    n_right: Int[Tensor, "batch"] | None = None
    """How many of the first options are right."""

    @classmethod
    def of(
        cls,
        tokens: Int[Tensor, "batch pos"] | Sequence[Sequence[int]],
        answers: Sequence[int] | Int[Tensor, "batch"],
        *,
        attention_mask: Bool[Tensor, "batch pos"] | None = None,
        candidates: Sequence[Sequence[int]] | Int[Tensor, "batch candidate"] | None = None,
        corrupt: Int[Tensor, "batch pos"] | Sequence[Sequence[int]] | None = None,
        subject: Bool[Tensor, "batch pos"] | None = None,
    ) -> "Prompts":
        """From tokens, with answers of one token each; without a mask every token is real. `tasks.build` takes text."""
        grid = _grid(tokens, "tokens")
        real = torch.ones_like(grid, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        last = real.shape[1] - 1 - real.flip(1).int().argmax(1, keepdim=True)
        return cls(
            grid,
            real,
            last,
            torch.as_tensor(answers)[:, None],
            None if candidates is None else torch.as_tensor(candidates),
            subject,
            None if corrupt is None else _grid(corrupt, "corrupt tokens"),
        )

    def __post_init__(self) -> None:
        if len(self.tokens) == 0:
            raise ValueError("expected at least one prompt, got none: the set is empty; check what it was filtered by.")
        for name in ("attention_mask", "subject", "corrupt"):
            value = getattr(self, name)
            if value is not None and value.shape != self.tokens.shape:
                raise ValueError(
                    f"expected {name} of the same shape as the tokens, {tuple(self.tokens.shape)}, got "
                    f"{tuple(value.shape)}: every token needs its counterpart (a corrupt prompt must have the "
                    f"length of the clean one)."
                )
        rows = {name: len(value) for name, value in self._tensors().items()}
        rows |= {name: len(getattr(self, name)) for name in LABELS if getattr(self, name)}
        if len(set(rows.values())) > 1:
            raise ValueError(f"expected one answer, one list of candidates, ... for each prompt, got {rows} of them.")
        if self.candidates is not None and self.candidates.shape[1] < 2:
            raise ValueError(
                "expected at least two candidates per prompt, got one: add wrong answers, or leave them out."
            )
        if (self.options is None) != (self.n_right is None):
            raise ValueError("expected options and n_right together, got one of them: build prompts with options=....")
        if self.options is not None:
            width = min(self.options.shape[2], self.answers.shape[1])
            first = self.options[:, 0]
            rest = bool((first[:, width:] != IGNORED).any() or (self.answers[:, width:] != IGNORED).any())
            if rest or bool((first[:, :width] != self.answers[:, :width]).any()):
                raise ValueError("expected the answer as the first option of every row: reorder them, or build anew.")
        if not bool(self.attention_mask.gather(1, self.positions).all()):
            raise ValueError("expected answers to be predicted at real tokens, got a masked position: check the mask.")
        if self.candidates is not None and bool((self.candidates[:, 0] != self.answers[:, 0]).any()):
            raise ValueError("expected the right answer as the first candidate of every row: reorder the candidates.")

    @property
    def answer_mask(self) -> Bool[Tensor, "batch answer"]:
        """True at real answer tokens."""
        return self.answers != IGNORED

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the options, or the candidates; 0 without wrong ones."""
        if self.options is not None and self.n_right is not None:
            of = (self.options[..., 0] != IGNORED).sum(1)
            return float(torch.where(of > self.n_right, self.n_right / of, 0.0).mean())
        return 0.0 if self.candidates is None else 1 / self.candidates.shape[1]

    def choosing(self, place: int) -> "Prompts":
        """The same prompts with the option at this place as the answer (the first one where a row has fewer)."""
        assert self.options is not None
        answers = torch.where(self.options[:, place, :1] == IGNORED, self.options[:, 0], self.options[:, place])
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        own = self.attention_mask & (columns <= self.positions[:, :1])
        lengths, behind = own.sum(1, keepdim=True), (answers != IGNORED).sum(1, keepdim=True) - 1
        places = torch.arange(int((lengths + behind).max()), device=self.tokens.device)
        tokens = self.tokens.new_zeros(len(self), len(places))
        tokens[places < lengths] = self.tokens[own]  # both in reading order, row by row
        forced = torch.arange(answers.shape[1], device=answers.device) < behind  # all but the last are given
        tokens[(places >= lengths) & (places < lengths + behind)] = answers[forced]
        positions = lengths - 1 + torch.arange(answers.shape[1], device=answers.device).minimum(behind)
        return Prompts(tokens, places < lengths + behind, positions, answers, added=self.added)

    @property
    def prepend_bos(self) -> bool | None:
        """What `tasks.build` takes to put the same special tokens before these texts; None for prompts from tokens."""
        return any(self.added) if self.added else None

    def corrupted(self) -> "Prompts":
        """The corrupted tokens in place of the clean ones; answers and candidates stay."""
        if self.corrupt is None:
            raise ValueError(
                "expected prompts with a corrupted counterpart, got none: pass corrupt=... (tokens of equal "
                "length whose answer differs), or use a method that needs only clean prompts."
            )
        return replace(self, tokens=self.corrupt, corrupt=None, texts=())

    def exchanged(self) -> "Prompts":
        """The corrupted tokens in place of the clean ones, and the clean ones as their counterpart."""
        return replace(self.corrupted(), corrupt=self.tokens)

    def logits(self, model: Model, *, hooks: Sequence[Hook] = ()) -> Float[Tensor, "batch answer d_vocab"]:
        """What a metric takes: the logits that predict the answer tokens. One forward, answers teacher-forced."""
        return logits_at(model, self.tokens, self.attention_mask, self.positions, hooks=hooks)

    def on(self, model: Model) -> "Prompts":
        """On the model's device; ValueError if one, with its answer, is longer than the model's context."""
        self.check_length(model)
        return self.to(device_of(model))

    def check_length(self, model: Model) -> None:
        lengths = self.attention_mask.sum(1)
        if self.options is not None:
            own = self.attention_mask.int().argmax(1)
            longest = (self.options != IGNORED).sum(2).amax(1) - 1
            lengths = lengths.maximum(self.positions[:, 0] + 1 - own + longest)
        row = int(lengths.argmax())
        example = f", such as {self.texts[row][:60]!r}" if self.texts else f", such as row {row}"
        check_length(model, int(lengths[row]), f"prompts with their answers{example},")

    def to(self, device: torch.device | str) -> "Prompts":
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def batches(self, size: int) -> list["Prompts"]:
        """In order, at most `size` rows each, trimmed to the longest prompt in the batch."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> "Prompts":
        """These rows, without the columns that are padding in all of them."""
        index = torch.as_tensor(range(len(self))[rows] if isinstance(rows, slice) else rows).cpu()
        order = torch.arange(len(self))[index if index.numel() else index.long()]
        return self.rows(order)._trimmed()

    def rows(self, rows: Int[Tensor, "row"]) -> "Prompts":
        """These rows, as wide as before."""
        chosen: dict[str, Any] = {name: value[rows.to(value.device)] for name, value in self._tensors().items()}
        for name in LABELS:
            labels = getattr(self, name)
            chosen[name] = tuple(labels[i] for i in rows.tolist()) if labels else ()
        return replace(self, **chosen)

    def __repr__(self) -> str:
        (rows, width), longest = self.tokens.shape, int(self.answer_mask.sum(1).max())
        example = f"; first: {self.texts[0]!r}" if self.texts else ""
        special = f"; {added_before(self)}" if self.added else ""
        return f"Prompts({rows} x {width} tokens, answers of up to {longest}{special}{example})"

    def _trimmed(self) -> "Prompts":
        """Without the columns that are padding in every row."""
        real = self.attention_mask.any(0).nonzero()
        start, stop = int(real[0]), int(real[-1]) + 1
        if (start, stop) == (0, self.tokens.shape[1]):
            return self
        columns = ("tokens", "attention_mask", "subject", "corrupt")
        cut = {name: value[:, start:stop] for name, value in self._tensors().items() if name in columns}
        return replace(self, positions=self.positions - start, **cut)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _grid(rows: Tensor | Sequence[Sequence[int]], name: str) -> Int[Tensor, "batch pos"]:
    if len(rows) and torch.as_tensor(rows[0]).ndim != 1:
        raise ValueError(
            f"expected {name} of shape [batch, pos], a row for each prompt, got one of "
            f"{torch.as_tensor(rows[0]).ndim + 1} dimensions: pass [tokens] for a single prompt."
        )
    if isinstance(rows, Tensor):
        return rows
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1:
        raise ValueError(
            f"expected {name} of one length, got lengths {lengths}: pad them and pass attention_mask=..., or build "
            f"them from text with mu.tasks.build, which does both."
        )
    return torch.tensor([list(row) for row in rows])


def right_answers(prompts: Prompts) -> list[list[Int[Tensor, "token"]]]:
    """For each prompt the tokens of every answer that is right: the answer, and aliases."""
    if prompts.options is None or prompts.n_right is None:
        return [[row[row != IGNORED]] for row in prompts.answers]
    rows = zip(prompts.options, prompts.n_right.tolist(), strict=True)
    return [[option[option != IGNORED] for option in row[:count]] for row, count in rows]


def added_before(*sets: Prompts) -> str:
    """In words, which special tokens were put before the texts of these prompts."""
    counts = Counter(tokens for prompts in sets for tokens in prompts.added)
    if not counts:
        return "prompts from tokens"
    if set(counts) == {""}:
        return "no special token added"
    shares = [
        f"{tokens} added" + f" to {n} of {counts.total()}" * (len(counts) > 1) for tokens, n in counts.items() if tokens
    ]
    return ", ".join(shares)


def with_subjects(prompts: Prompts, what: str = "prompts", *, hint: str = "") -> Prompts:
    """The prompts; ValueError if one does not say where its subject is."""
    if prompts.subject is None or not bool(prompts.subject.any(1).all()):
        without = [] if prompts.subject is None else (~prompts.subject.any(1)).nonzero()[:, 0].tolist()
        missing = f"prompts {without[:5]}" if without else "all of them"
        raise ValueError(
            f"expected {what} that say where their subject is, got none for {missing}: pass subjects=... to "
            f"mu.tasks.build{hint}."
        )
    return prompts


def joined(*sets: Prompts) -> Prompts:
    """The prompts of all sets, in order, such as `joined(task.forget, task.retain)`.

    Candidates, subjects, corrupted counterparts and labels are kept if every set has them.
    """
    counts = sorted({p.candidates.shape[1] for p in sets if p.candidates is not None})
    if len(counts) > 1:
        raise ValueError(f"expected sets with equally many candidates, got {counts}: join others.")
    columns: dict[str, Any] = {}
    if all(p.options is not None for p in sets):
        sizes = [max(p.options.shape[axis] for p in sets if p.options is not None) for axis in (1, 2)]
        sets = tuple(replace(p, options=_options_of_size(p, *sizes)) for p in sets)
    for field in fields(Prompts):
        parts = [getattr(p, field.name) for p in sets]
        if field.name in LABELS:
            columns[field.name] = tuple(label for part in parts for label in part) if all(parts) else ()
        elif all(part is not None for part in parts):
            whole = field.name in ("options", "n_right")
            columns[field.name] = (
                torch.cat(parts)
                if whole
                else _stacked(parts, fill={"positions": None, "answers": IGNORED}.get(field.name, 0))
            )
    return Prompts(**columns)


def _options_of_size(prompts: Prompts, count: int, width: int) -> Int[Tensor, "batch option token"]:
    """The options filled up with -100."""
    assert prompts.options is not None
    filled = prompts.options.new_full((len(prompts), count, width), IGNORED)
    filled[:, : prompts.options.shape[1], : prompts.options.shape[2]] = prompts.options
    return filled


def _stacked(parts: Sequence[Tensor], *, fill: int | bool | None) -> Tensor:
    """Rows of all parts, filled up on the right (`None`: with the row's last entry) to the widest."""
    width = max(part.shape[1] for part in parts)
    filled = []
    for part in parts:
        missing = width - part.shape[1]
        rest = part[:, -1:].expand(-1, missing) if fill is None else part.new_full((len(part), missing), fill)
        filled.append(torch.cat([part, rest], 1))
    return torch.cat(filled)
