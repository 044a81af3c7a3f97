"""The slow, obvious reference: for every circuit one full forward pass in which hooks replace all the rest."""

from dataclasses import replace
from operator import neg

import pytest
import tiny
import torch
from full_pass import with_replaced
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import Component, ComponentMask, ComponentScores, heads, heads_and_mlps, layers
from mechunlearn.localize import attribution_patching, faithfulness
from mechunlearn.localize.circuits.curves import Faithfulness
from mechunlearn.localize.circuits.faithfulness import MIB_SIZES, n_weights
from mechunlearn.localize.replacement import gaussian, mean_over, resample, zero
from mechunlearn.metrics import answer_log_probability, logit_difference
from mechunlearn.model import shape, slots

MIXED = ("L0H1", "L0H2.W_K", "L0ATTN", "L0MLP", "L1H0", "L1H3.W_V", "L1N0", "L1N7", "L1MLP.W_in", "L2H1.W_Q", "L2H3")
LATE = ("L2ATTN", "L2N5", "L2MLP")


def assert_as_reference(found, model, prompts, level, **options):
    level = set(level)
    for place, circuit in enumerate(found.circuits):
        alone = with_replaced(model, prompts, level - set(circuit), **options)
        without = with_replaced(model, prompts, set(circuit), **options)
        assert torch.allclose(found.alone[:, place], alone, atol=3e-5), circuit
        assert torch.allclose(found.without[:, place], without, atol=3e-5), circuit
    assert len(set(found.alone.mean(0).tolist())) > 3  # or it would prove nothing


def scored(model, components):
    return ComponentScores.of(
        {str(c): float(i) for i, c in enumerate(reversed(list(components)), 1)}, shape(model), method="order"
    )


def nested(model, components):
    """Circuits of one, two, ... of the components."""
    chosen = list(components)
    return [ComponentMask.of(chosen[:k], shape(model)) for k in range(1, len(chosen))]


def by_hand(faithful, share, left=None):
    """A curve with these values for one prompt, m(nothing) = 1 and m(model) = 3."""
    circuits = tuple(ComponentMask.of(heads_and_mlps(SHAPE)[:k], SHAPE) for k in range(len(faithful)))
    alone, without = (
        1 + 2 * torch.tensor([values], dtype=torch.float64) for values in (faithful, left or [1 - f for f in faithful])
    )
    ends = torch.tensor([3.0]).double(), torch.tensor([1.0]).double()
    names = ("curve",) * len(faithful)
    return Faithfulness(names, circuits, torch.tensor(share, dtype=torch.float64), alone, without, *ends, "m")


SHAPE = mu.ModelShape(3, 4, 2, 32, 8, 64, True)


def test_every_circuit_has_the_metric_of_a_full_pass(model):
    prompts = tiny.prompts(model, n=3)
    level = [Component.parse(label) for label in MIXED + LATE]
    found = faithfulness(model, prompts, scored(model, level), sizes=[0.2, 0.5, 0.8], random_circuits=1)
    assert [len(circuit) for circuit in found.circuits[:5]] == [0, 2, 7, 11, 14]
    assert_as_reference(found, model, prompts, level)


def test_answers_of_several_tokens_and_left_padding(model):
    prompts = tiny.prompts(model, n=4, answer=3, padding="left")
    options = {"metric": answer_log_probability}
    circuits = nested(model, heads_and_mlps(shape(model)))[1::4]
    found = faithfulness(model, prompts, circuits, random_circuits=0, **options)
    assert_as_reference(found, model, prompts, heads_and_mlps(shape(model)), **options)


@pytest.mark.parametrize("replacement", [zero, "mean", gaussian(std=0.5)], ids=["zero", "mean", "noise"])
def test_other_replacements(llama, replacement):
    prompts = tiny.prompts(llama)
    given = mean_over(tiny.prompts(llama, seed=9)) if replacement == "mean" else replacement
    circuits = nested(llama, layers(shape(llama)))
    found = faithfulness(
        llama, prompts, circuits, components=layers, replacement=given, random_circuits=0, batch_size=4
    )
    assert_as_reference(found, llama, prompts, layers(shape(llama)), replacement=given)


def test_the_whole_model_is_faithful_and_nothing_is_not(model):
    found = faithfulness(model, tiny.prompts(model), scored(model, heads_and_mlps(shape(model))), sizes=[0.3])
    frame = found.to_frame()
    empty, full = frame[frame["components"] == 0], frame[frame["components"] == 15]
    assert len(empty) == len(full) == 6
    assert empty["faithfulness"].tolist() == full["left"].tolist() == [0.0] * 6
    assert full["faithfulness"].tolist() == empty["left"].tolist() == [1.0] * 6
    assert empty["faithfulness_high"].tolist() == [0.0] * 6
    assert full["faithfulness_low"].tolist() == [1.0] * 6


