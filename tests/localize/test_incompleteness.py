"""The references: one full pass in which hooks replace the parts, and circuits whose completeness is known."""

from dataclasses import replace

import pytest
import tiny
import torch
from full_pass import with_replaced
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import Component, ComponentMask, EdgeMask, heads_and_mlps, layers
from mechunlearn.components.edge import edges_where
from mechunlearn.localize import attribution_patching, edge_faithfulness, incompleteness
from mechunlearn.localize.replacement import mean_over, resample, zero
from mechunlearn.metrics import logit_difference
from mechunlearn.model import shape, slots
from mechunlearn.model.edges import edges_of

CIRCUIT = ["L0H1", "L0MLP", "L1H2", "L1MLP", "L2H0", "L2MLP"]


def circuit_of(model, labels=CIRCUIT):
    return ComponentMask.of(labels, shape(model))


def only(*labels):
    """A Llama in which nothing but these heads writes to the residual stream."""
    model = tiny.bridge("llama")
    kept = {(c.layer, c.index) for c in map(Component.parse, labels)}
    with torch.no_grad():
        for (layer, matrix), slot in slots(model).items():
            if matrix in ("W_O", "W_out"):
                weight = slot.view(slot.parameter)
                for unit in range(slot.units):
                    if matrix == "W_out" or (layer, unit) not in kept:
                        weight[unit] = 0.0
    return model


def random_edges(model, share, seed=0):
    chosen = list(edges_where(edges_of(model), shape(model)))
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    return EdgeMask.of([chosen[i] for i in order[: int(share * len(chosen))]], shape(model))


@pytest.mark.parametrize("replacement", [resample, zero, "mean"], ids=["resample", "zero", "mean"])
def test_both_sides_have_the_metric_of_a_with_replaced(model, replacement):
    prompts, circuit = tiny.prompts(model, n=3, padding="left"), circuit_of(model)
    given = mean_over(tiny.prompts(model, seed=9)) if replacement == "mean" else replacement
    with left_as_it_was(model):
        found = incompleteness(model, prompts, circuit, knockouts=3, replacement=given)
    everything = set(heads_and_mlps(shape(model)))
    for place, knocked in enumerate(found.knockouts):
        kept = set(circuit) - set(knocked)
        circuit_without = with_replaced(model, prompts, everything - kept, replacement=given)
        model_without = with_replaced(model, prompts, set(knocked), replacement=given)
        assert torch.allclose(found.circuit_without[:, place], circuit_without, atol=3e-5)
        assert torch.allclose(found.model_without[:, place], model_without, atol=3e-5)
        expected = float((circuit_without - model_without).mean().abs())
        assert float(found.tensor[place]) == pytest.approx(expected, abs=5e-5)
    assert found.tensor.max() > 1e-2


def test_edges_of_both_sides_are_what_edge_faithfulness_makes_of_them(llama):
    """A circuit by itself, and taken out of the model: `edge_faithfulness` tests these against a model by hand."""
    prompts, circuit = tiny.prompts(llama), random_edges(llama, 0.6)
    found = incompleteness(llama, prompts, circuit, knockouts=3)
    for place, knocked in enumerate(found.knockouts[1:], 1):
        kept = edge_faithfulness(llama, prompts, circuit - knocked, random_circuits=0)
        out = edge_faithfulness(llama, prompts, knocked, random_circuits=0)
        alone = kept.nothing if knocked == circuit else kept.alone[:, 1]
        assert torch.allclose(found.circuit_without[:, place], alone, atol=1e-5)
        assert torch.allclose(found.model_without[:, place], out.without[:, 1], atol=1e-5)


def test_the_whole_model_is_complete(model):
    for circuit in (circuit_of(model, heads_and_mlps(shape(model))), random_edges(model, 1.0)):
        found = incompleteness(model, tiny.prompts(model, n=2), circuit, knockouts=3)
        assert torch.equal(found.circuit_without, found.model_without)
        assert found.mean == found.largest == 0


def test_the_ends_are_the_model_the_circuit_and_what_is_left(llama):
    prompts, circuit = tiny.prompts(llama), circuit_of(llama)
    found = incompleteness(llama, prompts, circuit, knockouts=2)
    curve = mu.localize.faithfulness(llama, prompts, circuit, random_circuits=0)
    assert [len(found.knockouts[0]), found.knockouts[-1]] == [0, circuit]
    assert torch.allclose(found.model_without[:, 0], curve.whole, atol=1e-6)
    assert torch.allclose(found.circuit_without[:, 0], curve.alone[:, 1], atol=1e-6)
    assert torch.allclose(found.circuit_without[:, -1], curve.nothing, atol=1e-6)
    assert torch.allclose(found.model_without[:, -1], curve.without[:, 1], atol=1e-6)


def test_a_circuit_is_complete_exactly_if_all_that_matters_is_in_it():
    model = only("L1H2")
    prompts = tiny.prompts(model)
    complete = incompleteness(model, prompts, circuit_of(model, ["L0H1", "L1H2", "L2MLP"]))
    without_it = incompleteness(model, prompts, circuit_of(model, ["L0H1", "L1H1", "L2MLP"]))
    assert complete.largest < 1e-5
    gap = (
        with_replaced(model, prompts, set()) - with_replaced(model, prompts, set(heads_and_mlps(shape(model))))
    ).mean()
    assert without_it.tensor.tolist() == pytest.approx([abs(float(gap))] * 22, abs=1e-5)
    assert abs(float(gap)) > 1e-2


