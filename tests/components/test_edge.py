"""Edges as values, the list of all of them, and circuits as sets of them."""

import itertools

import pytest

from mechunlearn.components import Component, ComponentMask, Edge, EdgeMask, ModelShape, destinations, edges, sources
from mechunlearn.components.edge import edge_mask, mask_of, place_of

GROUPED = ModelShape(n_layers=3, n_heads=4, n_kv_heads=2, d_model=32, d_head=8, d_mlp=64, gated=True)
PLAIN = ModelShape(n_layers=2, n_heads=3, n_kv_heads=3, d_model=24, d_head=8, d_mlp=48, gated=False)
LABELS = ["L1H2->L2H0.W_Q", "embed->L0MLP", "L2MLP->logits", "embed->logits", "L0H1->L0MLP", "L0MLP->L1H2.W_V"]


@pytest.mark.parametrize("label", LABELS)
def test_str_and_parse_are_inverses(label):
    assert str(Edge.parse(label)) == label
    assert Edge.parse(str(Edge.parse(label))) == Edge.parse(label)


def test_every_listed_edge_is_parsed_back():
    assert all(Edge.parse(str(edge)) == edge for edge in edges(GROUPED))


@pytest.mark.parametrize("label", ["L3H0->L1MLP", "L2H0->L2H1.W_Q", "L1MLP->L1H0.W_V", "L1MLP->L1MLP"])
def test_an_edge_that_goes_backwards_is_refused(label):
    with pytest.raises(ValueError, match=f"expected an edge that goes forward in the model, got {label}: .*earlier"):
        Edge.parse(label)


@pytest.mark.parametrize("label", ["L1H2.W_O->L2MLP", "L0H1->L2H1", "embed->L0N3", "L0ATTN->logits", "L0H1->L2H1.W_O"])
def test_what_neither_writes_nor_reads_is_refused(label):
    with pytest.raises(ValueError, match=f"expected an edge with a label such as .*, got {label}"):
        Edge.parse(label)


@pytest.mark.parametrize("label", ["", "L1H2", "L1H2->", "logits->embed", "L1H2->L3H0->logits", "L1H2 -> L3H0.W_Q"])
def test_other_labels_are_refused(label):
    with pytest.raises(ValueError, match=r"expected .* label such as"):
        Edge.parse(label)


@pytest.mark.parametrize("shape", [GROUPED, PLAIN])
def test_edges_are_all_pairs_that_go_forward_in_model_order(shape):
    listed = edges(shape)
    pairs = []
    for source, destination in itertools.product(sources(shape), destinations(shape)):
        try:
            pairs.append(Edge(source, destination))
        except ValueError:
            continue
    assert listed == pairs == sorted(pairs)


def test_the_number_of_edges_is_what_counting_gives():
    heads, kv, layers = 4, 2, 3
    expected = 0
    for layer in range(layers):
        before = 1 + layer * (heads + 1)
        expected += before * (heads + 2 * kv) + before + heads
    expected += 1 + layers * (heads + 1)
    assert len(edges(GROUPED)) == expected
    assert len(edges(GROUPED, parallel=True)) == expected - layers * heads


def test_in_parallel_blocks_only_edges_from_heads_to_their_own_mlp_are_missing():
    missing = set(edges(PLAIN)) - set(edges(PLAIN, parallel=True))
    assert missing == {Edge.parse(f"L{layer}H{head}->L{layer}MLP") for layer in range(2) for head in range(3)}


def test_gpt2_small_has_as_many_edges_as_the_literature_says():
    assert edge_mask(ModelShape(12, 12, 12, 768, 64, 3072, False)).sum() == 32491


def test_query_heads_that_share_a_kv_head_share_its_edges():
    assert place_of("embed->L1H3.W_K", GROUPED) == place_of("embed->L1H2.W_K", GROUPED)
    assert place_of("embed->L1H3.W_Q", GROUPED) != place_of("embed->L1H2.W_Q", GROUPED)
    assert Component(1, "H", 3, "W_K") not in destinations(GROUPED)


def test_an_edge_outside_the_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected a component of a model with 2 layers.*got L2MLP.*another model"):
        mask_of(["embed->L2MLP"], PLAIN)


def test_rows_and_columns_of_the_mask_are_sources_and_destinations():
    mask = edge_mask(PLAIN)
    assert mask.shape == (len(sources(PLAIN)), len(destinations(PLAIN)))
    assert mask[0].all(), "the embedding is read by everything"
    assert mask[:, -1].all(), "the logits read everything"


def circuit(*labels, shape=GROUPED):
    return EdgeMask.of(labels, shape)


def test_circuits_are_sets():
    a, b = circuit("embed->L0MLP", "L0MLP->logits"), circuit("L0MLP->logits", "L1MLP->logits")
    assert {str(e) for e in a | b} == {"embed->L0MLP", "L0MLP->logits", "L1MLP->logits"}
    assert {str(e) for e in a & b} == {"L0MLP->logits"}
    assert {str(e) for e in a - b} == {"embed->L0MLP"}
    assert (a ^ b) == (a | b) - (a & b)
    assert "embed->L0MLP" in a
    assert "embed->L0MLP" not in b
    assert list(a) == sorted(a)
    assert hash(a) == hash(circuit("L0MLP->logits", "embed->L0MLP"))
    assert a.tensor.sum() == 2


def test_circuits_of_different_shapes_do_not_mix():
    with pytest.raises(ValueError, match="expected edges of a model of the same shape"):
        circuit("embed->L0MLP") | circuit("embed->L0MLP", shape=PLAIN)


def test_a_shared_kv_head_has_one_label_in_a_circuit():
    assert circuit("embed->L1H3.W_K") == circuit("embed->L1H2.W_K")


def test_the_components_of_a_circuit_are_those_at_either_end():
    plain = circuit("embed->L0H1.W_V", "L0H1->L1H2.W_K", "L1H2->L1MLP", "L1MLP->logits", shape=PLAIN)
    assert plain.components() == ComponentMask.of(["L0H1", "L1H2", "L1MLP"], PLAIN)


def test_a_shared_kv_head_counts_as_its_matrix_alone():
    grouped = circuit("L0H1->L1H3.W_K", "L0H1->L1H3.W_Q")
    assert grouped.components() == ComponentMask.of(["L0H1", "L1H3", "L1H2.W_K"], GROUPED)


def test_the_repr_is_short():
    assert repr(circuit("embed->L0MLP")) == "EdgeMask(embed->L0MLP)"
    assert "more)" in repr(EdgeMask.of(edges(GROUPED), GROUPED))
