"""Is it gone, everywhere, and what did it cost? Each test: (model, task) -> `Result`."""

from mechunlearn.evaluate.accuracy import Accuracy, accuracy, measure
from mechunlearn.evaluate.cell import Cell
from mechunlearn.evaluate.compare import Report, compare
from mechunlearn.evaluate.halves import check_apart, halves
from mechunlearn.evaluate.in_task import Test, every_format, in_format, knowledge, paper_metrics, text_loss
from mechunlearn.evaluate.result import Result

__all__ = [
    "Accuracy",
    "Cell",
    "Report",
    "Result",
    "Test",
    "accuracy",
    "check_apart",
    "compare",
    "every_format",
    "halves",
    "in_format",
    "knowledge",
    "measure",
    "paper_metrics",
    "text_loss",
]
