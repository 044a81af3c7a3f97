"""Is it gone, everywhere, and what did it cost? Each test: (model, task) -> `Result`."""

from mechunlearn.evaluate.accuracy import Accuracy, accuracy, measure
from mechunlearn.evaluate.audit import Audit, audit
from mechunlearn.evaluate.audit_numbers import Finding
from mechunlearn.evaluate.binary_probes import binary_probes
from mechunlearn.evaluate.budgets import full, quick
from mechunlearn.evaluate.cell import Cell
from mechunlearn.evaluate.compare import compare
from mechunlearn.evaluate.direction_ablation import direction_ablation, mean_difference, principal_difference
from mechunlearn.evaluate.extraction_strength import extraction_strength
from mechunlearn.evaluate.few_shot import few_shot
from mechunlearn.evaluate.generated import continuations, generated, says
from mechunlearn.evaluate.halves import check_apart, halves
from mechunlearn.evaluate.in_task import Test, every_format, in_format, injected, knowledge, paper_metrics, text_loss
from mechunlearn.evaluate.lens_extraction import by_both_ends, by_change, by_probability, lens_extraction
from mechunlearn.evaluate.lm_eval_tasks import harness_model, lm_eval_task
from mechunlearn.evaluate.multinomial_probe import multinomial_probe
from mechunlearn.evaluate.noised import noised
from mechunlearn.evaluate.patching_audit import patching_audit
from mechunlearn.evaluate.plan import Plan
from mechunlearn.evaluate.quantized import quantized
from mechunlearn.evaluate.recovered import Fraction, Recovery, left_fraction, recovery
from mechunlearn.evaluate.relearned import relearn
from mechunlearn.evaluate.relearned_benign import relearn_benign
from mechunlearn.evaluate.relearned_few import relearn_few
from mechunlearn.evaluate.relearned_lora import relearn_halves, relearn_lora, relearn_two_facts
from mechunlearn.evaluate.report import Report
from mechunlearn.evaluate.result import Result
from mechunlearn.evaluate.soft_prompt import soft_prompt
from mechunlearn.evaluate.text_kl import text_kl
from mechunlearn.evaluate.whole_answers import whole_answers

__all__ = [
    "Accuracy",
    "Audit",
    "Cell",
    "Finding",
    "Fraction",
    "Plan",
    "Recovery",
    "Report",
    "Result",
    "Test",
    "accuracy",
    "audit",
    "binary_probes",
    "by_both_ends",
    "by_change",
    "by_probability",
    "check_apart",
    "compare",
    "continuations",
    "direction_ablation",
    "every_format",
    "extraction_strength",
    "few_shot",
    "full",
    "generated",
    "halves",
    "harness_model",
    "in_format",
    "injected",
    "knowledge",
    "left_fraction",
    "lens_extraction",
    "lm_eval_task",
    "mean_difference",
    "measure",
    "multinomial_probe",
    "noised",
    "paper_metrics",
    "patching_audit",
    "principal_difference",
    "quantized",
    "quick",
    "recovery",
    "relearn",
    "relearn_benign",
    "relearn_few",
    "relearn_halves",
    "relearn_lora",
    "relearn_two_facts",
    "says",
    "soft_prompt",
    "text_kl",
    "text_loss",
    "whole_answers",
]
