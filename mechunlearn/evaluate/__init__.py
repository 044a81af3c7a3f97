"""Is it gone, everywhere, and what did it cost? Each test: (model, task) -> `Result`."""

from mechunlearn.evaluate.asking import (
    Test,
    every_format,
    in_format,
    injected,
    knowledge,
    paper_metrics,
    text_kl,
    text_loss,
)
from mechunlearn.evaluate.attacks.directions import direction_ablation, mean_difference, principal_difference
from mechunlearn.evaluate.attacks.exam import halves
from mechunlearn.evaluate.attacks.few_shot import few_shot
from mechunlearn.evaluate.attacks.relearning import Question, relearn, relearn_and_ask, relearn_benign, relearn_few
from mechunlearn.evaluate.attacks.relearning_lora import relearn_halves, relearn_lora, relearn_two_facts
from mechunlearn.evaluate.attacks.soft_prompt import soft_prompt
from mechunlearn.evaluate.attacks.weights import noised, quantized
from mechunlearn.evaluate.fractions import Fraction, Recovery, left_fraction, recovery
from mechunlearn.evaluate.generation import continuations, extraction_strength, generated, says
from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.grid.comparing import compare
from mechunlearn.evaluate.harness import harness_model, lm_eval_task
from mechunlearn.evaluate.lens import by_both_ends, by_change, by_probability, lens_extraction
from mechunlearn.evaluate.patching import patching_audit
from mechunlearn.evaluate.probes import binary_probes, multinomial_probe
from mechunlearn.evaluate.report.report import Report
from mechunlearn.evaluate.results import Result
from mechunlearn.evaluate.scoring import Accuracy, accuracy, measure, whole_answers

__all__ = [
    "Accuracy", "Cell", "Fraction", "Question", "Recovery", "Report", "Result", "Test", "accuracy", "binary_probes",
    "by_both_ends", "by_change", "by_probability", "compare", "continuations", "direction_ablation", "every_format",
    "extraction_strength", "few_shot", "generated", "halves", "harness_model", "in_format", "injected", "knowledge",
    "left_fraction", "lens_extraction", "lm_eval_task", "mean_difference", "measure", "multinomial_probe", "noised",
    "paper_metrics", "patching_audit", "principal_difference", "quantized", "recovery", "relearn",
    "relearn_and_ask", "relearn_benign", "relearn_few", "relearn_halves", "relearn_lora", "relearn_two_facts",
    "says", "soft_prompt", "text_kl", "text_loss", "whole_answers",
]  # fmt: skip
