"""Probes must find what is planted and nothing else, and must never have seen the fact that they are asked about."""

from dataclasses import replace

import pytest
import tiny
import torch

from mechunlearn.localize import probes
from mechunlearn.localize.readings.probes import _folds
from mechunlearn.model import logits_at, recording
from mechunlearn.model.running import constant, mean_activations
from mechunlearn.probing import states_at
from mechunlearn.tasks import joined
from mechunlearn.tasks.positions import answer, everywhere, subject_last


def planted(model, prompts, point, at=subject_last):
    """Labels that a hyperplane in one point's residual stream decides."""
    states = torch.from_numpy(states_at(model, prompts, at))[point]
    direction = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0), dtype=states.dtype)
    along = (states - states.mean(0)) @ direction
    return (along > along.median()).int()


@pytest.fixture(scope="module")
def facts():
    from conftest import shared

    return tiny.prompts(shared("bridge", "llama"), n=90)


@pytest.mark.parametrize("at", [subject_last, answer])
def test_states_are_the_residual_stream_at_the_token(model, at):
    prompts = tiny.prompts(model)
    found = states_at(model, prompts, at, batch_size=4)
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)] + ["ln_final.hook_in"]
    final = []
    handle = model.ln_final.register_forward_pre_hook(lambda m, i: final.append(i[0]))
    with torch.no_grad(), recording(model, names[:3]) as values:
        logits_at(model, prompts.tokens, prompts.attention_mask)
    handle.remove()
    for row in range(len(prompts)):
        inside = prompts.subject[row] if at is subject_last else prompts.attention_mask[row]
        place = int(inside.nonzero()[-1])
        for layer, value in enumerate([*(values[name] for name in names[:3]), final[0]]):
            assert torch.allclose(torch.from_numpy(found[layer, row]).float(), value[row, place], atol=1e-5)


def test_a_planted_property_is_found_where_it_is_planted_and_random_labels_are_not(llama, facts):
    result = probes(llama, facts, planted(llama, facts, 2), seeds=2, folds=3, penalty=1.0)
    assert result.accuracy[2] > 0.8
    assert result.chance == pytest.approx(0.5, abs=0.02)
    random = torch.randint(2, (len(facts),), generator=torch.Generator().manual_seed(1))
    nothing = probes(llama, facts, random, seeds=2, folds=3)
    assert float(nothing.accuracy.max()) < 0.7


def test_no_probe_has_seen_the_fact_it_is_asked_about(llama, facts):
    """Every fact comes four times with a random label of its own: a leak would read it off the copy."""
    few = facts[:24]
    copies = joined(few, few, few, few)
    labels = torch.randint(2, (24,), generator=torch.Generator().manual_seed(0)).repeat(4)
    held_out = probes(llama, copies, labels, seeds=3, folds=4, penalty=0.1)
    leaking = probes(llama, replace(copies, names=tuple(map(str, range(96)))), labels, seeds=3, folds=4, penalty=0.1)
    assert float(leaking.accuracy[1:].min()) > 0.95, "the control: with leaks it is easy"
    assert float(held_out.accuracy.max()) < 0.75


def test_without_names_the_tokens_of_the_subject_are_the_fact(llama, facts):
    few = replace(facts[:12], names=())
    labels = torch.arange(12).remainder(2)
    twice = joined(few, few)
    with pytest.raises(ValueError, match=r"expected folds in 2..12 \(the number of facts\), got 13"):
        probes(llama, twice, labels.repeat(2), folds=13)


def test_folds_hold_whole_facts_are_alike_and_do_not_depend_on_order():
    import numpy as np

    groups = [f"fact {i % 20}" for i in range(60)]
    targets = np.array([(i % 20) % 4 for i in range(60)])
    places = _folds(targets, groups, 5, np.random.default_rng(0))
    for fold in range(5):
        inside = {group for group, place in zip(groups, places, strict=True) if place == fold}
        outside = {group for group, place in zip(groups, places, strict=True) if place != fold}
        assert inside
        assert not inside & outside
        assert sorted(np.bincount(targets[places == fold])) == [3, 3, 3, 3]
    order = np.random.default_rng(1).permutation(60)
    again = _folds(targets[order], [groups[i] for i in order], 5, np.random.default_rng(0))
    assert (places[order] == again).all()


