"""Corrupted counterparts: the same prompt about somebody else, or about nobody."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from mechunlearn.model import Model
from mechunlearn.model.tokens import encode
from mechunlearn.tasks import formats
from mechunlearn.tasks.athletes import Athlete
from mechunlearn.tasks.prompts import Prompts


def with_random_subjects(model: Model, prompts: Prompts, *, seed: int = 0) -> Prompts:
    """The prompts with corrupted counterparts whose subjects are random tokens, each other than the one it replaces.

    They are drawn evenly from the vocabulary, special tokens left out. Such a subject has no answer of its own, where
    another subject has a wrong one. Goes into `sports_facts(..., corrupt=with_random_subjects)`, or onto any prompts:
    `replace(task, forget=with_random_subjects(model, task.forget))`. ValueError for prompts without subjects.
    """
    if prompts.subject is None or model.tokenizer is None:
        raise ValueError("expected prompts with subjects, got none: pass subjects=... to mu.tasks.build.")
    special = set(model.tokenizer.all_special_ids)
    known = {token for token in model.tokenizer.get_vocab().values() if token < model.cfg.d_vocab}
    tokens = torch.tensor(sorted(known - special))
    places = prompts.subject.cpu()
    before = prompts.tokens.cpu()[places]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(tokens) - 1, before.shape, generator=generator)
    same = torch.searchsorted(tokens, before)  # of all but the token itself: those from it on move up by one
    is_known = tokens[same.clamp(max=len(tokens) - 1)] == before
    corrupt = prompts.tokens.cpu().clone()
    corrupt[places] = tokens[drawn + ((drawn >= same) & is_known).long()]
    return replace(prompts, corrupt=corrupt.to(prompts.tokens))


def partners_of(model: Model, people: Sequence[Athlete]) -> dict[str, list[str]]:
    """Athlete -> those of another sport whose prompt has as many tokens."""
    by_length: dict[int, list[Athlete]] = {}
    lengths = {name: len(encode(model, formats.FACT.format(athlete=name)).tokens) for name, _ in people}
    for person in people:
        by_length.setdefault(lengths[person[0]], []).append(person)
    return {name: [other for other, its in by_length[lengths[name]] if its != sport] for name, sport in people}
