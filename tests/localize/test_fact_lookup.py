"""The evidence must be what the methods give, and the mask what the thresholds make of it."""

import pickle
from dataclasses import replace

import pytest
import tiny
import torch
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import Component, heads, mlps
from mechunlearn.localize import (
    FactLookup,
    ProbeResult,
    all_inputs,
    fact_lookup_by_paths,
    fact_lookup_by_probes,
    paper_fact_lookup,
    path_patching,
    probes,
)
from mechunlearn.localize.readings.fact_lookup import PAPER_LAYERS, PAPER_SHAPES, layers_by_thresholds
from mechunlearn.metrics import logit_difference
from mechunlearn.model.running import constant, mean_activations
from mechunlearn.tasks.positions import subject_last

SMALL = {"seeds": 1, "folds": 3}


def labelled(model, n=30):
    prompts = tiny.prompts(model, n=n)
    return prompts, torch.arange(n).remainder(3)


def text():
    return torch.randint(4, 100, (5, 9), generator=torch.Generator().manual_seed(0))


def known(model, n=6):
    """Prompts whose clean side the model answers better than the corrupt one."""
    prompts = tiny.prompts(model, n=4 * n)
    with torch.no_grad():
        sides = [logit_difference(p.logits(model), p) for p in (prompts, prompts.corrupted())]
    return prompts[(sides[0] - sides[1]).argsort(descending=True)[:n].tolist()]


def probed(accuracy, control=None, chance=0.37):
    """A result of probes with these accuracies."""
    values = torch.tensor([accuracy], dtype=torch.float64)
    other = torch.full_like(values, chance) if control is None else torch.tensor([control], dtype=torch.float64)
    points = tuple(map(str, range(len(accuracy))))
    return ProbeResult(points, values, other, other[0], values, chance, ("a", "b"))


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        ([0.4, 0.44, 0.48, 0.63, 0.85, 0.97, 0.97, 1.0], [2, 3, 4, 5, 6]),
        ([0.4, 0.5, 0.8, 0.8, 0.8], [1]),
        ([0.4, 0.41, 0.42, 0.40, 0.43], []),
        ([0.9, 0.91, 0.92, 0.9, 0.9], [0]),
    ],
)
def test_layers_run_from_the_rise_to_the_saturation(accuracy, expected):
    assert layers_by_thresholds(probed(accuracy), 0.2, 0.2, 0.98)[0]["layers"] == expected


def test_a_rise_that_the_control_task_shares_does_not_begin_a_lookup():
    accuracy, control = [0.4, 0.8, 0.9, 0.95, 0.95], [0.4, 0.75, 0.75, 0.5, 0.4]
    read, _ = layers_by_thresholds(probed(accuracy, control), 0.2, 0.2, 0.95)
    assert read == {"layers": [2], "first_layer_above_chance": 0, "first_layer_above_control": 2}
    assert layers_by_thresholds(probed(accuracy, control), 0.2, 0.0, 0.9)[0]["layers"] == [0, 1]
    assert layers_by_thresholds(probed(accuracy, control), 0.2, 0.9, 0.9)[0]["layers"] == []


def test_layers_near_a_threshold_are_borderline():
    accuracy = [0.37, 0.37 + 0.17, 0.37 + 0.23, 0.37 + 0.5, 0.37 + 0.565, 0.37 + 0.575, 0.37 + 0.6]
    control = [0.37, 0.37, 0.37, 0.37 + 0.3, 0.37, 0.37, 0.37]
    _, near = layers_by_thresholds(probed(accuracy, control), 0.2, 0.25, 0.95)
    assert near["rise"] == {"L0MLP": pytest.approx(0.17), "L1MLP": pytest.approx(0.23)}
    assert near["selectivity"] == {"L1MLP": pytest.approx(0.23), "L2MLP": pytest.approx(0.2)}
    assert near["saturation"] == {"L3MLP": pytest.approx(0.565 / 0.6), "L4MLP": pytest.approx(0.575 / 0.6)}
    _, near = layers_by_thresholds(probed([0.37, 0.4, 0.9, 1.0]), 0.2, 0.2, 0.95)
    assert near == {"rise": {}, "selectivity": {}, "saturation": {}}
    assert layers_by_thresholds(probed([0.37, 0.4, 0.9, 1.0]), 0.2, 0.2, 1.0)[1]["saturation"] == {}


