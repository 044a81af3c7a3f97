"""Probes of latent knowledge: they find what is there, at the layer where it is, in facts that they never saw."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.evaluate import probes
from mechunlearn.evaluate.probes import binary_probes, multinomial_probe
from mechunlearn.probing import guesses
from mechunlearn.tasks import Format, Task, joined
from mechunlearn.tasks.positions import answer

CLASSES = (10, 11, 12)
BOTH = pytest.mark.parametrize("probe", [multinomial_probe, binary_probes])


def facts(model, n, seed, *, padding="right", classes=CLASSES):
    """Random words about random subjects, whose answers are the classes in turn."""
    found = tiny.prompts(model, n=n, seed=seed, padding=padding)
    labels = torch.tensor([classes[i % len(classes)] for i in range(n)])
    return replace(found, answers=labels[:, None], candidates=None, corrupt=None)


def toy(model, *, padding="right", classes=CLASSES, forgotten=CLASSES):
    """Single facts: the forgotten ones are trained and tested on, the retained ones are split."""
    forget = facts(model, 18, 0, padding=padding, classes=forgotten)
    retain, test = (facts(model, n, seed, padding=padding, classes=classes) for n, seed in ((60, 1), (12, 2)))
    text = torch.zeros(2, 4, dtype=torch.long)
    return Task("toy", forget, retain, {"trained prompt": Format(forget, test)}, text, text)


def fabricated(told, *, point=2, points=4, width=16):
    """States that tell a class at one point alone. `told`: what is written there of each prompt."""

    def states(model, prompts, at, **options):
        rng = np.random.default_rng(len(prompts))
        found = rng.normal(size=(points, len(prompts), width))
        for row, label in enumerate(told(prompts)):
            found[point, row, int(label) % width] += 12
        return found

    return states


def true_answers(prompts):
    return prompts.answers[:, 0].tolist()


@BOTH
def test_a_class_that_one_layer_tells_is_found_there_and_nowhere_else(monkeypatch, llama, probe):
    monkeypatch.setattr(probes, "states_at", fabricated(true_answers))
    result = probe(llama, toy(llama), splits=2)
    assert result.value == 1
    assert result.curve.points == ("0", "1", "2", "3")
    assert result.curve.mean[2] == 1
    assert float(result.curve.mean[[0, 1, 3]].max()) < 0.7
    assert result.chance == result.curve.chance == pytest.approx(1 / 3)
    assert torch.equal(result.control.per_example, result.control.curve.per_prompt[:, 2])
    assert result.control.value < 0.7
    assert result.names == result.control.names


@BOTH
def test_forgotten_facts_whose_states_tell_nothing_are_not_found(monkeypatch, llama, probe):
    """The control of the test above: the retained facts, and those that a probe is fitted on, still tell."""
    task = toy(llama)
    tested = {*task.forget.names} if probe is multinomial_probe else {*mu.evaluate.halves(task)[1].names}

    def told(prompts):
        labels = prompts.answers[:, 0].tolist()
        return [0 if name in tested else label for name, label in zip(prompts.names, labels, strict=True)]

    monkeypatch.setattr(probes, "states_at", fabricated(told))
    result = probe(llama, task, splits=1)
    assert float(result.curve.mean[2]) < 0.6
    assert probe(llama, task, side="retain", splits=1).value == 1


def test_the_injected_answer_can_be_what_is_found(monkeypatch, llama):
    task = toy(llama)
    new = [CLASSES[(i + 1) % 3] for i in range(18)]
    task = replace(task, injection=replace(task.forget, answers=torch.tensor(new)[:, None]))
    injected = dict(zip(task.forget.names, new, strict=True))

    def told(prompts):
        return [injected.get(name, label) for name, label in zip(prompts.names, true_answers(prompts), strict=True)]

    monkeypatch.setattr(probes, "states_at", fabricated(told))
    assert multinomial_probe(llama, task, injected=True, splits=1).value == 1
    assert multinomial_probe(llama, task, splits=1).curve.mean[2] == 0


def test_a_fact_counts_by_the_share_of_splits_in_which_it_is_right(llama):
    """Four facts, two splits, by hand: right in both, in one each, in none."""
    task = toy(llama)
    tested, calls = task.formats["trained prompt"].retain[:4], []

    def right(features, labels, fit, penalty):
        turn = len(calls) // 8  # four points, of the labels and of the control
        calls.append(fit)
        return np.append(np.zeros(60), [[1, 1, 0, 0], [1, 0, 1, 0]][turn]).astype(bool)

    result = by_hand(llama, task.retain, tested, right, splits=2)
    assert result.per_example.tolist() == [1, 0.5, 0.5, 0]
    assert result.value == 0.5
    assert len(calls) == 16


def by_hand(model, fitted, tested, right, *, splits):
    labels = torch.cat([fitted.answers[:, 0], tested.answers[:, 0]])
    options = {"at": answer, "splits": splits, "seed": 0, "penalty": 1.0, "batch_size": 64, "remedy": "none"}
    return probes._best_layer(model, fitted, tested, labels, right, "by hand", **options)


def test_only_who_is_right_for_every_class_is_right(monkeypatch):
    """Four prompts of three classes, by hand: all right; two classes said; none said; all right."""
    said = {10: [1, 1, 0, 0], 11: [0, 1, 0, 0], 12: [0, 0, 0, 1]}
    labels, asked = np.array([10, 10, 11, 12]), iter(said.values())
    binary = sys.modules[binary_probes.__module__]
    monkeypatch.setattr(binary, "guesses", lambda *given: np.array(next(asked), dtype=bool))
    assert binary._all_right(np.zeros((4, 2)), labels, np.ones(4, dtype=bool), 1.0).tolist() == [1, 0, 0, 1]


def test_a_probe_is_fitted_on_four_of_five_facts_of_each_class_and_never_on_a_name_that_it_is_asked_about(llama):
    """Two prompts for each fact: both are fitted on, or neither."""
    task, seen = toy(llama), []
    twice, tested = joined(task.retain, task.retain), task.forget

    def right(features, labels, fit, penalty):
        seen.append(fit)
        return np.zeros(len(labels), dtype=bool)

    by_hand(llama, twice, tested, right, splits=3)
    for fit in seen:
        assert not fit[120:].any()
        assert (fit[:60] == fit[60:120]).all()
        assert [int(fit[:60][i::3].sum()) for i in range(3)] == [16, 16, 16]
    assert len({fit.tobytes() for fit in seen}) == 3


def test_binary_probes_never_see_a_name_that_they_are_asked_about(monkeypatch, llama):
    given = []

    def spy(model, fitted, tested, *arguments, **options):
        given.append((fitted.names, tested.names))
        return mu.evaluate.Result(torch.zeros(1), "not run")

    monkeypatch.setattr(sys.modules[binary_probes.__module__], "_best_layer", spy)
    task = toy(llama)
    for seed in range(3):
        binary_probes(llama, task, seed=seed)
    for fitted, tested in given:
        assert not {*fitted} & {*tested}
        assert {*fitted} | {*tested} == {*task.forget.names, *task.retain.names}
        assert 0 < len({*tested}) < 18
    assert len({tested for _, tested in given}) == 3


@BOTH
def test_a_seed_repeats_and_another_one_differs(llama, probe):
    task = toy(llama)
    one, again, other = (probe(llama, task, seed=seed, splits=1) for seed in (3, 3, 4))
    assert torch.equal(one.curve.per_prompt, again.curve.per_prompt)
    assert torch.equal(one.control.curve.per_prompt, again.control.curve.per_prompt)
    assert one.names != other.names or not torch.equal(one.curve.per_prompt, other.curve.per_prompt)


@BOTH
def test_batches_padding_and_order_of_the_facts_do_not_matter(llama, probe):
    task, left = toy(llama), toy(llama, padding="left")
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    one = probe(llama, task, splits=1)
    other = probe(llama, replace(left, retain=left.retain[order]), splits=1, batch_size=7)
    assert one.names == other.names
    assert torch.allclose(one.curve.per_prompt, other.curve.per_prompt, atol=1e-5)
    assert torch.allclose(one.control.curve.per_prompt, other.control.curve.per_prompt, atol=1e-5)


@BOTH
def test_every_architecture_is_probed_and_left_as_it_was(model, probe):
    task = toy(model)
    with left_as_it_was(model):
        result = probe(model, task, splits=1)
    assert result.curve.points == ("0", "1", "2", "3")
    assert result.curve.per_prompt.shape == (len(result.names), 4)


@BOTH
def test_a_model_is_left_as_it_was_after_a_failure(llama, probe):
    def failing(prompts):
        if len(prompts) < 7:
            raise RuntimeError("at the last batch")
        return answer(prompts)

    with left_as_it_was(llama), pytest.raises(RuntimeError, match="at the last batch"):
        probe(llama, toy(llama), at=failing, batch_size=7)


def test_bad_input_is_refused(llama, unchecked):
    task = toy(llama, classes=(10, 11))
    with pytest.raises(ValueError, match=r"that of w\d+ w\d+.* \(token 12\).* forgotten, use binary_probes"):
        multinomial_probe(llama, task)
    with pytest.raises(ValueError, match="at least two classes to fit probes on, got one"):
        multinomial_probe(llama, toy(llama, classes=(10,), forgotten=(10,)))
    with pytest.raises(ValueError, match=r"got no Task\.injection: leave injected out"):
        multinomial_probe(llama, task, injected=True)
    few = replace(toy(llama), injection=facts(llama, 3, 0))
    with pytest.raises(ValueError, match="expected an injected answer for every tested fact"):
        multinomial_probe(llama, few, injected=True)
    one = task.forget[:1]
    with pytest.raises(ValueError, match="at least two forgotten facts"):
        binary_probes(llama, replace(task, forget=one, formats={"trained prompt": Format(one, task.retain)}))
    for options, message in (
        ({"splits": 0}, "at least one split"),
        ({"penalty": 0.0}, "a positive penalty"),
        ({"at": "answer"}, "expected a function as at"),
        ({"batch_size": 0}, "batch_size of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            multinomial_probe(llama, toy(llama), **options)
    same = {"trained prompt": Format(task.forget, task.retain)}
    with pytest.raises(ValueError, match="expected an attack on other facts"):
        multinomial_probe(llama, replace(toy(llama), formats=same), side="retain")
    nobody = replace(task, forget=replace(task.forget, names=()))
    with pytest.raises(ValueError, match="expected prompts with names"):
        binary_probes(llama, nobody)


def test_guesses_are_those_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    features, labels, fit = rng.normal(size=(40, 3)), np.arange(40) % 3, np.arange(40) < 30
    scaled = (features - features[fit].mean(0)) / features[fit].std(0)
    expected = LogisticRegression(C=0.5, max_iter=1000).fit(scaled[fit], labels[fit]).predict(scaled)
    assert (guesses(features, labels, fit, 2.0) == expected).all()
    assert (guesses(features, np.full(40, 7), fit, 2.0) == 7).all()


def test_the_shipped_model_s_athletes_are_read_from_layer_7_on(shipped):
    """The model card has these probes at 1.0 from layer 7 on; the last point is the final residual stream."""
    result = multinomial_probe(shipped, mu.tasks.sports_facts(shipped, forget=16), splits=1)
    assert result.curve.points[-1] == "10"
    assert float(result.curve.mean[7:].min()) > 0.95
    assert float(result.curve.mean[0]) < 0.6
    assert result.value > result.control.value + 0.3


def test_a_forgotten_sport_needs_binary_probes_and_its_twin_does_not_have_it(shipped):
    """Of the twin, the best of eleven layers: above chance (1/3) by what is chosen on 33 facts."""
    task = mu.tasks.sports_facts(shipped, forget="basketball")
    with pytest.raises(ValueError, match="use binary_probes"):
        multinomial_probe(shipped, task)
    result = binary_probes(shipped, task, splits=1)
    assert float(result.curve.mean[7:].min()) > 0.95
    assert result.value > result.control.value + 0.3
    never = binary_probes(mu.testbed.load(without="basketball"), task, splits=1)
    assert never.value < 0.6
    assert never.names == result.names