def only(label):
    """A Llama in which nothing but one head writes to the residual stream."""
    model = tiny.bridge("llama")
    component = Component.parse(label)
    with torch.no_grad():
        for (layer, matrix), slot in slots(model).items():
            if matrix in ("W_O", "W_out"):
                weight = slot.view(slot.parameter)
                kept = weight[component.index].clone()
                weight.zero_()
                if (layer, matrix) == (component.layer, "W_O"):
                    weight[component.index] = kept
    return model


def test_a_circuit_is_faithful_exactly_if_the_one_head_that_matters_is_in_it():
    model = only("L1H2")
    found = faithfulness(model, tiny.prompts(model), scored(model, heads_and_mlps(shape(model))), sizes=[0.2, 0.5, 0.8])
    inside = torch.tensor([Component.parse("L1H2") in circuit for circuit in found.circuits])
    assert 0 < inside.sum() < len(inside)
    frame = found.to_frame()
    assert torch.allclose(torch.tensor(frame["faithfulness"]), inside.double(), atol=1e-4)
    assert torch.allclose(torch.tensor(frame["left"]), (~inside).double(), atol=1e-4)


def test_the_best_ranking_of_that_model_has_the_largest_area_and_the_worst_none():
    model = only("L1H2")
    level = heads_and_mlps(shape(model))
    best = ComponentScores.of({str(c): float(str(c) == "L1H2") for c in level}, shape(model))
    every = [k / 15 for k in range(16)]
    circuits = {"best": best, "worst": replace(best, tensor=-best.tensor)}
    found = faithfulness(model, tiny.prompts(model), circuits, sizes=every, by=lambda values: values, random_circuits=3)
    assert found.cpr["best"] == pytest.approx(14.5 / 15, abs=1e-4)
    assert found.cmd["best"] == pytest.approx(0.5 / 15, abs=1e-4)
    assert found.cpr["worst"] == pytest.approx(0.5 / 15, abs=1e-4)
    for seed in range(3):
        assert 0.5 / 15 < found.cpr[f"random {seed}"] < 14.5 / 15
        assert found.cpr[f"random {seed}"] + found.cmd[f"random {seed}"] == pytest.approx(1, abs=1e-4)


def test_areas_worked_out_by_hand():
    found = by_hand([0.0, 1.0, 1.0], [0.0, 0.5, 1.0])
    assert found.cpr == {"curve": pytest.approx(0.75)}
    assert found.cmd == {"curve": pytest.approx(0.25)}
    beyond = by_hand([0.0, 2.0, 1.0], [0.0, 0.5, 1.0], left=[1.0, 0.5, 0.0])
    assert beyond.cpr["curve"] == pytest.approx(0.5 * 1 + 0.5 * 1.5)
    assert beyond.cmd["curve"] == pytest.approx(0.5 * 1 + 0.5 * 0.5)
    assert beyond.summary().loc["curve", "left"] == pytest.approx(0.5)
    assert by_hand([0.0, 0.25, 0.5, 1.0], [0.0, 0.1, 0.2, 1.0]).cpr["curve"] == pytest.approx(
        0.1 * 0.125 + 0.1 * 0.375 + 0.8 * 0.75
    )


def test_areas_over_nominal_fractions_worked_out_by_hand():
    """MIB's: no point at 0, and the share that was asked for where the circuit is smaller."""
    found = by_hand([0.0, 0.5, 1.5], [0.0, 0.2, 1.0]).at_nominal_sizes([0.1, 0.25, 1.0])
    assert found.loc["curve", "cpr"] == pytest.approx(0.15 * 0.25 + 0.75 * 1.0)
    assert found.loc["curve", "cmd"] == pytest.approx(0.15 * 0.75 + 0.75 * 0.5)
    for sizes in ([0.5], [0.5, 0.2], [0.5, 1.5]):
        with pytest.raises(ValueError, match="rising fractions"):
            by_hand([0.0, 1.0], [0.0, 1.0]).at_nominal_sizes(sizes)


