"""Facts as questions: templates filled in, with wrong answers and counterparts from other facts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from operator import index

import numpy as np

from mechunlearn.model import Model
from mechunlearn.model.tokens import encode_all
from mechunlearn.tasks.questions import (
    SUBJECT,
    Question,
    filled,
    in_random_order,
    lettered,
    letters_of,
)


@dataclass(frozen=True)
class Fact:
    """A row of the frame."""

    subject: str
    answer: str
    """The answer, without the space before it."""
    injected: str | None = None
    aliases: tuple[str, ...] = ()
    """Other right answers."""
    candidates: tuple[str, ...] | None = None
    """Possible answers, where they are the row's own."""
    columns: dict[str, str] = field(default_factory=dict, compare=False)
    """All cells of the row, for templates."""

    @property
    def own(self) -> list[str]:
        """The answer, and the one to inject."""
        return [self.answer] if self.injected is None else [self.answer, self.injected]


@dataclass(frozen=True)
class FactQuestions:
    """The questions of a task: facts in templates, with wrong answers from other facts."""

    model: Model
    facts: Sequence[Fact]
    candidates: int | str | Sequence[str] | None
    between: Mapping[str, str]
    """For each format what stands before its answers."""
    seed: int
    whole: frozenset[str] = frozenset()
    """The formats in which whole answers are scored."""
    tokens: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    """The last character of a prompt and an answer -> the answer's tokens, as far as they were asked for."""

    @cached_property
    def every(self) -> list[str]:
        """The answers of all facts."""
        return sorted({fact.answer for fact in self.facts})

    @cached_property
    def possible(self) -> list[str]:
        """All that may be answered."""
        given = (
            () if self.candidates is None or isinstance(self.candidates, int | np.integer | str) else self.candidates
        )
        others = {text for fact in self.facts for text in (*fact.own, *fact.aliases, *(fact.candidates or ()))}
        return sorted(others | {option.strip() for option in given})

    def deciding(self, templates: Mapping[str, Sequence[str]]) -> "FactQuestions":
        """The same, which score whole answers in the formats where first tokens would not do."""
        in_words = [title for title, several in templates.items() if not letters_of(several[0])]
        whole = (title for title in in_words if any(self._must_be_whole(title, one) for one in templates[title]))
        return replace(self, whole=frozenset(whole))

    def _must_be_whole(self, title: str, template: str) -> bool:
        """Whether answers have several tokens, or aliases, or begin alike, or there are no candidates."""
        if self.candidates is None or any(fact.aliases for fact in self.facts):
            return True
        text, _ = filled(template, {**self.facts[0].columns, SUBJECT: self.facts[0].subject})
        tokens = {option: self._tokens(text, self.between[title] + option) for option in self.possible}
        for fact in self.facts:
            options = [*fact.own, *(self._others(fact) if self._are_given else [])]
            if max(len(tokens[own]) for own in fact.own) > 1 or len({tokens[o][:1] for o in options}) < len(options):
                return True
        return False

    @property
    def _are_given(self) -> bool:
        return not (self.candidates is None or isinstance(self.candidates, int | np.integer))

    def question(self, template: str, fact: Fact, *, title: str) -> Question:
        """The fact in the template, answered in words, or by letter if the template has letters for options."""
        asked = self._by_letter if letters_of(template) else self._in_a_sentence
        return asked(template, fact, title)

    def _in_a_sentence(self, template: str, fact: Fact, title: str) -> Question:
        before = self.between[title]
        text, place = filled(template, {**fact.columns, SUBJECT: fact.subject})
        is_whole = title in self.whole
        options = () if self.candidates is None else self._options(text, fact, before, is_whole=is_whole)
        injected = None if fact.injected is None else before + fact.injected
        also = tuple(before + alias for alias in fact.aliases)
        answer = before + fact.answer
        return Question(fact.subject, text, answer, options, injected, place, aliases=also, is_whole=is_whole)

    def _options(self, text: str, fact: Fact, before: str, *, is_whole: bool) -> tuple[str, ...]:
        """The possible answers, the fact's own first; of drawn ones those with other first tokens before the rest."""
        count = None if self._are_given else index(self.candidates)  # type: ignore[arg-type]
        own, alike = [before + option for option in fact.own], []
        firsts = {self._tokens(text, option)[:1] for option in own}
        for option in self._others(fact):
            if count is not None and len(own) >= count:
                break
            first = self._tokens(text, before + option)[:1]
            is_last_resort = first in firsts and not (is_whole and self._are_given)
            (alike if is_last_resort else own).append(before + option)
            firsts.add(first)
            if count is not None and is_whole and len(alike) >= max(count, 32):
                break  # there are enough; the search for others might go through all
        options = [*own, *alike] if is_whole else own
        if len(options) < 2:
            raise ValueError(
                f"expected another answer than {own[0]!r} (of {fact.subject!r}) that differs in its first token, got "
                f"none: add facts with other answers, or pass candidates=[...]."
            )
        return tuple(options[:count])

    def _by_letter(self, template: str, fact: Fact, title: str) -> Question:
        letters, before = letters_of(template), self.between[title]
        options = [*fact.own, *islice(self._others(fact), len(letters))][: len(letters)]
        if len(options) < len(letters):
            raise ValueError(
                f"expected {len(letters)} different answers to choose from, got {options}: take options out of the "
                f"template {title!r}, or add facts with other answers."
            )
        shown = lettered(options, letters, seed=f"{title} {fact.subject} {self.seed}")
        fields = {letter: option for option, letter in shown.items()}
        text, place = filled(template, {**fact.columns, **fields, SUBJECT: fact.subject})
        own = [before + shown[option] for option in fact.own]
        others = [before + letter for letter in letters if before + letter not in own]
        injected = None if fact.injected is None else own[1]
        return Question(fact.subject, text, own[0], (*own, *others), injected, place)

    def _others(self, fact: Fact) -> Iterator[str]:
        """Wrong answers: in the order given, or those of all facts in random order."""
        right = {*fact.own, *fact.aliases}
        if not self._are_given:
            yield from in_random_order(self.every, without=right, seed=f"options {fact.subject} {self.seed}")
            return
        given = fact.candidates if fact.candidates is not None else [str(option).strip() for option in self.candidates]  # type: ignore[union-attr]
        if fact.candidates is None and fact.answer not in given:
            raise ValueError(f"expected the answer {fact.answer!r} among the candidates, got {given}: add it.")
        yield from (option for option in dict.fromkeys(given) if option not in right)

    def _tokens(self, text: str, answer: str) -> tuple[int, ...]:
        """The tokens of an answer after a prompt."""
        # By the prompt's last character, since no earlier one matters; all answers at once, since each may come.
        key = (text[-1:], answer)
        if key not in self.tokens:
            answers = list(
                dict.fromkeys(
                    [answer, *(space + option for space in {*self.between.values()} for option in self.possible)]
                )
            )
            begun, *whole = encode_all(self.model, [text, *(text + each for each in answers)])
            for each, encoding in zip(answers, whole, strict=True):
                self.tokens[text[-1:], each] = encoding.tokens[len(begun.tokens) :]
        return self.tokens[key]