def test_a_circuit_without_its_backup_is_faithful_but_not_complete():
    """Two heads write the same, and the metric saturates with either: one of them alone is a faithful circuit."""
    model = only("L1H2", "L1H3")
    with torch.no_grad():
        for matrix in ("W_Q", "W_O"):  # both heads read one KV head
            weight = slots(model)[1, matrix].view(slots(model)[1, matrix].parameter)
            weight[3] = weight[2]
    prompts = tiny.prompts(model)
    corrupt = with_replaced(model, prompts, set(heads_and_mlps(shape(model))))
    assert float((with_replaced(model, prompts, set()) - corrupt).abs().min()) > 1e-4

    known = dict(zip(prompts.texts, corrupt.tolist(), strict=True))

    def changed(logits, prompts):
        own = torch.tensor([known[text] for text in prompts.texts]).double()
        return ((logit_difference(logits, prompts).double() - own).abs() > 1e-5).double()

    for labels, expected in ((["L1H2"], {0: 0, -1: 1}), (["L1H2", "L1H3"], {0: 0, -1: 0})):
        found = incompleteness(model, prompts, circuit_of(model, labels), metric=changed)
        assert found.circuit_without[:, 0].tolist() == [1.0] * 6, "faithful"
        assert {place: float(found.tensor[place]) for place in expected} == expected
        assert found.largest == (1 if len(labels) == 1 else 0)


def test_knockouts_are_random_subsets_that_the_seed_decides(llama):
    prompts, circuit = tiny.prompts(llama, n=2), circuit_of(llama, heads_and_mlps(shape(llama)))
    found, again, other = (incompleteness(llama, prompts, circuit, knockouts=40, seed=s) for s in (0, 0, 1))
    assert found.knockouts == again.knockouts != other.knockouts
    drawn = found.knockouts[1:-1]
    share = sum(len(one) for one in drawn) / (40 * len(circuit))
    assert 0.4 < share < 0.6  # 600 coins: five standard deviations
    assert len(set(drawn)) > 35
    assert all(one <= circuit for one in drawn)


def test_other_levels(llama):
    prompts, circuit = tiny.prompts(llama, n=3), circuit_of(llama, ["L1ATTN", "L1MLP", "L2MLP"])
    found = incompleteness(llama, prompts, circuit, components=layers, knockouts=1)
    expected = with_replaced(llama, prompts, set(layers(shape(llama))) - set(circuit))
    assert torch.allclose(found.circuit_without[:, 0], expected, atol=3e-5)


def test_tables_intervals_plots_and_files(llama, tmp_path):
    for circuit in (circuit_of(llama), random_edges(llama, 0.3)):
        found = incompleteness(llama, tiny.prompts(llama), circuit, knockouts=4)
        frame = found.to_frame()
        assert list(frame.index) == ["nothing", "random 0", "random 1", "random 2", "random 3", "all of it"]
        assert (frame["low"] < frame["difference"]).all()
        assert (frame["difference"] < frame["high"]).all()
        assert frame["incompleteness"].tolist() == pytest.approx(frame["difference"].abs().tolist())
        assert found.mean == pytest.approx(frame["incompleteness"][1:-1].mean())
        assert found.largest == frame["incompleteness"][1:-1].max()
        low, high = found.interval()
        assert low < found.mean < high
        assert len(found.plot().data[1].x) == 6
        assert f"mean over 4 random knockouts {found.mean:.3g}" in repr(found)


def test_the_top_by_attribution_is_more_complete_than_random_ones_on_the_shipped_model(shipped):
    task = mu.tasks.sports_facts(shipped, forget="basketball")
    top = attribution_patching(shipped, task.forget[:8]).top(k=20)
    control = mu.localize.random_like(top, shipped, seed=0)
    found, other = (incompleteness(shipped, task.forget[8:16], c, knockouts=6) for c in (top, control))
    assert found.interval()[1] < other.interval()[0]


def test_bad_input(llama, unchecked):
    prompts, circuit = tiny.prompts(llama), circuit_of(llama)
    with pytest.raises(ValueError, match=r"expected a circuit with at least one component or edge"):
        incompleteness(llama, prompts, circuit - circuit)
    with pytest.raises(ValueError, match=r"expected a circuit .* cut scores with .top"):
        incompleteness(llama, prompts, attribution_patching(llama, prompts))
    with pytest.raises(ValueError, match=r"expected at least one knockout, got 0"):
        incompleteness(llama, prompts, circuit, knockouts=0)
    with pytest.raises(ValueError, match=r"expected components=None for a circuit of edges"):
        incompleteness(llama, prompts, random_edges(llama, 0.2), components=layers)
    with pytest.raises(ValueError, match=r"expected circuits and scores of the 6 components"):
        incompleteness(llama, prompts, circuit, components=layers)
    with pytest.raises(ValueError, match=r"expected circuits of this model"):
        incompleteness(llama, prompts, ComponentMask.of(["L1MLP"], replace(shape(llama), n_layers=7)))
    with pytest.raises(ValueError, match=r"expected prompts with a corrupted counterpart"):
        incompleteness(llama, replace(prompts, corrupt=None), circuit)
