"""Sports Facts: which sport does an athlete play, asked in every format of the paper and more."""

import random
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mechunlearn.model import Model, check_model, device_of
from mechunlearn.model.tokens import encode
from mechunlearn.tasks import facts, formats
from mechunlearn.tasks.asked import CANDIDATES, SPORTS, Athlete, neighbourhood, sport_formats
from mechunlearn.tasks.build import build
from mechunlearn.tasks.knowledge import general_knowledge
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task
from mechunlearn.tasks.text import pack

if TYPE_CHECKING:
    from pandas import DataFrame


def sports_facts(
    model: Model,
    *,
    forget: str | int | Sequence[str] = "basketball",
    source: "str | Path | DataFrame | None" = None,
    injected: str = "golf",
    text: Iterable[str] | None = None,
    train: float = 0.8,
    seed: int = 0,
) -> Task:
    """Unlearn a sport or some athletes; keep the other athletes of football, baseball and basketball.

    `forget` is a sport, a number of athletes (the first ones of the source) or a list of names.
    `source` is a CSV path or a DataFrame with columns athlete and sport; default: the athletes of these
    sports that the shipped model knows. `injected` is the sport that `task.injection` puts in place of the
    true one. `text`: general text, default everyday sentences.

    A whole sport is split (`train` of it to edit on, the rest to evaluate on); single athletes are trained
    and evaluated on, as in the paper; what is retained is always split. The trained format is the paper's
    one-shot prompt. The others are paraphrases, capitalised answers, and multiple choice with options in
    random order: answered by letter or in words, after 0 or 1 answered examples (by letter also 2: Tiger
    Woods and one of `retain`), with and without a system prompt. Candidates are the three sports and golf, so
    chance is 1/4; who ignores golf has 1/3. A corrupted prompt names another athlete of as many tokens who
    plays another sport.

    "neighbourhood, position" and "neighbourhood, city" ask for other facts of the same athletes, which should
    be kept on *both* sides (`Format.kept`). Options are values of athletes of the same sport: who knows only
    the sport is at chance, 1/3 for positions (basketball has three) and 1/4 for cities. A source has these
    formats if it has columns position and city with a value for every tested athlete.

    Guo et al. 2025, https://arxiv.org/abs/2410.12949. ValueError if the sport or a name is not in the source.
    """
    check_model(model)
    rng = random.Random(seed)
    people = _people(source)
    chosen = _chosen(people, forget)
    _check_injected(chosen, injected)
    forget_train, forget_test = _split(chosen, train, rng) if isinstance(forget, str) else (chosen, chosen)
    kept = [person for person in people if person not in set(chosen)]
    retain_train, retain_test = _split(kept, train, rng)
    tested = (model, forget_test, retain_test)
    partners = _partners(model, people)
    trained = partial(_prompts, model, formats.FACT, partners=partners, rng=rng)
    rows = list(text) if text is not None else [facts.running_text(rng) for _ in range(400)]
    packed = pack(model, rows).to(device_of(model))
    n_test = max(1, len(packed) // 5)
    if len(packed) == n_test:
        raise ValueError("expected text for at least two rows of 64 tokens (train and test), got one: pass more text.")
    return Task(
        name=f"sports facts: forget {forget if isinstance(forget, str | int) else f'{len(chosen)} athletes'}",
        forget=trained(forget_train),
        retain=trained(retain_train),
        formats={
            **sport_formats(*tested, injected=injected, examples=retain_train, rng=rng, seed=seed),
            **neighbourhood(*tested, attributes=_attributes(source), people=people, seed=seed),
        },
        text=packed[n_test:],
        text_test=packed[:n_test],
        injection=_prompts(model, formats.FACT, forget_train, answer=injected),
        knowledge=general_knowledge(model, seed=seed),
        splits={
            "forget_train": tuple(name for name, _ in forget_train),
            "forget_test": tuple(name for name, _ in forget_test),
            "retain_train": tuple(name for name, _ in retain_train),
            "retain_test": tuple(name for name, _ in retain_test),
        },
    )


def _people(source: "str | Path | DataFrame | None") -> list[Athlete]:
    if source is None:
        return [(row["athlete"], row["sport"]) for row in facts.athletes() if row["sport"] in SPORTS]
    frame = _frame(source)
    missing = {"athlete", "sport"} - set(frame.columns)
    if missing:
        raise ValueError(f"expected columns athlete and sport, got {list(frame.columns)}: rename the columns.")
    others = sorted(set(frame["sport"]) - set(SPORTS))
    if others:
        raise ValueError(f"expected sports {SPORTS}, got also {others[:5]}: drop or rename these rows.")
    twice = frame["athlete"][frame["athlete"].duplicated()].tolist()
    if twice:
        raise ValueError(f"expected each athlete once, got {twice[:5]} several times: keep one row of each.")
    return list(zip(frame["athlete"], frame["sport"], strict=True))


def _attributes(source: "str | Path | DataFrame | None") -> dict[str, dict[str, str]]:
    """What else the source knows of its athletes: attribute -> athlete -> value."""
    rows = facts.athletes() if source is None else _frame(source).fillna("").astype(str).to_dict("records")
    return {
        attribute: {row["athlete"]: row[attribute].strip() for row in rows if row.get(attribute, "").strip()}
        for attribute in formats.ATTRIBUTES
    }


def _frame(source: "str | Path | DataFrame") -> "DataFrame":
    import pandas as pd

    return source if isinstance(source, pd.DataFrame) else pd.read_csv(source)


def _chosen(people: list[Athlete], forget: str | int | Sequence[str]) -> list[Athlete]:
    if isinstance(forget, str):
        found = [person for person in people if person[1] == forget]
        if not found:
            raise ValueError(f"expected a sport of the source ({', '.join(SPORTS)}), got {forget!r}.")
        return found
    if isinstance(forget, int):
        if not 0 < forget < len(people):
            raise ValueError(f"forget must lie in 1..{len(people) - 1} (athletes of the source), got {forget}.")
        return people[:forget]
    by_name = dict(people)
    unknown = [name for name in forget if name not in by_name]
    if unknown or not forget:
        raise ValueError(f"expected names of athletes of the source, got {unknown[:5] or 'none'}: check the spelling.")
    return [(name, by_name[name]) for name in forget]


def _split(people: list[Athlete], share: float, rng: random.Random) -> tuple[list[Athlete], list[Athlete]]:
    shuffled = rng.sample(people, len(people))
    count = round(share * len(people))
    if not 0 < count < len(people):
        raise ValueError(f"expected train to leave facts on both sides of the split, got {share} of {len(people)}.")
    return shuffled[:count], shuffled[count:]


def _prompts(
    model: Model,
    template: str,
    people: list[Athlete],
    *,
    rng: random.Random | None = None,
    partners: dict[int, list[Athlete]] | None = None,
    answer: str | None = None,
) -> Prompts:
    """The template for each athlete; with `partners`, also corrupted; with `answer`, that in place of the truth."""
    sports = [answer or sport for _, sport in people]
    corrupt = None
    if partners is not None and rng is not None:
        corrupt = [template.format(athlete=_partner(model, person, partners, rng)) for person in people]
    return build(
        model,
        [template.format(athlete=name) for name, _ in people],
        [f" {sport}" for sport in sports],
        candidates=[[f" {sport}" for sport in CANDIDATES]] * len(people),
        subjects=[name for name, _ in people],
        corrupt=corrupt,
    )


def _check_injected(people: list[Athlete], injected: str) -> None:
    if injected not in CANDIDATES:
        raise ValueError(f"expected an injected sport among {', '.join(CANDIDATES)}, got {injected!r}.")
    already = [name for name, sport in people if sport == injected]
    if already:
        raise ValueError(
            f"expected an injected sport that none of the athletes plays, got {injected!r}, which {already[0]} does."
        )


def _length(model: Model, name: str) -> int:
    return len(encode(model, formats.FACT.format(athlete=name)).tokens)


def _partners(model: Model, people: list[Athlete]) -> dict[int, list[Athlete]]:
    """Prompt length -> athletes with prompts of that length."""
    by_length: dict[int, list[Athlete]] = {}
    for person in people:
        by_length.setdefault(_length(model, person[0]), []).append(person)
    return by_length


def _partner(model: Model, person: Athlete, partners: dict[int, list[Athlete]], rng: random.Random) -> str:
    others = [name for name, sport in partners[_length(model, person[0])] if sport != person[1]]
    if not others:
        raise ValueError(
            f"expected another athlete with as many tokens as {person[0]} who plays another sport, got none: "
            f"leave {person[0]} out of the source, or add athletes."
        )
    return rng.choice(others)
