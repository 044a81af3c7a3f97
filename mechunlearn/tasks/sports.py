"""Sports Facts: which sport does an athlete play, asked in every format of the paper and more."""

import operator
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from numbers import Integral
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.model import Model, check_model
from mechunlearn.model.tokens import encode
from mechunlearn.tasks import facts, formats
from mechunlearn.tasks.athletes import Athlete, athletes_from, chosen, injected_sports
from mechunlearn.tasks.building import knows
from mechunlearn.tasks.facts import general_knowledge
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.questions import Question, injected_prompts, prompts_of
from mechunlearn.tasks.splits import Sides
from mechunlearn.tasks.sports_formats import Asking, neighbourhood, sport_formats, trained
from mechunlearn.tasks.task import Task
from mechunlearn.tasks.text import train_and_test_text

if TYPE_CHECKING:
    from pandas import DataFrame


Corrupt: TypeAlias = bool | Callable[..., Prompts]
"""Whether prompts get corrupted counterparts, or a function (model, prompts) -> the prompts with theirs."""


def sports_facts(
    model: Model,
    *,
    forget: str | int | Sequence[str] = "basketball",
    source: "str | Path | DataFrame | None" = None,
    sha256: str | None = None,
    forget_seed: int | None = None,
    injected: str | Sequence[str] = "golf",
    corrupt: Corrupt = True,
    threshold: float | None = 0.0,
    dashed: bool = False,
    text: Iterable[str] | Int[Tensor, "row pos"] | None = None,
    train: float = 0.8,
    train_forget: float | None = None,
    shuffle: bool = True,
    seed: int = 0,
) -> Task:
    """Unlearn a sport or some athletes; keep the other athletes of football, baseball and basketball.

    `source` is the path or address of a CSV file, or a DataFrame, with columns athlete and sport; with `sha256`, a file
    is verified, and kept if it was downloaded. Default: the athletes that the shipped model knows, for models with its
    vocabulary (the model, its twin, edits of them); for any other model the file of the paper's authors
    (`authors_athletes`). `forget` is a sport, a number of athletes (the first ones of the source, as in the paper; with
    `forget_seed`, random ones) or a list of names.

    `threshold`: keep the athletes whose sport the model knows: `None`, the sport is its first choice; a number, its
    probability is at least that; 0, all of them, as in the paper. Who is left out is in `task.splits["not_known"]`.

    A whole sport is split (`train` of it to edit on, the rest to evaluate on); single athletes are trained and
    evaluated on, as in the paper; what is retained is always split. `train_forget` splits what is forgotten by another
    share, single athletes too; with `shuffle=False` the first athletes of the source are to edit on. The ICML version
    of the paper has train_forget=0.5 for a whole sport, and no shuffling.

    `injected`: what `task.injection`, and every format, puts in place of the true sport. A sport; a column of the
    source with a sport for each athlete; or several sports, of which each athlete has a random one that is not the true
    one, such as ("football", "baseball", "basketball"), without golf, or with it.

    The trained format is the paper's one-shot prompt. The others are paraphrases, capitalised answers, and multiple
    choice with options in random order: answered by letter or in words, after 0 or 1 answered examples (by letter also
    2: Tiger Woods and one of `retain`), with and without a system prompt. Candidates are the three sports and golf, so
    chance is 1/4; who ignores golf has 1/3. With `dashed`, also spelled answers, f-o-o-t-b-a-l-l, which have no
    candidates, since their first tokens are alike: `evaluate.whole_answers` scores them, as does `every_format`. The
    shipped model cannot spell. For more examples: `evaluate.few_shot`.

    A corrupted prompt names another athlete of as many tokens who plays another sport; who has no such counterpart is
    left out, and named in `task.splits["no_counterpart"]`. `corrupt=False`: none. Or a function that gives prompts
    their counterparts: `corrupt=mu.tasks.with_random_subjects` for random tokens.

    "neighbourhood, position" and "neighbourhood, city" ask for other facts of the same athletes, which should be kept
    on *both* sides (`Format.kept`). Options are values of athletes of the same sport: who knows only the sport is at
    chance, 1/3 for positions (basketball has three) and 1/4 for cities. A source has these formats if it has columns
    position and city with a value for every tested athlete.

    Guo et al. 2025, https://arxiv.org/abs/2410.12949. Cost: 1 forward for each athlete, with a threshold. ValueError if
    the sport or a name is not in the source, or is left out.
    """
    check_model(model)
    rng = random.Random(index(seed))
    rows = athletes_from(model, source, sha256)
    people, partners, left_out = _usable(model, rows, threshold, paired=corrupt is True)
    gone = chosen(people, forget, forget_seed, left_out)
    instead = injected_sports(gone, rows, injected, seed)
    if train_forget is None and isinstance(forget, str):
        train_forget = train
    kept = [person for person in people if person not in set(gone)]
    sides = Sides.of(gone, kept, train=train, train_forget=train_forget, shuffle=shuffle, rng=rng)
    lines = [facts.running_text(rng) for _ in range(400)] if text is None else text
    text_train, text_test = train_and_test_text(model, lines)
    edited = [trained(person, instead) for person in sides.forget_train]
    asking = Asking(model, sides.forget_test, sides.retain_test, instead, sides.retain_train, seed)
    return Task(
        name=f"sports facts: forget {forget if isinstance(forget, str | Integral) else f'{len(gone)} athletes'}",
        forget=_with_counterparts(model, edited, corrupt, partners, rng),
        retain=_with_counterparts(model, [trained(each, {}) for each in sides.retain_train], corrupt, partners, rng),
        formats={
            **sport_formats(asking, rng=rng, dashed=dashed),
            **neighbourhood(asking, attributes=_attributes(rows), people=people),
        },
        text=text_train,
        text_test=text_test,
        injection=injected_prompts(model, edited),
        knowledge=general_knowledge(model, seed=seed),
        splits={**sides.names(lambda person: person[0]), **left_out},
    )