def test_labels_that_are_last_tokens_are_no_lookup(llama):
    """Probes read the token itself: far above chance in the first layer, and no better than the control task."""
    prompts, labels = labelled(llama, n=36)
    tokens = prompts.tokens.clone()
    tokens[subject_last(prompts)] = 50 + labels
    given = replace(prompts, tokens=tokens)
    found = fact_lookup_by_probes(llama, given, labels, text=text(), seeds=3, folds=3)
    assert found.findings["first_layer_above_chance"] == 0
    assert found.findings["first_layer_above_control"] is None
    assert len(found.mask) == 0
    chosen = fact_lookup_by_probes(llama, given, labels, text=text(), seeds=3, folds=3, layers=[0])
    assert chosen.findings["layers"] == [0]


def test_probes_give_the_mask_and_its_evidence(model):
    prompts, labels = labelled(model, n=18)
    with left_as_it_was(model):
        found = fact_lookup_by_probes(model, prompts, labels, text=text(), layers=[0], **SMALL)
    alone = probes(model, prompts, labels, **SMALL)
    assert torch.equal(found.curves["accuracy"].per_prompt, alone.correct)
    assert torch.equal(found.curves["selectivity"].per_prompt, alone.correct - alone.control)
    assert [str(component) for component in found.mask] == ["L0MLP"]
    assert found.findings["attention_ablated_in_layers"] == [1, 2]
    ablated = found.curves["later attention ablated"]
    assert torch.equal(ablated.per_prompt[:, :2], alone.correct[:, :2]), "below the ablation nothing changes"


def test_without_later_attention_the_final_representation_needs_the_earlier_one_only(llama):
    """Ablating attention of all later layers equals running them by hand with the mean in its place."""
    prompts, labels = labelled(llama)
    found = fact_lookup_by_probes(llama, prompts, labels, text=text(), layers=[1], **SMALL)
    hooks = constant(mean_activations(llama, text(), ["blocks.2.hook_attn_out"]).items())
    expected = probes(llama, prompts, labels, hooks=hooks, **SMALL)
    assert torch.equal(found.curves["later attention ablated"].per_prompt, expected.correct)
    fall = float((probes(llama, prompts, labels, **SMALL).accuracy - expected.accuracy)[3])
    assert found.findings["largest_fall_without_later_attention"] == pytest.approx(max(0.0, fall))


def test_nothing_readable_gives_an_empty_mask_with_the_evidence(llama):
    prompts, labels = labelled(llama)
    found = fact_lookup_by_probes(llama, prompts, labels, text=text(), rise=0.66, **SMALL)
    assert len(found.mask) == 0
    assert "accuracy" in found.curves
    assert "layers: []" in repr(found)


def test_paths_give_extraction_heads_and_the_mlps_below_them(model):
    prompts = known(model)
    with left_as_it_was(model):
        found = fact_lookup_by_paths(model, prompts, n_heads=1, extraction_heads=["L2H1", "L2H3"])
        free = fact_lookup_by_paths(model, prompts, n_heads=6, receivers=all_inputs, threshold=0.0)
    with torch.no_grad():
        ends = [logit_difference(p.logits(model), p).mean() for p in (prompts, prompts.corrupted())]
    gap = float(ends[0] - ends[1])
    assert found.findings["clean_minus_corrupt"] == pytest.approx(gap, rel=1e-4)
    expected = path_patching(model, prompts, senders=mlps, receivers=2, direction="denoising")
    assert torch.allclose(found.scores["mlps"].tensor, expected.tensor / gap, rtol=1e-3, atol=1e-6)
    assert {c.layer for c in found.mask} == {c.layer for c in expected if abs(expected[c] / gap) > 0.02} <= {0, 1}
    every = path_patching(model, prompts, senders=heads, receivers="logits", through_mlps=True, direction="denoising")
    assert free.findings["extraction_heads"] == sorted(map(str, every.top(k=6)))


