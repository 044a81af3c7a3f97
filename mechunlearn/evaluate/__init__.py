"""Is it gone, everywhere, and what did it cost? Each test: (model, task) -> `Result`."""

from mechunlearn.evaluate.accuracy import Accuracy, accuracy, measure
from mechunlearn.evaluate.compare import Report, compare
from mechunlearn.evaluate.in_task import Test, every_format, in_format, knowledge, paper_metrics, text_loss
from mechunlearn.evaluate.result import Result

__all__ = [
    "Accuracy",
    "Report",
    "Result",
    "Test",
    "accuracy",
    "compare",
    "every_format",
    "in_format",
    "knowledge",
    "measure",
    "paper_metrics",
    "text_loss",
]
