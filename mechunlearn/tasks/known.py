"""Facts that the model knows, from the package's tables or from a file, asked in every direction."""

import csv
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechunlearn.model import Model, check_model
from mechunlearn.model.tokens import encode_all, prepending_bos
from mechunlearn.tasks.building import build, knows
from mechunlearn.tasks.frames import from_frame
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.questions import SUBJECT, Wording, counterpart, filled, in_random_order, with_subject
from mechunlearn.tasks.sports import with_random_subjects
from mechunlearn.tasks.task import Format, Task

TABLES = files("mechunlearn") / "tasks" / "tables"
TRAINED = "trained prompt"
FEWEST = 8
"""Known facts of a relation; fewer are refused."""

Row = dict[str, str]
"""A row of a table: column -> value."""


def known_facts(
    model: Model,
    *,
    relation: str = "capital",
    source: str | Path | None = None,
    forget: int | str | Sequence[str] = 16,
    part: int = 0,
    formats: Sequence[str] | None = None,
    candidates: int | None = 4,
    train: float = 0.8,
    text: Iterable[str] | Int[Tensor, "row pos"] | None = None,
    knowledge: Prompts | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Task:
    """A task of real facts that the model knows: its greedy answer to the trained prompt, one-shot, is right.

    - `relation`: "capital", "language", "continent", "currency" of a country; "city" (its country), "state" of a US
      city, "landmark" (its city), "symbol" of an element, "profession" and "birth country" of a person.
    - `source`: instead, the path of a JSON file in the schema of Hernandez et al. 2024
      (https://arxiv.org/abs/2308.09124).
    - `forget`: a number; subjects; or a value of any column, such as "Europe". They are trained on and tested.
    - `part`: which of the disjoint sets of that number, counted from 0.
    - `formats`: titles of those to ask, besides the trained prompt; None: all.
    - `candidates`, `train`, `text`, `knowledge`: as in `from_frame`. `prepend_bos`: as for `build`.

    Formats: few-shot prompts, a sentence, a list, the model's chat template (if it has one), the reverse direction and
    two hops where the relation has them, and other attributes of the subjects ("kept, ..."). Each has only the facts
    that the model knows in it; `task.known` has the counts. Answers are scored whole. The injected answer is that of
    another fact. A counterpart is about another subject of as many tokens, or random tokens.

    `task.splits` names what was left out ("not_known", "examples", "in_the_name", as Mexico City) and the facts with a
    random counterpart ("no_counterpart"). `task.strangers` are those not known, if 8 or more.

    ValueError for fewer than 8 known facts. Cost: 1F per fact, and 1F per known fact and other format.
    """
    check_model(model)
    asked = _of_package(relation) if source is None else _in_schema(source)
    with prepending_bos(model, prepend_bos):
        wordings = asked.wordings(model, formats)
        is_known = asked.says(model, wordings[TRAINED], asked.rows, batch_size)
        known = [row for row, known in zip(asked.rows, is_known, strict=True) if known]
        unknown = [row for row, known in zip(asked.rows, is_known, strict=True) if not known]
        if len(known) < FEWEST:
            raise ValueError(
                f"expected a model that knows {FEWEST} facts of {asked.name} or more, got {len(known)} of "
                f"{len(asked.rows)}: choose another relation ({', '.join(_relations())}), or a larger model."
            )
        forgotten = _chosen(asked, known, forget, index(part), seed)
        task = asked.task(
            model, known, wordings, forgotten, candidates, seed, train=train, text=text, knowledge=knowledge
        )
        formats_known, counts = asked.formats_known(model, task, wordings, known, batch_size)
        sides = [asked.paired(model, side, wordings[TRAINED], seed) for side in (task.forget, task.retain)]
        left_out = {"not_known": tuple(row[asked.subject] for row in unknown), **asked.left_out}
        left_out["no_counterpart"] = tuple(name for _, lacking in sides for name in lacking)
        return replace(
            task,
            name=f"known facts, {asked.name}: forget {len(forgotten)} of {len(known)}",
            forget=sides[0][0],
            retain=sides[1][0],
            formats=formats_known,
            strangers=asked.prompts(model, wordings[TRAINED], unknown) if len(unknown) >= FEWEST else None,
            splits={**task.splits, **{why: names for why, names in left_out.items() if names}},
            known={TRAINED: (len(known), len(asked.rows)), **counts},
        )


@dataclass(frozen=True, eq=False)
class _Relation:
    """A relation of a table: which columns it asks about, in which words."""

    name: str
    subject: str
    """The column of the subjects."""
    answer: str
    """The column of the answers."""
    rows: list[Row]
    """The facts that are asked, apart from those that prompts show as examples."""
    examples: list[Row]
    formats: Mapping[str, Mapping[str, Any]]
    """Title -> template, number of examples before it (shots), message of a chat, and the fields of a `Wording`."""
    aliases: str | None = None
    """The column of other right answers, with semicolons between them."""
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def wordings(self, model: Model, titles: Sequence[str] | None) -> dict[str, Wording]:
        """The trained prompt and the formats of these titles (None: all that the tokenizer allows)."""
        can_chat = model.tokenizer is not None and bool(model.tokenizer.chat_template)
        there = {title: how for title, how in self.formats.items() if can_chat or "message" not in how}
        unknown = sorted(set(titles or ()) - set(there))
        if isinstance(titles, str) or unknown:
            raise ValueError(
                f"expected a list of formats of {self.name} ({', '.join(there)}), got {unknown or titles!r}: choose "
                f"among them ('chat' needs a tokenizer with a chat template)."
            )
        chosen = there if titles is None else dict.fromkeys([TRAINED, *titles])
        return {title: self._wording(model, **there[title]) for title in chosen}

    def _wording(
        self, model: Model, template: str, shots: int = 0, message: str | None = None, **about: Any
    ) -> Wording:
        wording, before = Wording(template, **about), ""
        for example in self.examples[:shots]:
            gap = "\n\n" if "\n" in template else "\n"
            shown = f"{self.text(wording, example)[0]} {example[wording.answer or self.answer]}{gap}"
            before += _doubled(shown)
        if message is not None:
            turn = [{"role": "user", "content": message}]
            options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
            chat = _doubled(model.tokenizer.apply_chat_template(turn, **options))
            before = chat.replace(_doubled(message), message)
        return replace(wording, template=before + template)

    def text(self, wording: Wording, row: Row) -> tuple[str, tuple[int, int]]:
        """The row in the wording, and the characters of what it is about."""
        column = wording.subject or self.subject
        return filled(with_subject(wording.templates[0], column), {**row, SUBJECT: row[column]})

    def prompts(self, model: Model, wording: Wording, rows: Sequence[Row]) -> Prompts:
        texts, places = zip(*(self.text(wording, row) for row in rows), strict=True)
        answers = [f" {row[wording.answer or self.answer]}" for row in rows]
        return replace(build(model, texts, answers, subjects=places), names=tuple(row[self.subject] for row in rows))

    def says(self, model: Model, wording: Wording, rows: Sequence[Row], batch_size: int) -> list[bool]:
        """Whether the model's greedy answer to each row is right."""
        return knows(model, self.prompts(model, wording, rows), batch_size=batch_size).tolist()

    def right(self, row: Row) -> list[str]:
        """The answers that are right, the row's own first."""
        also = row[self.aliases].split(";") if self.aliases else []
        return [row[self.answer], *(answer for answer in also if answer)]

    def task(
        self,
        model: Model,
        known: Sequence[Row],
        wordings: Mapping[str, Wording],
        forget: Sequence[str],
        candidates: int | None,
        seed: int,
        **options: Any,
    ) -> Task:
        """A task of the known facts, each with the answer of another to inject."""
        import pandas as pd

        answers = sorted({row[self.answer] for row in known})
        orders = (
            in_random_order(answers, without=self.right(row), seed=f"injected {row[self.subject]} {seed}")
            for row in known
        )
        instead = [next(order, None) for order in orders]
        if None in instead:
            raise ValueError(f"expected {self.name} facts with several answers, got {answers}: choose others.")
        frame = pd.DataFrame(known).assign(injected=instead, aliases=[self.right(row)[1:] for row in known])
        return from_frame(
            model,
            frame,
            prompt=wordings[TRAINED].template,
            forget=forget,
            subject=self.subject,
            answer=self.answer,
            injected="injected",
            aliases="aliases" if self.aliases else None,
            formats={title: wording for title, wording in wordings.items() if title != TRAINED},
            candidates=candidates,
            corrupt=False,
            seed=seed,
            **options,
        )

    def formats_known(
        self, model: Model, task: Task, wordings: Mapping[str, Wording], known: Sequence[Row], batch_size: int
    ) -> tuple[dict[str, Format], dict[str, tuple[int, int]]]:
        """The formats with the facts that are known in each, and how many of all known facts these are."""
        formats, counts = {TRAINED: task.formats[TRAINED]}, dict[str, tuple[int, int]]()
        for title in [title for title in task.formats if title != TRAINED]:
            says = self.says(model, wordings[title], known, batch_size)
            counts[title] = (sum(says), len(known))
            names = {row[self.subject] for row, is_right in zip(known, says, strict=True) if is_right}
            format = _restricted(task.formats[title], names)
            if format is not None:
                formats[title] = format
        return formats, counts

    def paired(self, model: Model, prompts: Prompts, wording: Wording, seed: int) -> tuple[Prompts, list[str]]:
        """The prompts with counterparts about other subjects, and whose is of random tokens, since none is as long."""
        rows = {row[self.subject]: row for row in self.rows}
        encoded = encode_all(model, [f" {name}" for name in rows])
        lengths = {name: len(encoding.tokens) for name, encoding in zip(rows, encoded, strict=True)}
        others: list[str | None] = []
        for name, text in zip(prompts.names, prompts.texts, strict=True):
            drawn = in_random_order([*rows], without={name}, seed=f"corrupt {name} {seed}")
            alike = (rows[other] for other in drawn if lengths[other] == lengths[name])
            texts = (self.text(wording, row)[0] for row in alike if rows[name][self.answer] not in self.right(row))
            others.append(counterpart(model, text, f" {rows[name][self.answer]}", texts))
        lacking = [name for name, other in zip(prompts.names, others, strict=True) if other is None]
        texts = [other or text for other, text in zip(others, prompts.texts, strict=True)]
        answers = [f" {rows[name][self.answer]}" for name in prompts.names]
        corrupt = build(model, prompts.texts, answers, corrupt=texts).corrupt
        assert corrupt is not None
        if lacking:
            is_lacking = torch.tensor([other is None for other in others], device=corrupt.device)
            at_random = with_random_subjects(model, prompts, seed=seed).corrupt
            assert at_random is not None
            corrupt = torch.where(is_lacking[:, None], at_random, corrupt)
        return replace(prompts, corrupt=corrupt), lacking


def _of_package(relation: str) -> _Relation:
    if relation not in _relations():
        raise ValueError(f"expected a relation of {', '.join(_relations())}, got {relation!r}: pass one, or a source.")
    about = _relations()[relation]
    rows = _table(about["table"])
    if "country" in rows[0] and about["table"] != "countries":  # what is known of the country is so of its cities
        countries = {row["country"]: row for row in _table("countries")}
        rows = [{**countries[row["country"]], **row} for row in rows]
    return _without_examples(
        relation, about["subject"], about["answer"], rows, about["examples"], about["formats"], about.get("aliases")
    )


def _in_schema(source: str | Path) -> _Relation:
    """A relation of Hernandez et al.: samples with subject and object, and templates with and without examples."""
    content = json.loads(_ESCAPE.sub(lambda code: chr(int(code[1], 16)), Path(source).read_text(encoding="utf-8")))
    missing = [key for key in ("name", "prompt_templates", "prompt_templates_zs", "samples") if not content.get(key)]
    if missing:
        raise ValueError(f"expected a relation in the schema of Hernandez et al., got none of {missing} in {source}.")
    objects: dict[str, list[str]] = {}
    for sample in content["samples"]:
        objects.setdefault(sample["subject"].strip(), []).append(sample["object"].strip())
    rows = [
        {"subject": subject, "answer": answers[0], "also": ";".join([*dict.fromkeys(answers)][1:])}
        for subject, answers in objects.items()
    ]
    few, zero = (
        [template.strip().replace("{}", "{subject}") for template in content[key]]
        for key in ("prompt_templates", "prompt_templates_zs")
    )
    formats: dict[str, dict[str, Any]] = {
        TRAINED: {"template": few[0], "shots": 1},
        "sentence": {"template": few[0]},
        "two-shot": {"template": few[0], "shots": 2},
        "chat": {"template": few[0], "message": f"Complete this sentence: {few[0]}"},
    }
    other = next((template for template in (*few[1:], *zero) if template != few[0]), None)
    if other is not None:
        formats["reworded"] = {"template": other, "shots": 1}
    names = content.get("properties", {})
    if {"domain_name", "range_name"} <= set(names):
        there, back = names["domain_name"], names["range_name"]
        formats["list"] = {"template": f"{there.capitalize()}: {{subject}}, {back}:", "shots": 1}
        if len({row["answer"] for row in rows}) == len(rows):
            template = f"{back.capitalize()}: {{answer}}, {there}:"
            formats["reverse"] = {"template": template, "shots": 1, "subject": "answer", "answer": "subject"}
    return _without_examples(content["name"], "subject", "answer", rows, [*objects][:2], formats, "also")


_ESCAPE = re.compile(r"\\\\u([0-9a-f]{4})")
"""A letter that was escaped twice, as in "Bras\\\\u00edlia"."""


def _without_examples(
    name: str,
    subject: str,
    answer: str,
    rows: Sequence[Row],
    examples: Sequence[str],
    formats: Mapping[str, Mapping[str, Any]],
    aliases: str | None,
) -> _Relation:
    shown = [next(row for row in rows if row[subject] == example) for example in examples]
    # "Mexico City" is the capital of Mexico: the name says it to who knows nothing.
    named = [row for row in rows if row not in shown and _is_within(row[subject], row[answer])]
    asked = [row for row in rows if row not in shown and row not in named]
    left_out = {"examples": tuple(examples), "in_the_name": tuple(row[subject] for row in named)}
    return _Relation(name, subject, answer, asked, shown, formats, aliases, left_out)


def _is_within(subject: str, answer: str) -> bool:
    """Whether all words of one are words of the other."""
    one, other = (set(re.findall(r"\w+", text.lower())) for text in (subject, answer))
    return one <= other or other <= one


def _chosen(
    asked: _Relation, known: Sequence[Row], forget: int | str | Sequence[str], part: int, seed: int
) -> list[str]:
    """The subjects to forget, all of which are known."""
    there = {row[asked.subject]: row for row in known}
    if isinstance(forget, int | np.integer):
        # All facts are drawn, not only the known ones: another model's sets differ by what it does not know alone.
        every = random.Random(f"forget {seed}").sample(asked.rows, len(asked.rows))
        order = [row[asked.subject] for row in every if row[asked.subject] in there]
        most = (len(order) - 1) // max(forget, 1)
        if forget < 1 or not 0 <= part < most:
            raise ValueError(
                f"expected sets of facts to forget that leave others, got set {part} of {forget} facts where "
                f"{len(order)} are known: forget 1 to {len(order) - 1}, in parts 0 to {max(most, 1) - 1}."
            )
        return order[part * forget : (part + 1) * forget]
    if part:
        raise ValueError(f"expected a part of a number of facts, got part {part} of {forget!r}: pass forget=16.")
    names = [n for n, row in there.items() if forget in row.values()] if isinstance(forget, str) else [*forget]
    unknown = [name for name in names if name not in there]
    if unknown or not 0 < len(set(names)) < len(there):
        raise ValueError(
            f"expected some of the {len(there)} facts of {asked.name} that the model knows, got "
            f"{unknown[:5] or len(set(names))} for forget={forget!r}: pass subjects that it knows (not "
            f"task.splits['not_known']), a value of a column that some of them have, or a number."
        )
    return list(dict.fromkeys(names))


def _restricted(format: Format, names: set[str]) -> Format | None:
    """The format with the facts of these names; None if a side has none."""

    def those(prompts: Prompts) -> Prompts | None:
        rows = [row for row, name in enumerate(prompts.names) if name in names]
        return prompts[rows] if rows else None

    forget, retain = those(format.forget), those(format.retain)
    if forget is None or retain is None:
        return None
    return Format(forget, retain, None if format.injected is None else those(format.injected), format.kept)


def _doubled(text: str) -> str:
    """Braces that are text, as templates write them."""
    return text.replace("{", "{{").replace("}", "}}")


def _table(name: str) -> list[Row]:
    return list(csv.DictReader((TABLES / f"{name}.csv").read_text(encoding="utf-8").splitlines()))


def _relations() -> dict[str, Any]:
    return json.loads((TABLES / "relations.json").read_text(encoding="utf-8"))