def test_effects_near_the_threshold_and_heads_near_the_cut_are_borderline(llama):
    prompts = known(llama)
    options = {"n_heads": 6, "receivers": all_inputs}
    effects = fact_lookup_by_paths(llama, prompts, **options).scores["mlps"]
    largest = float(effects.tensor.abs().max())
    for threshold, expected in ((largest / 1.15, True), (largest / 0.85, True), (largest / 1.3, False)):
        found = fact_lookup_by_paths(llama, prompts, threshold=threshold, **options)
        near = {str(c): abs(e) for c, e in effects.items() if 0.8 * threshold <= abs(e) <= 1.2 * threshold}
        assert found.findings["borderline"]["threshold"] == near
        assert (largest in near.values()) == expected
        heads_ = sorted(((abs(e), str(c)) for c, e in found.scores["heads"].items()), reverse=True)
        cut = (heads_[5][0] + heads_[6][0]) / 2
        inside = {label: size for size, label in heads_ if 0.8 * cut <= size <= 1.2 * cut}
        assert found.findings["borderline"]["n_heads"] == inside
        for label in [*near, *inside]:
            assert f"{label} (" in next(line for line in repr(found).splitlines() if "borderline" in line)
    by_hand = fact_lookup_by_paths(llama, prompts, extraction_heads=["L2H1"], layers=[0])
    assert by_hand.findings["borderline"] == {}
    assert "borderline: none" in repr(by_hand)


def test_without_a_cut_no_head_is_borderline(llama):
    found = fact_lookup_by_paths(llama, known(llama), n_heads=12, receivers=all_inputs)
    assert found.findings["borderline"]["n_heads"] == {}


def test_a_fall_near_its_tolerance_is_borderline(llama):
    prompts, labels = labelled(llama)
    given = {"text": text(), "layers": [0], **SMALL}
    fall = fact_lookup_by_probes(llama, prompts, labels, **given).findings["largest_fall_without_later_attention"]
    assert fall > 0
    for factor, expected in ((1.1, {"largest fall": fall}), (0.9, {"largest fall": fall}), (1.5, {})):
        found = fact_lookup_by_probes(llama, prompts, labels, tolerance=factor * fall, **given)
        assert found.findings["borderline"] == {"tolerance": pytest.approx(expected)}


def test_steps_can_be_overruled_by_hand(llama):
    prompts = known(llama)
    found = fact_lookup_by_paths(llama, prompts, extraction_heads=["L2H1"], layers=[0], threshold=9.0)
    assert list(found.mask) == [Component.parse("L0MLP")]
    assert "heads" not in found.scores
    assert found.findings["overruled"] == ["extraction_heads", "layers"]
    nothing = fact_lookup_by_paths(llama, prompts, extraction_heads=["L2H1"], threshold=9.0)
    assert len(nothing.mask) == 0
    assert len(nothing.scores["mlps"]) == 3


def test_evidence_prints_plots_and_survives_saving(llama, tmp_path):
    prompts, labels = labelled(llama)
    by_probes = fact_lookup_by_probes(llama, prompts, labels, text=text(), layers=[0, 1], **SMALL)
    by_paths = fact_lookup_by_paths(llama, known(llama), n_heads=6, receivers=all_inputs)
    for found in (by_probes, by_paths):
        assert len(found.plot().data) >= 2
        assert "threshold" in repr(found) or "saturation" in repr(found)
        found.save(tmp_path / "lookup")
        assert repr(FactLookup.load(tmp_path / "lookup")) == repr(found)


def test_lookup_does_not_depend_on_batches_or_order(llama):
    prompts = known(llama)
    whole = fact_lookup_by_paths(llama, prompts, n_heads=6, receivers=all_inputs)
    other = fact_lookup_by_paths(llama, prompts[[3, 1, 5, 0, 2, 4]], n_heads=6, receivers=all_inputs, batch_size=4)
    assert whole.mask == other.mask
    for name, scores in whole.scores.items():
        assert torch.allclose(scores.tensor, other.scores[name].tensor, atol=1e-5)