def test_faithfulness_is_a_ratio_of_means_not_a_mean_of_ratios(llama):
    found = faithfulness(llama, tiny.prompts(llama), nested(llama, heads(shape(llama)))[4], components=heads)
    row = found.names.index("circuit") + 1
    means = [float(values.mean()) for values in (found.alone[:, row], found.nothing, found.whole)]
    expected = (means[0] - means[1]) / (means[2] - means[1])
    assert found.to_frame().loc[row, "faithfulness"] == pytest.approx(expected)


def test_rankings_are_cut_at_shares_of_components_or_of_weights(llama):
    scores, sizes = attribution_patching(llama, tiny.prompts(llama)), [0.001, 0.3, 0.5]
    found = faithfulness(llama, tiny.prompts(llama), scores, sizes=sizes, random_circuits=2)
    assert [len(circuit) for circuit in found.circuits] == [0, 4, 7, 15] * 3
    assert found.circuits[1] == scores.top(k=4)
    assert found.share[:4].tolist() == pytest.approx([0, 4 / 15, 7 / 15, 1])
    weighed = faithfulness(llama, tiny.prompts(llama), scores, sizes=sizes, size=n_weights, random_circuits=2)
    total = scores.top(k=15).n_parameters
    assert weighed.circuits[1] == scores.top(parameters=int(0.3 * total))
    for circuit, share in zip(weighed.circuits, weighed.share.tolist(), strict=True):
        assert share == pytest.approx(circuit.n_parameters / total)
    assert {len(circuit) for circuit in weighed.circuits[:4]} != {0, 4, 7, 15}


def test_scores_are_ranked_as_top_ranks_them(llama):
    scores = attribution_patching(llama, tiny.prompts(llama))
    found = faithfulness(llama, tiny.prompts(llama), scores, sizes=[0.4], by=neg, random_circuits=0)
    assert found.circuits[1] == scores.top(k=6, by=torch.neg) != scores.top(k=6)


def test_the_replacement_is_computed_once_for_all_circuits(llama):
    calls = []

    def counting(model, prompts, values):
        calls.append(len(prompts))
        return resample(model, prompts, values)

    scores = scored(llama, heads_and_mlps(shape(llama)))
    faithfulness(llama, tiny.prompts(llama), {"a": scores, "b": scores}, replacement=counting, batch_size=4)
    assert calls == [4, 2]


def test_equal_circuits_are_run_once(llama, monkeypatch):
    rows = []
    run = mu.localize.circuits.runs.continued

    def counting(model, base, row, layer, **options):
        rows.append(len(row))
        return run(model, base, row, layer, **options)

    monkeypatch.setattr(mu.localize.circuits.runs, "continued", counting)
    scores = scored(llama, heads_and_mlps(shape(llama)))
    faithfulness(llama, tiny.prompts(llama), {"a": scores, "b": scores}, sizes=[0.2, 0.4], random_circuits=0)
    assert sum(rows) == 6 * 5  # nothing at all, and two circuits by themselves and taken out


def test_the_model_is_left_as_it_was(model):
    def failing(logits, prompts):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("stop")
        return logit_difference(logits, prompts)

    calls: list[int] = []
    scores = scored(model, heads_and_mlps(shape(model)))
    with left_as_it_was(model):
        faithfulness(model, tiny.prompts(model, n=2), scores, sizes=[0.5], random_circuits=0)
    with left_as_it_was(model), pytest.raises(RuntimeError, match="stop"):
        faithfulness(model, tiny.prompts(model), scores, metric=failing, batch_size=4)


def test_the_random_baseline_has_the_sizes_of_the_ranking_and_its_own_members(llama):
    scores = scored(llama, heads_and_mlps(shape(llama)))
    found = faithfulness(llama, tiny.prompts(llama), scores, sizes=[0.2, 0.6], random_circuits=3)
    assert list(dict.fromkeys(found.names)) == ["order", "random 0", "random 1", "random 2"]
    sets = [circuit for circuit in found.circuits if len(circuit) == 3]
    assert len(set(sets)) == len(sets) == 4


def test_the_ranking_by_attribution_beats_random_ones_on_the_shipped_model(shipped):
    prompts = mu.tasks.sports_facts(shipped, forget="basketball").forget[:8]
    scores = attribution_patching(shipped, prompts)
    found = faithfulness(shipped, prompts, scores, sizes=[0.1, 0.5], random_circuits=3)
    assert found.cpr["attribution_patching"] > 0.1 + max(found.cpr[f"random {seed}"] for seed in range(3))
    assert found.cmd["attribution_patching"] < min(found.cmd[f"random {seed}"] for seed in range(3)) - 0.1
    rows = found.to_frame().query("circuit == 'attribution_patching' and components == 9")
    assert float(rows["left"].iloc[0]) < 0.01  # nothing is left without the nine


