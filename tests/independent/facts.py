"""Prompts as lists of tokens, each with its own length, and the same prompts as the library takes them."""

from dataclasses import dataclass

import torch
from torch import Tensor

import mechunlearn as mu


@dataclass(frozen=True)
class Fact:
    """One prompt, unpadded. Candidates begin with the answer; `subject` is a range of tokens."""

    clean: list[int]
    corrupt: list[int]
    candidates: list[int]
    subject: range

    @property
    def answer(self) -> int:
        return self.candidates[0]

    @property
    def tokens(self) -> Tensor:
        return torch.tensor([self.clean])

    @property
    def other(self) -> Tensor:
        return torch.tensor([self.corrupt])


# Of three lengths, so that two are padded; subjects of one, two and three tokens.
FACTS = [
    Fact([1, 30, 7, 8, 41, 50, 62], [1, 30, 9, 17, 41, 50, 62], [11, 12, 13, 14], range(2, 4)),
    Fact([1, 33, 31, 22, 40, 51, 61, 70, 72], [1, 33, 31, 25, 40, 51, 61, 70, 72], [12, 11, 14, 13], range(3, 4)),
    Fact([1, 5, 6, 28, 44, 50, 60, 71], [1, 15, 16, 18, 44, 50, 60, 71], [13, 12, 14, 11], range(1, 4)),
]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens with zeros to the right, and which of them are real."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return tokens, torch.tensor([[i < len(row) for i in range(longest)] for row in rows])


def prompts_of(facts: list[Fact]) -> mu.Prompts:
    """The facts as the library takes them, built from tokens alone."""
    tokens, real = padded([fact.clean for fact in facts])
    corrupt, _ = padded([fact.corrupt for fact in facts])
    subject = torch.tensor([[i in fact.subject for i in range(tokens.shape[1])] for fact in facts])
    answers, candidates = [fact.answer for fact in facts], [fact.candidates for fact in facts]
    options = {"attention_mask": real, "candidates": candidates, "corrupt": corrupt, "subject": subject}
    return mu.tasks.Prompts.of(tokens, answers, **options)


def logit_difference(logits: Tensor, fact: Fact) -> Tensor:
    """Logit of the answer minus the mean logit of the other candidates, at the last token."""
    last = logits[0, -1]
    return last[fact.answer] - last[fact.candidates[1:]].mean()
