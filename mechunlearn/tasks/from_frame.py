"""A researcher's own facts: one row each of a table."""

import random
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from mechunlearn.model import Model, check_model
from mechunlearn.tasks.frame_facts import Fact, check_injected, chosen, facts_of
from mechunlearn.tasks.frame_questions import Asking, corrupted
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.questions import first_tokens, format_of
from mechunlearn.tasks.sides import Sides
from mechunlearn.tasks.task import Format, Task
from mechunlearn.tasks.templates import check_template, letters_of, with_subject
from mechunlearn.tasks.text import train_and_test_text

if TYPE_CHECKING:
    from pandas import DataFrame, Series


def from_frame(
    model: Model,
    frame: "DataFrame",
    *,
    prompt: str,
    forget: "str | int | Iterable[str] | Iterable[bool] | Series",
    subject: str = "subject",
    answer: str = "answer",
    formats: Mapping[str, str] | None = None,
    injected: str | None = None,
    candidates: int | Sequence[str] = 4,
    between: str = " ",
    corrupt: bool = True,
    split_forget: bool = False,
    train: float = 0.8,
    text: Iterable[str] | Int[Tensor, "row pos"] | None = None,
    knowledge: Prompts | None = None,
    name: str = "own facts",
    seed: int = 0,
) -> Task:
    """Facts of your own, a row each, as a task: `from_frame(model, frame, prompt="{subject} lives in", forget=[...])`.

    `prompt`, the trained one, and `formats` (name -> template) end right before the answer. `{subject}` stands for the
    column `subject`, whatever its name; `{column}` for any column. A template with {A}, {B}, ... is multiple choice:
    the options are the answer, the injected one and answers of other rows, in random order, and a letter is the answer.
    `between` stands between a prompt and its answer.

    `forget`: the name of a column of booleans, a boolean for each row, a list of subjects, or the number of rows to
    forget, from the first. The other rows are retained: `train` of them to train on, the rest to test on. What is
    forgotten is tested on the very facts that are trained on, or, with `split_forget`, split likewise: for facts of a
    kind, when the claim is that all of the kind is gone.

    `injected`: a column, or one answer for all (such as "unknown"), which `task.injection` puts in place of the true
    answer. `candidates`: how many possible answers a prompt has (or all of them, the same for every prompt): the true
    one, the injected one and answers of other rows, drawn at random among those that differ in their first token; fewer
    for all prompts of a format, where a row has too few. Chance is 1 / candidates.

    `corrupt`: a corrupted prompt names another subject of as many tokens that has another answer. A fact to forget for
    which there is none is an error; retained facts have them if all of them find one. `text`: strings, or rows by
    `pack`; default: everyday sentences. `knowledge`: what else to test, such as `general_knowledge(model)`, which has
    facts of its own (capitals, authors, ...) that should not be among yours.

    Each subject is one fact. ValueError for missing columns, subjects that come twice, empty cells, a template without
    the subject, equal true and injected answers, and nothing to forget or to retain.
    """
    check_model(model)
    templates = {
        title: with_subject(template, subject)
        for title, template in {"trained prompt": prompt, **(formats or {})}.items()
    }
    for template in templates.values():
        check_template(template, [str(column) for column in frame.columns], between=between)
    if letters_of(templates["trained prompt"]):
        raise ValueError(f"expected a trained prompt without options, got {prompt!r}: put multiple choice in formats.")
    facts = facts_of(frame, subject=subject, answer=answer, injected=injected)
    gone = chosen(frame, facts, forget)
    check_injected(gone)
    kept = [fact for fact in facts if fact not in gone]
    train_forget = train if split_forget else None
    sides = Sides.of(gone, kept, train=train, train_forget=train_forget, rng=random.Random(seed))
    asking = Asking(facts, first_tokens(model), candidates, between, seed)
    trained = _trained(model, templates["trained prompt"], asking, sides, corrupt=corrupt)
    text_train, text_test = train_and_test_text(model, text, seed=seed)
    return Task(
        name=f"{name}: forget {len(gone)} of {len(facts)}",
        forget=trained.forget,
        retain=trained.retain,
        formats={
            title: format_of(
                model,
                [asking.ask(template, fact, title=title) for fact in sides.forget_test],
                [asking.ask(template, fact, title=title) for fact in sides.retain_test],
            )
            for title, template in templates.items()
        },
        text=text_train,
        text_test=text_test,
        injection=trained.injected,
        knowledge=knowledge,
        splits=sides.names(lambda fact: fact.subject),
    )


def _trained(model: Model, template: str, asking: Asking, sides: Sides[Fact], *, corrupt: bool) -> Format:
    """What an editor trains on, with corrupted counterparts."""
    forget = [asking.ask(template, fact) for fact in sides.forget_train]
    retain = [asking.ask(template, fact) for fact in sides.retain_train]
    if corrupt:
        pair = partial(corrupted, model, template, asking.facts, seed=asking.seed)
        forget, retain = pair(forget, required=True), pair(retain, required=False)
    return format_of(model, forget, retain)