def test_intervals_contain_the_value_and_narrow_with_prompts():
    generator = torch.Generator().manual_seed(0)
    few = by_hand([0.0, 0.5, 1.0], [0.0, 0.5, 1.0])
    widths = []
    for n in (16, 256):
        noise = 0.5 * torch.randn(n, 3, generator=generator).double()
        alone = torch.tensor([1.0, 2.0, 3.0]).double() + noise
        ends = {"whole": alone[:, 2], "nothing": alone[:, 0]}
        found = replace(few, alone=alone, without=alone.flip(1), **ends)
        table = found.summary().loc["curve"]
        assert table["cpr_low"] < table["cpr"] < table["cpr_high"]
        assert table["cmd_low"] < table["cmd"] < table["cmd_high"]
        widths.append(table["cpr_high"] - table["cpr_low"])
    assert widths[1] < 0.5 * widths[0]
    assert found.summary(seed=1).equals(found.summary(seed=1))
    assert not found.summary(seed=1).equals(found.summary(seed=2))


def test_the_plot_has_a_curve_for_each_and_repr_says_the_areas(llama):
    found = faithfulness(llama, tiny.prompts(llama), nested(llama, heads_and_mlps(shape(llama)))[::5])
    names = [trace.name for trace in found.plot().data if trace.name and not trace.name.startswith("without")]
    assert names == ["circuit", *(f"random {seed}" for seed in range(5))]
    assert f"circuit: CPR {found.cpr['circuit']:.3f}, CMD {found.cmd['circuit']:.3f}" in repr(found)


def test_the_default_sizes_are_those_of_the_benchmark():
    assert MIB_SIZES == (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def refused(*parts):
    return pytest.raises(ValueError, match="(?s)" + ".*".join(parts))


@pytest.mark.parametrize("sizes", [[5.0], [-0.1, 0.5], []])
def test_sizes_out_of_range_are_refused(llama, sizes):
    with refused(r"expected sizes in \[0, 1\]", "got", "divide a number of components"):
        faithfulness(llama, tiny.prompts(llama), scored(llama, heads(shape(llama))), sizes=sizes)


def test_a_model_that_replacing_everything_does_not_change_is_refused(model):
    prompts = tiny.prompts(model)
    same = replace(prompts, corrupt=prompts.tokens)
    with left_as_it_was(model), refused("expected a model that changes", "faithfulness is undefined", "another answer"):
        faithfulness(model, same, scored(model, heads_and_mlps(shape(model))))


def test_prompts_without_a_corrupted_side_are_refused_unless_something_else_replaces(llama):
    prompts = replace(tiny.prompts(llama), corrupt=None)
    scores = scored(llama, heads_and_mlps(shape(llama)))
    with left_as_it_was(llama), refused("expected prompts with a corrupted counterpart", "got none", "pass corrupt="):
        faithfulness(llama, prompts, scores)
    faithfulness(llama, prompts, scores, replacement=zero, sizes=[0.5], random_circuits=0)


def test_circuits_of_another_model_or_level_are_refused(llama):
    prompts, sizes = tiny.prompts(llama), shape(llama)
    with refused("expected circuits of this model", "got 'circuit' of another one", "localize on the model"):
        faithfulness(llama, prompts, ComponentMask.of(["L1MLP"], replace(sizes, n_layers=7)))
    with refused("expected circuits and scores of the 15 components", "differs in L1ATTN", r"pass components="):
        faithfulness(llama, prompts, ComponentMask.of(["L1ATTN"], sizes))
    with refused("expected circuits and scores of the 12 components", "got 'b', which differs in L0MLP"):
        given = {"a": scored(llama, heads(sizes)), "b": scored(llama, heads_and_mlps(sizes))}
        faithfulness(llama, prompts, given)


def test_other_bad_input(llama):
    scores = scored(llama, heads(shape(llama)))
    with refused("expected at least one circuit or scores", "got none"):
        faithfulness(llama, tiny.prompts(llama), {})
    with refused('a name that does not start with "random "', "random mine"):
        faithfulness(llama, tiny.prompts(llama), {"random mine": scores})
    with refused("expected a number of random circuits", "got -1"):
        faithfulness(llama, tiny.prompts(llama), scores, random_circuits=-1)
    with refused("expected a batch_size of at least 1, got 0"):
        faithfulness(llama, tiny.prompts(llama), scores, batch_size=0)
