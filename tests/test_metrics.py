import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mechunlearn import metrics
from mechunlearn.identity import name_of
from mechunlearn.tasks.prompts import IGNORED, Prompts

ALL = (
    metrics.answer_log_probability,
    metrics.answer_probability,
    metrics.is_top_of_vocabulary,
    metrics.is_top_of_candidates,
    metrics.candidate_probability,
)
LOG = math.log


def prompts(answers: list[list[int]], candidates: list[list[int]] | None = None) -> Prompts:
    rows, longest = len(answers), len(answers[0])
    tokens = torch.arange(rows * (longest + 2)).view(rows, -1)
    positions = torch.arange(1, 1 + longest).expand(rows, -1)
    right = None if candidates is None else torch.tensor(candidates)
    return Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool), positions, torch.tensor(answers), right)


# Row 0: probabilities 1/8 2/8 4/8 1/8. Row 1: 1/10 2/10 3/10 4/10. Both answers are token 2.
ONE = torch.tensor([[[1.0, 2.0, 4.0, 1.0]], [[1.0, 2.0, 3.0, 4.0]]]).log()
ONE_TOKEN = prompts([[2], [2]], [[2, 0, 1], [2, 1, 3]])

# Answers (1, 3) with probabilities 1/2 and 1/5, and (0) with 3/4.
TWO = torch.tensor([[[2.0, 4.0, 1.0, 1.0], [1.0, 1.0, 2.0, 1.0]], [[6.0, 1.0, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]]]).log()
TWO_TOKENS = prompts([[1, 3], [0, IGNORED]], [[1, 0], [0, 2]])


def test_logit_difference_is_the_answer_minus_the_mean_of_the_others() -> None:
    # log 4 - (log 1 + log 2) / 2 = 1.0397;  log 3 - (log 2 + log 4) / 2 = 0.0589
    expected = [LOG(4) - LOG(2) / 2, LOG(3) - LOG(8) / 2]
    assert metrics.logit_difference(ONE, ONE_TOKEN).tolist() == pytest.approx(expected, rel=1e-5)


def test_logit_difference_ignores_a_shift_of_all_logits() -> None:
    shifted = metrics.logit_difference(ONE + 5, ONE_TOKEN)
    assert shifted.tolist() == pytest.approx(metrics.logit_difference(ONE, ONE_TOKEN).tolist(), rel=1e-4)


def test_answer_probability_of_one_token() -> None:
    assert metrics.answer_probability(ONE, ONE_TOKEN).tolist() == pytest.approx([1 / 2, 3 / 10])
    assert metrics.answer_log_probability(ONE, ONE_TOKEN).tolist() == pytest.approx([LOG(1 / 2), LOG(3 / 10)])


def test_answer_probability_of_several_tokens_is_the_product() -> None:
    assert metrics.answer_probability(TWO, TWO_TOKENS).tolist() == pytest.approx([1 / 10, 3 / 4])
    assert metrics.answer_log_probability(TWO, TWO_TOKENS).tolist() == pytest.approx([LOG(1 / 10), LOG(3 / 4)])


def test_candidate_probability_is_a_softmax_over_the_candidates() -> None:
    # 4 / (4 + 1 + 2) and 3 / (3 + 2 + 4)
    assert metrics.candidate_probability(ONE, ONE_TOKEN).tolist() == pytest.approx([4 / 7, 3 / 9])
    assert metrics.candidate_probability(torch.zeros_like(ONE), ONE_TOKEN).tolist() == pytest.approx([1 / 3, 1 / 3])


def test_candidate_probability_of_several_tokens_compares_first_tokens() -> None:
    assert metrics.candidate_probability(TWO, TWO_TOKENS).tolist() == pytest.approx([4 / 6, 6 / 6.5])


def test_top_of_vocabulary_needs_every_answer_token() -> None:
    assert metrics.is_top_of_vocabulary(ONE, ONE_TOKEN).tolist() == [True, False]
    # 1 is the argmax of row 0's first place, 3 is not that of its second; row 1 has one answer token.
    assert metrics.is_top_of_vocabulary(TWO, TWO_TOKENS).tolist() == [False, True]


def test_top_of_candidates_looks_at_the_candidates_alone() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0, 9.0]], [[0.0, 3.0, 2.0, 1.0]]])
    assert metrics.is_top_of_candidates(logits, prompts([[2], [2]], [[2, 0, 1], [2, 1, 0]])).tolist() == [True, False]


