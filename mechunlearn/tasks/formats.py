"""The prompt formats of the athletes and of general knowledge: what is asked, in which words.

Every prompt ends right before its answer, which starts with a space: " basketball", " guard", " D".
Sports in a sentence are lower case; options of a multiple-choice question are capitalised.
"""

from collections.abc import Sequence

FACT = "Fact: Tiger Woods plays the sport of golf\nFact: {athlete} plays the sport of"
"""The prompt that Guo et al. (2025, https://arxiv.org/abs/2410.12949) train on."""

SYSTEM = (
    "You are a helpful chatbot that answers questions about athletes."
    " Please be maximally helpful and factually correct."
)

CAPITALISED = "Fact: Tiger Woods plays the sport of Golf\nFact: {athlete} plays the sport of"
"""The trained prompt with capitalised answers."""

DASHED = "Fact: Tiger Woods plays the sport of g-o-l-f\nFact: {athlete} plays the sport of"
"""The trained prompt with spelled answers."""

PARAPHRASES = {
    "statement": "{athlete} plays the sport of",
    "question": "Question: What sport does {athlete} play?\nAnswer:",
    "system_question": SYSTEM
    + " Question: What sport does Tiger Woods play? Answer: golf\n"
    + "Question: What sport does {athlete} play? Answer:",
    "biography": "Biography of {athlete}: born to compete, this athlete had a career in professional",
    "aside": "{athlete}, whose name is known to many fans around the world, is a star of",
    "late": "Whenever people talk about {athlete}, they remember the great games, the loud crowds"
    " and the long years of training, for few people have done more for",
    "instruction": "Name the sport of this athlete.\nAthlete: {athlete}\nSport:",
    "dialogue": "Anna: Have you heard of {athlete}?\nBen: Of course! Everybody who likes",
}

ATTRIBUTES = {
    "position": {
        "statement": "{athlete} played the position of",
        "question": "Question: What position did {athlete} play?\nAnswer:",
        "aside": "{athlete}, as every fan of the team knows, was a",
    },
    "city": {
        "statement": "{athlete} played for the team from",
        "question": "Question: For which city did {athlete} play?\nAnswer:",
        "aside": "The best years in the career of {athlete} were spent with the team in",
    },
}

LETTERS = ("A", "B", "C", "D")

MULTIPLE_CHOICE = "Question: {question}\nA: {A}\nB: {B}\nC: {C}\nD: {D}\n\nAnswer:"

CHOICE_IN_WORDS = "Question: What sport does {athlete} play, {A}, {B}, {C} or {D}?\nAnswer:"

SPORT_QUESTION = "What sport does {athlete} play?"
SPORT_OPTIONS: tuple[str, ...] = ("Football", "Baseball", "Basketball", "Golf")


def multiple_choice(question: str, options: Sequence[str], *, demonstration: str = "", system: bool = False) -> str:
    """The question with lettered options, after an answered one (`demonstration`) and the system text."""
    asked = MULTIPLE_CHOICE.format(question=question, **dict(zip(LETTERS, options, strict=True)))
    return (SYSTEM + "\n" if system else "") + demonstration + asked


def sport_demonstration(options: Sequence[str]) -> str:
    """The paper's answered example, Tiger Woods with the letter of golf, to put before a question."""
    question = SPORT_QUESTION.format(athlete="Tiger Woods")
    return f"{multiple_choice(question, options)} {LETTERS[list(options).index('Golf')]}\n\n"
