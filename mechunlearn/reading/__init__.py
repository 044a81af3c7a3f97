"""What is read off the residual stream, by localization and by evaluation alike: states at a token, linear probes."""

from mechunlearn.reading.arguments import check_batch_size, check_functions
from mechunlearn.reading.control import labels_by_token, subject_tokens
from mechunlearn.reading.logistic import guesses
from mechunlearn.reading.positions import Where, answer, answers, from_subject, subject, subject_last
from mechunlearn.reading.states import residuals_at, states_at

__all__ = [
    "Where",
    "answer",
    "answers",
    "check_batch_size",
    "check_functions",
    "from_subject",
    "guesses",
    "labels_by_token",
    "residuals_at",
    "states_at",
    "subject",
    "subject_last",
    "subject_tokens",
]