def test_a_tie_among_candidates_is_wrong() -> None:
    assert not metrics.is_top_of_candidates(torch.zeros(2, 1, 4), ONE_TOKEN).any()


@pytest.mark.parametrize("metric", ALL, ids=name_of)
@pytest.mark.parametrize("garbage", [1e4, -1e4, float("nan"), float("inf")])
def test_logits_at_filled_places_never_matter(metric: metrics.Metric, garbage: float) -> None:
    spoiled = TWO.clone()
    spoiled[1, 1, :2] = garbage
    assert torch.equal(metric(spoiled, TWO_TOKENS), metric(TWO, TWO_TOKENS))


@pytest.mark.parametrize("metric", ALL, ids=name_of)
def test_more_filling_changes_nothing(metric: metrics.Metric) -> None:
    wider = prompts([[1, 3, IGNORED], [0, IGNORED, IGNORED]], [[1, 0], [0, 2]])
    logits = torch.cat([TWO, torch.full((2, 1, 4), 7.0)], 1)
    assert torch.equal(metric(logits, wider), metric(TWO, TWO_TOKENS))


@pytest.mark.parametrize("metric", ALL, ids=name_of)
def test_real_answer_tokens_do_matter(metric: metrics.Metric) -> None:
    spoiled = TWO.clone()
    spoiled[1, 0] = torch.tensor([-9.0, 0.0, 2.0, 4.0])
    assert metric(spoiled, TWO_TOKENS)[1] != metric(TWO, TWO_TOKENS)[1]


@pytest.mark.parametrize("metric", [*ALL, metrics.logit_difference], ids=name_of)
def test_each_row_is_scored_by_itself(metric: metrics.Metric) -> None:
    both = metric(ONE, ONE_TOKEN)
    assert [metric(ONE[i : i + 1], ONE_TOKEN[[i]])[0] for i in range(2)] == list(both)


def test_log_probability_stays_finite_when_the_probability_is_nothing() -> None:
    logits = torch.tensor([[[0.0, 0.0, -500.0, 0.0]], [[0.0, 0.0, 500.0, 0.0]]])
    assert metrics.answer_log_probability(logits, ONE_TOKEN).tolist() == pytest.approx([-500 - LOG(3), 0.0])


@pytest.mark.parametrize("name", ["logit_difference", "is_top_of_candidates", "candidate_probability"])
def test_candidates_are_asked_for(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"candidate answers for {name}, got none: pass candidates=.* or use answer_log"
    ):
        getattr(metrics, name)(ONE, prompts([[2], [2]]))


def test_logit_difference_refuses_answers_of_several_tokens() -> None:
    with pytest.raises(ValueError, match="one token for logit_difference, got answers of up to 2: use answer_log_prob"):
        metrics.logit_difference(TWO, TWO_TOKENS)


def test_logit_difference_accepts_filling() -> None:
    filled = prompts([[2, IGNORED], [2, IGNORED]], [[2, 0, 1], [2, 1, 3]])
    logits = torch.cat([ONE, torch.full_like(ONE, 3.0)], 1)
    assert torch.equal(metrics.logit_difference(logits, filled), metrics.logit_difference(ONE, ONE_TOKEN))


def with_value(value: float) -> metrics.Metric:
    def mine(logits: Tensor, prompts: Prompts) -> Tensor:
        return torch.tensor([1.0, value])

    return mine


def test_a_metric_of_ones_own_is_checked_and_handed_on() -> None:
    assert metrics.checked(with_value(2.0), ONE, ONE_TOKEN).tolist() == [1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(
        ValueError, match=r"finite values of mine, got NaN or infinity for prompts \[1\]: check the metric"
    ):
        metrics.checked(with_value(value), ONE, ONE_TOKEN)


@pytest.mark.parametrize(("wrong", "got"), [(torch.tensor(1.0), r"\(\)"), (torch.ones(3), r"\(3,\)"), (1.0, "float")])
def test_a_metric_that_averages_is_refused(wrong: Any, got: str) -> None:
    def averaged(logits: Tensor, prompts: Prompts) -> Any:
        return wrong

    with pytest.raises(
        ValueError, match=rf"expected averaged to give one value per prompt, shape \(2,\), got {got}: do not"
    ):
        metrics.checked(averaged, ONE, ONE_TOKEN)