def with_counterparts(
    model: Model,
    facts: Sequence[Fact],
    questions: Sequence[Question],
    sources: Sequence[tuple[str, Fact]],
    required: bool,
    seed: int,
) -> list[Question]:
    """The questions with a corrupted text about another subject; without any if one has none and it may lack it.

    `sources` has the template and the fact of each question.
    """
    answers: dict[str, set[str]] = {}
    for fact in facts:
        answers.setdefault(fact.subject, set()).update((fact.answer, *fact.aliases))
    subjects = sorted(answers)
    by_length: dict[int, list[str]] = {}
    for name, encoding in zip(subjects, encode_all(model, [f" {name}" for name in subjects]), strict=True):
        by_length.setdefault(len(encoding.tokens), []).append(name)
    lengths = {name: length for length, names in by_length.items() for name in names}
    wholes = encode_all(model, [question.text + question.answer for question in questions])
    waiting = {
        place: in_random_order(by_length[lengths[q.name]], without={q.name}, seed=f"corrupt {q.name} {seed}")
        for place, q in enumerate(questions)
    }
    paired = list(questions)
    while waiting:  # each round tries one more subject for every question that has none
        tried = {}
        for place, others in list(waiting.items()):
            template, fact = sources[place]
            other = next((name for name in others if fact.answer not in answers[name]), None)
            if other is None:
                del waiting[place]
            else:
                tried[place], _ = filled(template, {**fact.columns, SUBJECT: other})
        answered = [text + questions[place].answer for place, text in tried.items()]
        for (place, text), encoding in zip(tried.items(), encode_all(model, answered), strict=True):
            if len(encoding.tokens) == len(wholes[place].tokens):
                paired[place] = replace(questions[place], corrupt=text)
                del waiting[place]
    unpaired = [question.name for question in paired if question.corrupt is None]
    if unpaired and required:
        raise ValueError(
            f"expected for each fact to forget another subject of as many tokens with another answer, got none for "
            f"{unpaired[:5]}: add such rows, or pass corrupt=False (methods that patch will not run)."
        )
    return list(questions) if unpaired else paired
