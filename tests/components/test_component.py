from itertools import product

import pytest
import torch

from mechunlearn.components import Component, ModelShape, heads, heads_and_mlps, layers, matrices, mlps, neurons
from mechunlearn.components.component import ATTENTION_MATRICES, Cover

PLAIN = ModelShape(n_layers=2, n_heads=3, n_kv_heads=3, d_model=12, d_head=4, d_mlp=5, gated=False)
GATED = ModelShape(n_layers=3, n_heads=2, n_kv_heads=2, d_model=8, d_head=4, d_mlp=7, gated=True)
GROUPED = ModelShape(n_layers=2, n_heads=6, n_kv_heads=2, d_model=10, d_head=4, d_mlp=3, gated=True)
SINGLE_KV = ModelShape(n_layers=1, n_heads=4, n_kv_heads=1, d_model=8, d_head=2, d_mlp=4, gated=False)
SHAPES = pytest.mark.parametrize("shape", [PLAIN, GATED, GROUPED, SINGLE_KV], ids=["plain", "gated", "grouped", "mqa"])


def every_component(shape: ModelShape) -> list[Component]:
    slices = [Component(c.layer, "H", c.index, m) for c, m in product(heads(shape), ATTENTION_MATRICES)]
    return sorted({*heads_and_mlps(shape), *layers(shape), *matrices(shape), *neurons(shape), *slices})


def times_covered(shape: ModelShape, components: list[Component]) -> dict[tuple[int, str], torch.Tensor]:
    """How many of the components cover each unit of each matrix, counted one component at a time."""
    names = product(range(shape.n_layers), shape.matrices)
    tally = {(layer, m): torch.zeros(shape.units(m), dtype=torch.int64) for layer, m in names}
    for component in components:
        for matrix, units in shape.units_of(component).items():
            tally[component.layer, matrix][units] += 1
    return tally


@SHAPES
def test_parse_inverts_str_for_every_component(shape: ModelShape) -> None:
    for component in every_component(shape):
        assert Component.parse(str(component)) == component


@pytest.mark.parametrize("label", ["L5H3", "L5H3.W_Q", "L5ATTN", "L8MLP", "L8MLP.W_gate", "L8N40", "L12H10.W_O"])
def test_str_inverts_parse(label: str) -> None:
    assert str(Component.parse(label)) == label
    assert repr(Component.parse(label)) == label


@pytest.mark.parametrize(
    "label",
    ["", "H3", "L5", "L5H", "l5h3", "L5H3.W_in", "L8MLP.W_Q", "L5ATTN.W_Q", "L8N", "L8N4.W_in", "L5H3 ", "xL5H3"],
)
def test_a_string_that_is_no_label_is_refused_with_examples(label: str) -> None:
    with pytest.raises(ValueError, match=r"expected a component label such as L5H3.*write the layer") as error:
        Component.parse(label)
    assert repr(label) in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [(-1, "MLP"), (0, "H"), (0, "H", -1), (0, "H", 0, "W_in"), (0, "ATTN", None, "W_Q"), (0, "MLP", 3), (0, "X", 1)],
)
def test_a_component_that_has_no_label_is_refused(fields: tuple) -> None:
    with pytest.raises(ValueError, match="expected"):
        GATED.units_of(Component(*fields))


@SHAPES
def test_matrices_partition_all_weights(shape: ModelShape) -> None:
    assert all(bool((count == 1).all()) for count in times_covered(shape, matrices(shape)).values())


@SHAPES
def test_layers_partition_all_weights(shape: ModelShape) -> None:
    assert all(bool((count == 1).all()) for count in times_covered(shape, layers(shape)).values())


@SHAPES
def test_neurons_partition_the_mlps(shape: ModelShape) -> None:
    for (_, matrix), count in times_covered(shape, neurons(shape)).items():
        assert bool((count == int(matrix not in ATTENTION_MATRICES)).all())


@SHAPES
def test_heads_share_key_and_value_units_with_their_group_only(shape: ModelShape) -> None:
    group = shape.n_heads // shape.n_kv_heads
    for (_, matrix), count in times_covered(shape, heads(shape)).items():
        expected = {"W_Q": 1, "W_O": 1, "W_K": group, "W_V": group}.get(matrix, 0)
        assert bool((count == expected).all())


def test_consecutive_query_heads_read_the_same_key_head() -> None:
    units = [GROUPED.units_of(Component(0, "H", h))["W_K"] for h in range(6)]
    assert units == [slice(0, 1)] * 3 + [slice(1, 2)] * 3