def test_the_control_task_is_solved_where_tokens_recur_and_not_where_they_do_not(llama):
    """Random labels per last token: the embedding tells tokens apart, so that a probe which sees them again knows."""
    prompts = tiny.prompts(llama, n=60)
    rows, last = torch.arange(60), subject_last(prompts).int().argmax(1)
    recurring, unique = prompts.tokens.clone(), prompts.tokens.clone()
    recurring[rows, last] = 10 + rows % 6
    unique[rows, last] = 10 + rows
    labels = torch.arange(60).remainder(2)
    shared_tokens = probes(llama, replace(prompts, tokens=recurring), labels, seeds=4, folds=3, penalty=1.0)
    own_tokens = probes(llama, replace(prompts, tokens=unique), labels, seeds=4, folds=3, penalty=1.0)
    assert float(shared_tokens.control[:, 0].mean()) > 0.95
    assert float(own_tokens.control[:, 0].mean()) < 0.7
    assert float(own_tokens.control_fitted[0]) > 0.95, "it could memorise all of them"
    assert torch.allclose(own_tokens.selectivity, own_tokens.accuracy - own_tokens.control.mean(0))


def test_ablations_go_through_hooks(llama, facts):
    """With all that attention and MLPs write constant, all points are the embedding and a constant."""
    names = [f"blocks.{layer}.{n}" for layer in range(3) for n in ("hook_attn_out", "hook_mlp_out")]
    text = torch.randint(4, 100, (5, 9), generator=torch.Generator().manual_seed(0))
    means = mean_activations(llama, text, names)
    with recording(llama, names[:1]) as found, torch.no_grad():
        logits_at(llama, text, torch.ones_like(text, dtype=torch.bool))
    assert torch.allclose(means[names[0]], found[names[0]].mean((0, 1)), atol=1e-6)
    result = probes(llama, facts[:30], torch.arange(30).remainder(2), seeds=1, folds=3, hooks=constant(means.items()))
    free = probes(llama, facts[:30], torch.arange(30).remainder(2), seeds=1, folds=3)
    assert torch.equal(result.correct[:, 0], result.correct[:, 3])
    assert not torch.equal(free.correct[:, 0], free.correct[:, 3])


def test_a_table_a_plot_and_the_answer_as_default_label(llama, facts):
    prompts = replace(facts[:30], answers=facts.answers[:3].repeat(10, 1), candidates=None)
    result = probes(llama, prompts, seeds=2, folds=3)
    frame = result.to_frame()
    assert list(frame.columns) == ["accuracy", "low", "high", "control", "selectivity", "control_fitted", "chance"]
    assert ((frame["low"] <= frame["accuracy"]) & (frame["accuracy"] <= frame["high"])).all()
    assert sorted(result.labels) == sorted(str(int(a)) for a in facts.answers[:3, 0])
    assert result.per_seed.shape == (2, 4)
    assert len(result.plot().data) == 4


def test_bad_input_is_refused(llama, facts, unchecked):
    some = facts[:10]
    with pytest.raises(ValueError, match=r"expected labels of at least two classes, got only 7: probe facts"):
        probes(llama, some, [7] * 10)
    with pytest.raises(ValueError, match=r"expected folds in 2..10 \(the number of facts\), got 11"):
        probes(llama, some, torch.arange(10) % 2, folds=11)
    with pytest.raises(ValueError, match="expected prompts that say where their subject is"):
        probes(llama, replace(some, subject=None), torch.arange(10) % 2)
    with pytest.raises(ValueError, match="expected one label for each of 10 prompts, got 9"):
        probes(llama, some, [0, 1, 0, 1, 0, 1, 0, 1, 1])
    with pytest.raises(ValueError, match=r"expected one real token of each prompt to probe, got .* from everywhere"):
        probes(llama, some, torch.arange(10) % 2, at=everywhere)
    with pytest.raises(ValueError, match="expected at least one seed"):
        probes(llama, some, torch.arange(10) % 2, seeds=0)
