import json
from itertools import product
from pathlib import Path

import pytest

from mechunlearn.components import Component, ComponentMask, ModelShape, heads

SHAPE = ModelShape(n_layers=3, n_heads=4, n_kv_heads=2, d_model=8, d_head=2, d_mlp=16, gated=True)
OTHER = ModelShape(n_layers=4, n_heads=4, n_kv_heads=2, d_model=8, d_head=2, d_mlp=16, gated=True)


def mask(*labels: str, shape: ModelShape = SHAPE) -> ComponentMask:
    return ComponentMask.of(labels, shape)


A, B, C = mask("L0H1", "L1MLP", "L2N3"), mask("L1MLP", "L2ATTN"), mask("L2ATTN", "L2N3", "L0H0.W_Q")


@pytest.mark.parametrize(("x", "y", "z"), list(product((A, B, C), repeat=3)))
def test_set_laws_hold(x: ComponentMask, y: ComponentMask, z: ComponentMask) -> None:
    assert x | y == y | x
    assert x & y == y & x
    assert x & (y | z) == (x & y) | (x & z)
    assert x - (y & z) == (x - y) | (x - z)
    assert (x - y) | (x & y) == x
    assert (x - y).isdisjoint(y)
    assert x & y <= x <= x | y
    assert len(x | y) + len(x & y) == len(x) + len(y)


def test_operations_are_those_of_the_sets_of_labels() -> None:
    assert list(map(str, A | B)) == ["L0H1", "L1MLP", "L2ATTN", "L2N3"]
    assert list(map(str, A & B)) == ["L1MLP"]
    assert list(map(str, A - B)) == ["L0H1", "L2N3"]


def test_labels_and_plain_sets_stand_for_masks_on_the_right() -> None:
    labels, members = {"L1MLP", "L2ATTN"}, {Component(1, "MLP"), Component(2, "ATTN")}
    for right in (labels, members):
        assert A | right == A | B
        assert A & right == A & B
        assert A - right == A - B


def test_a_plain_set_may_stand_on_the_left() -> None:
    assert {Component(1, "MLP"), Component(2, "ATTN")} & A == A & B


def test_members_are_found_by_component_and_by_label() -> None:
    assert "L1MLP" in A
    assert Component(1, "MLP") in A
    assert "L0MLP" not in A
    with pytest.raises(ValueError, match="expected a component label"):
        assert "mlp" not in A


def test_iteration_is_in_model_order_whatever_the_order_given() -> None:
    labels = ["L2N3", "L0MLP", "L1H3", "L0H2", "L0ATTN"]
    assert list(map(str, mask(*labels))) == list(map(str, mask(*labels[::-1]))) == sorted(labels, key=Component.parse)


def test_equal_masks_have_equal_hashes_and_provenance_does_not_count() -> None:
    other = ComponentMask(frozenset(A), SHAPE, {"method": "another"})
    assert other == A
    assert len({A, other, B}) == 2
    assert mask("L0MLP") != mask("L0MLP", shape=OTHER)
    assert frozenset(A) != A


def test_overlapping_weights_count_once() -> None:
    head, neuron = 4 * 2 * 8, 3 * 8
    assert mask("L0H0").n_parameters == head
    assert mask("L0H0", "L0H0.W_Q").n_parameters == head
    assert mask("L0H0", "L0H1").n_parameters == 6 * 2 * 8
    assert mask("L0H0", "L0H2").n_parameters == 2 * head
    assert mask("L2N3", "L2N4").n_parameters == 2 * neuron
    assert mask("L2MLP", "L2N3").n_parameters == mask("L2MLP").n_parameters == 16 * neuron
    assert mask(*map(str, heads(SHAPE))).n_parameters == mask("L0ATTN", "L1ATTN", "L2ATTN").n_parameters


def test_an_empty_mask_is_a_mask_of_nothing() -> None:
    empty = A - A
    assert len(empty) == empty.n_parameters == 0
    assert empty | A == A
    assert not empty


def test_a_mask_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        A.components = frozenset()  # type: ignore[misc]
    with pytest.raises(TypeError):
        A.provenance["method"] = "x"  # type: ignore[index]


def test_provenance_is_not_shared_with_the_dictionary_it_came_from() -> None:
    given = {"method": "mine"}
    made = ComponentMask(frozenset(A), SHAPE, given)
    given["method"] = "changed"
    assert made.provenance["method"] == "mine"


def test_masks_of_different_shapes_do_not_combine() -> None:
    for operation in (ComponentMask.__or__, ComponentMask.__and__, ComponentMask.__sub__):
        with pytest.raises(
            ValueError, match=r"same shape .*n_layers=3.* got one of .*n_layers=4.* localize on the model"
        ):
            operation(A, mask("L3MLP", shape=OTHER))


def test_components_outside_the_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 layers.*got L3MLP: was the mask"):
        mask("L3MLP")
    with pytest.raises(ValueError, match="got L0H4"):
        A | {"L0H4"}


def test_saved_masks_are_readable_json_with_how_they_were_made(tmp_path: Path) -> None:
    (A - B).save(str(tmp_path / "mask.json"))
    content = json.loads((tmp_path / "mask.json").read_text())["content"]
    assert content["components"] == {"$frozenset of Component": ["L0H1", "L2N3"]}
    by_hand = {"method": "by hand"}
    assert content["provenance"] == {"left": by_hand, "set": "-", "right": by_hand}


def test_provenance_names_operation_and_both_sides() -> None:
    assert (A | B).provenance["set"] == "|"
    assert (A & {"L1MLP"}).provenance == {"left": {"method": "by hand"}, "set": "&", "right": ["L1MLP"]}


def test_repr_shows_at_most_eight_components_and_the_weights() -> None:
    assert repr(mask("L1MLP")) == "ComponentMask(L1MLP; 384 weights)"
    assert repr(mask(*map(str, heads(SHAPE)))).endswith("L1H2, L1H3, ... (4 more); 576 weights)")


def test_plot_marks_the_selected_cells_only() -> None:
    figure = A.plot()
    heat = figure.data[0]
    assert list(heat.x) == ["H1", "MLP", "N3"]
    assert [list(row) for row in heat.z] == [[1, None, None], [None, 1, None], [None, None, 1]]
    assert f"{A.n_parameters:,} weights" in figure.layout.title.text
