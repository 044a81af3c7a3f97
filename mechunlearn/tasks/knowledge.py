"""General knowledge as multiple choice: what an edit must not touch (a stand-in for MMLU)."""

import random

from mechunlearn.model.kinds import Model
from mechunlearn.tasks import facts, formats
from mechunlearn.tasks.build import build
from mechunlearn.tasks.prompts import Prompts


def general_knowledge(model: Model, *, n: int = 200, seed: int = 0) -> Prompts:
    """`n` of the package's questions (capitals, authors, elements, ...) with four lettered options in random order.

    Chance is 1/4.
    """
    rng = random.Random(f"general knowledge {seed}")
    texts, letters, subjects = [], [], []
    for fact in rng.sample(facts.general_knowledge(), n):
        options = facts.options_of(fact, rng)
        question = facts.relations()[fact["relation"]]["question"].format(subject=fact["subject"])
        texts.append(formats.multiple_choice(question, options))
        letters.append(formats.LETTERS[options.index(fact["answer"])])
        start = texts[-1].index(question) + question.index(fact["subject"])  # an option may contain the subject
        subjects.append((start, start + len(fact["subject"])))
    answers, candidates = [f" {letter}" for letter in letters], [[f" {o}" for o in formats.LETTERS]] * n
    return build(model, texts, answers, candidates=candidates, subjects=subjects)