def _usable(
    model: Model, rows: Sequence[facts.Row], threshold: float | None, *, paired: bool
) -> tuple[list[Athlete], dict[str, list[str]], dict[str, tuple[str, ...]]]:
    """Athletes, the partners of each, and for each reason the names of those left out."""
    people = [(row["athlete"], row["sport"]) for row in rows]
    left_out: dict[str, tuple[str, ...]] = {}
    if threshold != 0:
        prompts = prompts_of(model, [trained(person, {}) for person in people])
        known = knows(model, prompts, threshold=threshold).tolist()
        left_out["not_known"] = tuple(name for (name, _), kept in zip(people, known, strict=True) if not kept)
        people = [person for person, kept in zip(people, known, strict=True) if kept]
    partners = partners_of(model, people) if paired else {}
    alone = tuple(name for name, others in partners.items() if not others)
    if alone:
        left_out["no_counterpart"] = alone
    return [person for person in people if person[0] not in alone], partners, left_out


def _with_counterparts(
    model: Model, questions: Sequence[Question], corrupt: Corrupt, partners: dict[str, list[str]], rng: random.Random
) -> Prompts:
    if callable(corrupt):
        return corrupt(model, prompts_of(model, questions))
    if corrupt:
        others = [formats.FACT.format(athlete=rng.choice(partners[question.name])) for question in questions]
        questions = [replace(each, corrupt=other) for each, other in zip(questions, others, strict=True)]
    return prompts_of(model, questions)


def _attributes(rows: Sequence[facts.Row]) -> dict[str, dict[str, str]]:
    """What else the source knows of its athletes: attribute -> athlete -> value."""
    return {
        attribute: {row["athlete"]: row[attribute].strip() for row in rows if row.get(attribute, "").strip()}
        for attribute in formats.ATTRIBUTES
    }


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
    generator = torch.Generator().manual_seed(operator.index(seed))
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