@pytest.mark.parametrize(
    ("shape", "weights"),
    [
        (PLAIN, 2 * (4 * 3 * 4 * 12 + 2 * 5 * 12)),
        (GATED, 3 * (4 * 2 * 4 * 8 + 3 * 7 * 8)),
        (GROUPED, 2 * ((2 * 6 + 2 * 2) * 4 * 10 + 3 * 3 * 10)),
        (SINGLE_KV, (2 * 4 + 2 * 1) * 2 * 8 + 2 * 4 * 8),
    ],
)
def test_parameters_of_everything_are_counted_as_by_hand(shape: ModelShape, weights: int) -> None:
    assert shape.n_parameters(layers(shape)) == weights
    assert shape.n_parameters(matrices(shape)) == weights
    assert shape.n_parameters(every_component(shape)) == weights


@SHAPES
def test_parameters_are_the_true_units_of_the_entries(shape: ModelShape) -> None:
    chosen = every_component(shape)[::3]
    covered = {name: count > 0 for name, count in times_covered(shape, chosen).items()}
    entries = shape.entries(chosen)
    assert all(torch.equal(covered[name], units) for name, units in entries.items())
    assert not any(covered[name].any() for name in covered.keys() - entries.keys())
    expected = sum(int(units.sum()) * shape.unit_parameters(matrix) for (_, matrix), units in covered.items())
    assert shape.n_parameters(chosen) == expected


@SHAPES
def test_gains_add_up_to_the_parameters_in_any_order(shape: ModelShape) -> None:
    for order in (every_component(shape), every_component(shape)[::-1]):
        cover, total = Cover(shape), 0
        for component in order:
            total += cover.gain(component)
            cover.add(component)
            assert cover.gain(component) == 0
        assert total == shape.n_parameters(layers(shape))


def test_a_second_head_of_a_group_adds_its_query_and_output_only() -> None:
    assert GROUPED.n_parameters([Component(0, "H", 0)]) == 4 * 4 * 10
    assert GROUPED.n_parameters([Component(0, "H", 0), Component(0, "H", 2)]) == 6 * 4 * 10
    assert GROUPED.n_parameters([Component(0, "H", 0), Component(0, "H", 3)]) == 8 * 4 * 10


def test_order_is_layer_then_attention_heads_mlp_neurons_then_index_then_matrix() -> None:
    labels = "L0ATTN L0H2 L0H2.W_Q L0H2.W_K L0H2.W_V L0H2.W_O L0H10 L0MLP L0MLP.W_in L0MLP.W_gate L0MLP.W_out L0N3 L1H0"
    ordered = [Component.parse(label) for label in labels.split()]
    backwards = ordered[::-1]
    assert sorted(backwards) == ordered
    assert max(ordered) == Component(1, "H", 0)


@SHAPES
def test_every_list_is_sorted_and_without_duplicates(shape: ModelShape) -> None:
    for level in (heads, mlps, heads_and_mlps, layers, matrices, neurons):
        assert level(shape) == sorted(set(level(shape)))
    assert len(heads(shape)) == shape.n_layers * shape.n_heads
    assert len(mlps(shape)) == shape.n_layers
    assert set(heads_and_mlps(shape)) == {*heads(shape), *mlps(shape)}
    assert len(neurons(shape)) == shape.n_layers * shape.d_mlp


def test_components_are_of_one_kind_wherever_they_are() -> None:
    assert Component(0, "MLP").kind == Component(5, "MLP").kind
    assert Component.parse("L0H1.W_Q").kind == Component.parse("L3H0.W_Q").kind
    kinds = {
        Component.parse(label).kind
        for label in ["L0H1", "L0H1.W_Q", "L0H1.W_K", "L0MLP", "L0MLP.W_in", "L0ATTN", "L0N1"]
    }
    assert len(kinds) == 7


@pytest.mark.parametrize("label", ["L3MLP", "L0H2", "L0H2.W_K", "L0N7", "L3ATTN"])
def test_a_component_outside_the_shape_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match=rf"3 layers, 2 heads, 7 neurons .* a W_gate, got {label}: was the mask"):
        GATED.units_of(Component.parse(label))


def test_a_gate_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"no W_gate, got L0MLP.W_gate"):
        PLAIN.units_of(Component.parse("L0MLP.W_gate"))
    assert set(PLAIN.units_of(Component.parse("L0MLP"))) == {"W_in", "W_out"}