def test_bad_input_is_refused(llama, unchecked):
    prompts, labels = labelled(llama)
    with pytest.raises(ValueError, match=r"rise must lie in \[0, 1\], got 2"):
        fact_lookup_by_probes(llama, prompts, labels, text=text(), rise=2.0)
    with pytest.raises(ValueError, match=r"selectivity must lie in \[0, 1\], got -1"):
        fact_lookup_by_probes(llama, prompts, labels, text=text(), selectivity=-1.0)
    with pytest.raises(ValueError, match=r"expected layers in 0..2, got \[5\]"):
        fact_lookup_by_probes(llama, prompts, labels, text=text(), layers=[5])
    prompts = known(llama)
    with pytest.raises(ValueError, match=r"expected extraction heads above layer 0, got L0H1: .* another n_heads"):
        fact_lookup_by_paths(llama, prompts, extraction_heads=["L0H1", "L2H0"])
    with pytest.raises(ValueError, match="expected heads such as L5H3 as extraction heads, got L1MLP"):
        fact_lookup_by_paths(llama, prompts, extraction_heads=["L1MLP"])
    with pytest.raises(ValueError, match="expected corrupt prompts that lower logit_difference, got means of"):
        fact_lookup_by_paths(llama, replace(prompts, tokens=prompts.corrupt, corrupt=prompts.tokens))
    with pytest.raises(ValueError, match="corrupted counterpart"):
        fact_lookup_by_paths(llama, replace(prompts, corrupt=None))
    with pytest.raises(ValueError, match=r"k must lie in 1..12"):
        fact_lookup_by_paths(llama, prompts, n_heads=13)


def test_the_papers_layers_have_the_papers_parameter_counts(monkeypatch):
    """The budgets that the authors' scripts match other localizations to."""
    budgets = {
        ("gemma-7b", "sports"): 1_358_954_496,
        ("gemma-2-9b", "sports"): 770_703_360,
        ("llama-3-8b", "sports"): 704_643_072,
        ("gemma-7b", "counterfact 0:64"): 1_132_462_080,
        ("gemma-2-9b", "counterfact 0:64"): 1_233_125_376,
        ("llama-3-8b", "counterfact 0:64"): 704_643_072,
    }
    for (name, task), weights in budgets.items():
        monkeypatch.setattr(
            "mechunlearn.localize.readings.fact_lookup.shape", lambda model, name=name: PAPER_SHAPES[name]
        )
        mask = paper_fact_lookup(None, name, task=task)
        assert mask.n_parameters == weights
        assert "arxiv.org/abs/2410.12949" in mask.provenance["source"]
    assert [c.layer for c in mask] == [4, 5, 6, 7]


def test_the_papers_layers_are_refused_on_another_model(llama):
    with pytest.raises(ValueError, match=r"expected gemma-7b, .*n_layers=28.*, got a model of .*n_layers=3"):
        paper_fact_lookup(llama, "gemma-7b")
    with pytest.raises(ValueError, match="expected one of gemma-7b, gemma-2-9b, llama-3-8b, got 'gpt2'"):
        paper_fact_lookup(llama, "gpt2")
    with pytest.raises(ValueError, match=r"expected one of the tasks sports, .* got 'zsre'"):
        paper_fact_lookup(llama, "gemma-7b", task="zsre")
    assert all(max(layers) < PAPER_SHAPES[n].n_layers for n, tasks in PAPER_LAYERS.items() for layers in tasks.values())


def test_the_shipped_model_looks_sports_up_in_its_lower_half(shipped):
    """As its card says: MLP 0 is necessary, the attribute is readable before the upper half, upper heads extract."""
    task = mu.tasks.sports_facts(shipped, forget="basketball")
    everyone = mu.tasks.joined(task.forget, task.retain)
    by_probes = fact_lookup_by_probes(shipped, everyone, text=task.text, seeds=1, folds=3)
    assert Component.parse("L0MLP") in by_probes.mask
    assert max(component.layer for component in by_probes.mask) < 5
    assert by_probes.findings["holds_without_later_attention"]
    assert by_probes.curves["selectivity"].mean[0] < 0, "embeddings tell tokens apart, not sports"
    by_paths = fact_lookup_by_paths(shipped, task.forget[:24])
    assert by_paths.scores["mlps"]["L0MLP"] > 0.5
    assert Component.parse("L0MLP") in by_paths.mask
    assert all(Component.parse(head).layer >= 5 for head in by_paths.findings["extraction_heads"])


def test_it_is_sent_to_another_process(llama):
    mask = mu.components.ComponentMask.of(["L1MLP"], mu.shape(llama))
    found = mu.localize.FactLookup(mask, "by hand", {"rise": 0.1}, {}, {})
    sent = pickle.loads(pickle.dumps(found))
    assert (sent.mask, sent.method, dict(sent.findings)) == (mask, "by hand", {"rise": 0.1})
