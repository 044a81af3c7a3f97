"""Losses, metrics, accuracies, fractions and intervals by formulas of their own."""

import math
from functools import partial

import pytest
import torch
from independent.agreement import assert_agree
from independent.facts import FACTS, prompts_of
from independent.hooks import run
from scipy.stats import beta

import mechunlearn as mu
from mechunlearn.evaluate.fractions import avoidance_fraction

LOGITS = 2 * torch.randn(6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ORIGINAL = 3 * torch.randn(6, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGETS = torch.tensor([int(LOGITS[0].argmax()), 3, 10, int(LOGITS[3].argmax()), 4, 7])
P = LOGITS.exp() / LOGITS.exp().sum(1, keepdim=True)
P0 = ORIGINAL.exp() / ORIGINAL.exp().sum(1, keepdim=True)
AT = torch.tensor([P[i, t] for i, t in enumerate(TARGETS)])
EVERY = torch.arange(6)


def without_target(logits):
    """The softmax over all but the target."""
    p = logits.exp()
    p[EVERY, TARGETS] = 0
    return p / p.sum(1, keepdim=True)


def lowered(by):
    logits = ORIGINAL.clone()
    logits[EVERY, TARGETS] -= by
    return logits.exp() / logits.exp().sum(1, keepdim=True)


TOKENS = {
    "cross_entropy": ({}, -AT.log()),
    "log_one_minus_probability": ({"cutoff": -math.inf}, -(1 - AT).log()),
    "gradient_ascent": ({}, AT.log()),
    "weighted_gradient_ascent": ({"beta": 0.7}, AT**0.7 * AT.log()),
    "satimp": ({"saturation": 2.0, "importance": 1.5}, AT**2 * (1 - AT) ** 1.5 * AT.log()),
    "maximum_entropy": ({}, (math.log(1 / 11) - P.log()).mean(1)),
    "cross_entropy_unlearning": ({}, -(without_target(LOGITS) * P.log()).sum(1)),
    "undial": ({"beta": 2.0}, -(lowered(2.0) * P.log()).sum(1)),
    "kl_to_original": ({}, (P0 * (P0.log() - P.log())).sum(1)),
}


@pytest.mark.parametrize("name", TOKENS)
def test_losses_of_tokens(name):
    options, expected = TOKENS[name]
    loss = partial(getattr(mu.losses, name), **options)
    given = {"logits": LOGITS, "targets": TARGETS, "original_logits": ORIGINAL}
    assert_agree(loss(**{key: given[key] for key in mu.losses.needs(loss)}), expected)


@pytest.mark.parametrize(
    ("name", "weight"), [("weighted_gradient_ascent", AT**0.7), ("satimp", AT**2 * (1 - AT) ** 1.5)]
)
def test_weights_of_ascent_have_no_gradient(name, weight):
    logits = LOGITS.clone().requires_grad_()
    getattr(mu.losses, name)(logits, TARGETS, **TOKENS[name][0]).sum().backward()
    onehot = torch.nn.functional.one_hot(TARGETS, 11)
    assert_agree(logits.grad, weight[:, None] * (onehot - P))


def test_cut_off():
    expected = torch.where(AT.log() < -2, 0, -(1 - AT).log())
    assert 0 < int((expected == 0).sum()) < len(AT)
    assert_agree(mu.losses.log_one_minus_probability(LOGITS, TARGETS, cutoff=-2.0), expected)


def logistic(x):
    return 1 / (1 + torch.exp(-x))


NOW, WAS = torch.tensor([-0.2, -3.0, -9.0]).double(), torch.tensor([-0.1, -4.0, -1.0]).double()
OTHER, OTHER_WAS = torch.tensor([-2.0, -1.0, -7.0]).double(), torch.tensor([-3.0, -1.5, -4.0]).double()
LENGTH = torch.tensor([1, 3, 2])
R, R_OTHER = NOW - WAS, OTHER - OTHER_WAS
ANSWERS = {
    "npo": ({"beta": 0.4}, -(2 / 0.4) * logistic(-0.4 * R).log()),
    "simnpo": ({"beta": 1.5, "margin": 0.2}, -(2 / 1.5) * logistic(1.5 * (-NOW / LENGTH - 0.2)).log()),
    "dpo": ({"beta": 0.4}, -(2 / 0.4) * logistic(0.4 * (R_OTHER - R)).log()),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_losses_of_whole_answers(name):
    options, expected = ANSWERS[name]
    loss = partial(getattr(mu.losses, name), **options)
    given = {"log_probability": NOW, "original_log_probability": WAS, "length": LENGTH}
    given |= {"alternative_log_probability": OTHER, "original_alternative_log_probability": OTHER_WAS}
    assert_agree(loss(**{key: given[key] for key in mu.losses.needs(loss)}), expected)


def test_losses_of_the_residual_stream():
    h, h0 = LOGITS, ORIGINAL
    assert_agree(mu.losses.representation_matching(h, h0), ((h - h0) ** 2).mean(1))
    at_zero = mu.losses.rmu(torch.zeros(1, 11).double(), scale=2.0)
    assert_agree(at_zero, torch.tensor([4 / 11]))
    u = (
        torch.stack([(at_zero - mu.losses.rmu(e[None], scale=2.0) + 1 / 11)[0] for e in torch.eye(11).double()])
        * 11
        / 4
    )
    assert_agree([u.norm()], [1.0])
    assert float(u.min()) >= 0
    assert_agree(mu.losses.rmu(h, scale=2.0), ((h - 2 * u) ** 2).mean(1))


@torch.no_grad()
def test_metrics_and_accuracies(pair):
    logits = torch.stack([run(pair.raw, fact.tokens)[0, -1] for fact in pair.facts])
    answers = torch.tensor([fact.answer for fact in pair.facts])[:, None]
    among = logits.gather(1, torch.tensor([fact.candidates for fact in pair.facts]))
    p = logits.softmax(1).gather(1, answers)[:, 0]
    expected = {
        "answer_log_probability": p.log(),
        "answer_probability": p,
        "candidate_probability": among.softmax(1)[:, 0],
        "logit_difference": among[:, 0] - among[:, 1:].mean(1),
    }
    results = mu.evaluate.measure(pair.bridge, pair.prompts, [getattr(mu.metrics, name) for name in expected])
    for result, numbers in zip(results, expected.values(), strict=True):
        assert_agree(result.per_example, numbers)
    accuracy = mu.evaluate.accuracy(pair.bridge, pair.prompts)
    assert_agree(accuracy.probability.per_example, expected["candidate_probability"])
    assert accuracy.candidates.per_example.tolist() == (among.argmax(1) == 0).tolist()
    assert accuracy.probability.chance == 0.25


def test_top_of_vocabulary_and_of_candidates(pair):
    """With the model's own favourite as the answer of one prompt, and its least favourite candidate as another's."""
    with torch.no_grad():
        favourite = int(run(pair.raw, FACTS[0].tokens)[0, -1].argmax())
    tokens, candidates = torch.tensor([FACTS[0].clean] * 2), torch.tensor([[favourite, 12], [12, favourite]])
    accuracy = mu.evaluate.accuracy(pair.bridge, mu.Prompts.of(tokens, [favourite, 12], candidates=candidates))
    assert accuracy.vocabulary.per_example.tolist() == [1, 0]
    assert accuracy.candidates.per_example.tolist() == [1, 0]


TEXT = torch.randint(5, 90, (4, 12), generator=torch.Generator().manual_seed(2))


def task_with_text(text):
    prompts = prompts_of(FACTS)
    return mu.Task(name="facts", forget=prompts, retain=prompts, formats={}, text=text, text_test=text)


@torch.no_grad()
def test_text_loss(pair):
    p = run(pair.raw, TEXT)[:, :-1].softmax(-1).gather(-1, TEXT[:, 1:, None])
    result = mu.evaluate.text_loss(pair.bridge, task_with_text(TEXT))
    assert_agree([result.value], [-p.log().mean()])


@torch.no_grad()
def test_text_kl(pair):
    raw = pair.raw.copied()
    mask = mu.ComponentMask.of(["L1MLP.W_out"], mu.shape(pair.bridge))
    down = raw.at(1).down
    down.weight.data.zero_()
    before, after = (run(model, TEXT)[:, :-1].log_softmax(-1) for model in (pair.raw, raw))
    kl = (before.exp() * (before - after)).sum(-1).mean(1)
    original = partial(mu.weights.taken_back, pair.bridge, mu.fingerprint(pair.bridge))
    with mu.edit.zeroed(pair.bridge, mask).applied(pair.bridge):
        result = mu.evaluate.text_kl(pair.bridge, task_with_text(TEXT), original=original)
    assert_agree(result.per_example, kl)


def shares(*values):
    return mu.evaluate.Result(torch.tensor(values), "share", chance=0.25, unit="share")


def test_fractions():
    original, found = shares(1.0, 0.9, 0.95, 1.0), shares(0.5, 0.7, 0.4, 0.6)
    twin, low = shares(0.5, 0.3, 0.4, 0.2), shares(0.1, 0.0, 0.2, 0.1)
    left = (0.55 - 0.25) / (0.9625 - 0.25)
    assert mu.evaluate.left_fraction(found, original).value == pytest.approx(left)
    left = (0.55 - 0.35) / (0.9625 - 0.35)
    assert mu.evaluate.left_fraction(found, original, never_knew=twin).value == pytest.approx(left)
    avoided = (0.25 - 0.1) / (0.9625 - 0.25)
    assert avoidance_fraction(low, original).value == pytest.approx(avoided)
    assert avoidance_fraction(low, original, never_knew=twin).value == pytest.approx(avoided)
    lower = shares(0.2, 0.2, 0.2, 0.2)
    avoided = (0.2 - 0.1) / (0.9625 - 0.2)
    assert avoidance_fraction(low, original, never_knew=lower).value == pytest.approx(avoided)


def test_recovery():
    original, unlearned, attacked = shares(1.0, 0.9), shares(0.3, 0.4), shares(0.7, 0.8)
    twin, taught = shares(0.25, 0.35), shares(0.35, 0.45)
    found = mu.evaluate.recovery(attacked, unlearned, original, never_knew=twin, attacked_never_knew=taught)
    span = 0.95 - 0.3
    assert [found.recovered.value, found.taught.value, found.net.value] == pytest.approx(
        [0.4 / span, 0.1 / span, 0.3 / span]
    )


@pytest.mark.parametrize(("right", "n"), [(33, 33), (0, 12), (3, 10), (19, 40)])
def test_intervals_of_shares_are_those_of_clopper_and_pearson(right, n):
    values = torch.tensor([1.0] * right + [0.0] * (n - right))
    low, high = mu.intervals.bounded(values, draws=20_000)
    assert float(low) == pytest.approx(beta.ppf(0.025, right, n - right + 1) if right else 0, abs=0.01)
    assert float(high) == pytest.approx(beta.ppf(0.975, right + 1, n - right) if right < n else 1, abs=0.01)
