"""The facts of a table in any template."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mechunlearn.model import Model
from mechunlearn.model.tokens import encode
from mechunlearn.tasks.frame_facts import Fact
from mechunlearn.tasks.questions import FirstToken, Question, counterpart, distinct, drawn, lettered
from mechunlearn.tasks.templates import SUBJECT, filled, letters_of


@dataclass(frozen=True)
class Asking:
    """How facts are asked, and with which other answers."""

    facts: Sequence[Fact]
    first: FirstToken
    candidates: int | Sequence[str]
    between: str
    seed: int

    def ask(self, template: str, fact: Fact, *, title: str = "") -> Question:
        """The fact in the template: with its answer, or, where the template has letters for options, with a letter."""
        letters = letters_of(template)
        return self._by_letter(template, fact, letters, title) if letters else self._in_a_sentence(template, fact)

    def _in_a_sentence(self, template: str, fact: Fact) -> Question:
        text, place = filled(template, {**fact.columns, SUBJECT: fact.subject})
        given, others = _given(fact), self._others(fact)
        count = len(given) + len(others)
        if isinstance(self.candidates, int):
            count = self.candidates
        else:
            given, others = [*given, *others], []
        options = distinct(
            self.first,
            text,
            [self.between + each for each in given],
            [self.between + each for each in others],
            count=count,
            name=fact.subject,
        )
        injected = None if fact.injected is None else self.between + fact.injected
        return Question(fact.subject, text, self.between + fact.answer, options, injected, place)

    def _by_letter(self, template: str, fact: Fact, letters: Sequence[str], title: str) -> Question:
        options = [*_given(fact), *self._others(fact)][: len(letters)]
        if len(options) < len(letters):
            raise ValueError(
                f"expected {len(letters)} different answers to choose from, got {options}: take options out of the "
                f"template {title!r}, or add facts with other answers."
            )
        shown = lettered(options, letters, seed=f"{title} {fact.subject} {self.seed}")
        fields = {letter: option for option, letter in shown.items()}
        text, place = filled(template, {**fact.columns, **fields, SUBJECT: fact.subject})
        injected = None if fact.injected is None else self.between + shown[fact.injected]
        answers = tuple(self.between + letter for letter in letters)
        answer = self.between + shown[fact.answer]
        return Question(fact.subject, text, answer, _leading(answers, answer, injected), injected, place)

    def _others(self, fact: Fact) -> list[str]:
        """Answers apart from the fact's own, in the given order or in a random one."""
        if isinstance(self.candidates, int):
            answers = {other.answer for other in self.facts}
            return drawn(answers, without=_given(fact), seed=f"options {fact.subject} {self.seed}")
        given = [each.strip() for each in self.candidates]
        if fact.answer not in given:
            raise ValueError(f"expected the answer {fact.answer!r} among the candidates, got {given}: add it.")
        return [each for each in given if each not in _given(fact)]


def corrupted(
    model: Model, template: str, facts: Sequence[Fact], asked: Sequence[Question], *, required: bool, seed: int
) -> list[Question]:
    """The questions with a counterpart about another of the facts, or without any if one has none."""
    lengths = {fact.subject: len(encode(model, f" {fact.subject}").tokens) for fact in facts}
    by_subject = {fact.subject: fact for fact in facts}
    found = []
    for question in asked:
        fact = by_subject[question.name]
        same = [o for o in facts if o.answer != fact.answer and lengths[o.subject] == lengths[fact.subject]]
        texts = _about_others(template, fact, same, seed)
        found.append(replace(question, corrupt=counterpart(model, question.text, question.answer, texts)))
    alone = [question.name for question in found if question.corrupt is None]
    if alone and required:
        raise ValueError(
            f"expected for each fact to forget another subject of as many tokens with another answer, got none for "
            f"{alone[:5]}: add such rows, or pass corrupt=False (methods that patch will not run)."
        )
    return list(asked) if alone else found


def _about_others(template: str, fact: Fact, others: Sequence[Fact], seed: int) -> Iterator[str]:
    subjects = drawn([other.subject for other in others], without=(), seed=f"corrupt {fact.subject} {seed}")
    return (filled(template, {**fact.columns, SUBJECT: subject})[0] for subject in subjects)


def _given(fact: Fact) -> list[str]:
    return [fact.answer] if fact.injected is None else [fact.answer, fact.injected]


def _leading(answers: Sequence[str], answer: str, injected: str | None) -> tuple[str, ...]:
    """All of them, the right and the injected one first."""
    first = [answer] if injected is None else [answer, injected]
    return (*first, *(each for each in answers if each not in first))
