"""Scores of edges: a mapping, a dense tensor, selections, and what can be made of them."""

import pickle

import networkx as nx
import pytest
import torch

from mechunlearn.components import Edge, EdgeMask, EdgeScores, ModelShape, destinations, edges, sources
from mechunlearn.components.edge import edge_mask, place_of
from mechunlearn.intervals import bootstrap_of_others

SHAPE = ModelShape(n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_head=8, d_mlp=64, gated=True)


def random_scores(prompts=6, seed=0):
    mask = edge_mask(SHAPE)
    generator = torch.Generator().manual_seed(seed)
    per_prompt = torch.randn(prompts, *mask.shape, generator=generator).masked_fill(~mask, 0.0)
    return EdgeScores(per_prompt.double().mean(0), mask, SHAPE, "m", "logit_difference", {"seed": seed}, per_prompt)


def test_it_is_a_mapping_from_edges_and_labels():
    scores = EdgeScores.of({"embed->L0MLP": 2.0, "L0H3->L1H1.W_K": -1.0}, SHAPE)
    assert len(scores) == 2
    assert scores["embed->L0MLP"] == 2.0
    assert scores[Edge.parse("L0H3->L1H0.W_K")] == scores["L0H3->L1H1.W_K"] == -1.0
    assert [str(edge) for edge in scores] == ["embed->L0MLP", "L0H3->L1H0.W_K"]
    assert "embed->logits" not in scores
    with pytest.raises(KeyError):
        scores["embed->logits"]


def test_rows_are_sources_and_columns_destinations():
    scores = random_scores()
    for row, source in enumerate(sources(SHAPE)):
        for column, destination in enumerate(destinations(SHAPE)):
            if scores.scored[row, column]:
                assert scores[Edge(source, destination)] == float(scores.tensor[row, column])
    assert scores.edges == tuple(edges(SHAPE))


def test_top_k_takes_the_largest_whatever_the_sign():
    scores = random_scores()
    chosen = scores.top(k=10)
    assert len(chosen) == 10
    assert min(abs(scores[e]) for e in chosen) >= max(abs(scores[e]) for e in scores if e not in chosen)
    negative = scores.top(k=5, by=torch.neg)
    assert max(scores[e] for e in negative) <= min(scores[e] for e in scores if e not in negative)


def test_top_fraction_rounds_up_and_threshold_includes_the_threshold():
    scores = EdgeScores.of(dict(zip(edges(SHAPE), [3.0, -2.0, 1.0], strict=False)), SHAPE)
    assert len(scores.top(fraction=0.34)) == 2
    assert {scores[e] for e in scores.top(threshold=2.0)} == {3.0, -2.0}


def test_ties_go_to_the_edge_that_comes_first_in_the_model():
    some = edges(SHAPE)[10:40]
    scores = EdgeScores.of(dict.fromkeys(reversed(some), 1.0), SHAPE)
    assert list(scores.top(k=7)) == some[:7]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "expected exactly one of k, fraction and threshold, got none"),
        ({"k": 1, "threshold": 0.1}, "expected exactly one of"),
        ({"k": 0}, r"k must lie in 1\.\.3 .*, got 0"),
        ({"k": 4}, r"k must lie in 1\.\.3 .*, got 4"),
        ({"fraction": 0.0}, r"fraction must lie in \(0, 1\].*, got 0.0"),
        ({"threshold": 9.0}, "expected a rule that selects at least one edge.*highest rank is 3"),
    ],
)
def test_a_selection_out_of_range_is_refused(rule, message):
    scores = EdgeScores.of(dict(zip(edges(SHAPE), [3.0, -2.0, 1.0], strict=False)), SHAPE)
    with pytest.raises(ValueError, match=message):
        scores.top(**rule)


def test_nodes_are_signed_sums_over_destinations():
    scores = random_scores()
    nodes = scores.nodes()
    assert len(nodes) == 2 * 5
    for component, value in nodes.items():
        assert value == pytest.approx(sum(v for e, v in scores.items() if e.source == component), abs=1e-12)
    assert nodes.per_prompt is not None
    assert torch.allclose(nodes.per_prompt.double().mean(0), nodes.tensor, atol=1e-6)


def test_nodes_are_those_with_a_scored_edge():
    scores = EdgeScores.of({"embed->L0MLP": 1.0, "L0H1->logits": 2.0, "L0H1->L1MLP": -0.5}, SHAPE)
    assert {str(c): v for c, v in scores.nodes().items()} == {"L0H1": 1.5}
    with pytest.raises(ValueError, match="expected an edge from a head or an MLP, got edges from the embedding only"):
        EdgeScores.of({"embed->L0MLP": 1.0}, SHAPE).nodes()


def test_intervals_are_those_of_single_edges():
    scores = random_scores(prompts=20)
    frame = scores.interval(draws=500)
    assert list(frame.index) == [str(edge) for edge in scores]
    assert (frame["low"] <= frame["score"]).all()
    assert (frame["score"] <= frame["high"]).all()
    nodes = EdgeScores.of({"L1MLP->logits": 0.0}, SHAPE)
    with pytest.raises(ValueError, match="expected scores with per-prompt values"):
        nodes.interval()


def test_an_interval_is_about_two_standard_errors_to_each_side():
    scores = random_scores(prompts=200)
    row, column = scores.scored.nonzero()[7].tolist()
    values = scores.per_prompt[:, row, column]
    ends = scores.interval().iloc[7]
    assert ends["high"] - ends["low"] == pytest.approx(2 * 1.96 * float(values.std()) / 200**0.5, rel=0.1)


def test_the_interval_of_other_prompts_is_that_of_the_edges_components():
    """`test_intervals.py` says what it contains; here: the right column, and wider."""
    scores = random_scores(prompts=20)
    frame = scores.interval(others=20, draws=500)
    for edge in scores.edges[:3]:
        row, column = place_of(edge, SHAPE)
        low, high = bootstrap_of_others(scores.per_prompt[:, row, column], 20, draws=500)
        assert frame.loc[str(edge), ["low", "high"]].tolist() == pytest.approx([float(low), float(high)])
    plain = scores.interval(draws=500)
    widths = (frame["high"] - frame["low"]) / (plain["high"] - plain["low"])
    assert 1.4 < widths.mean() < 1.7


def test_the_frame_lists_every_edge_largest_first():
    frame = random_scores().to_frame()
    assert list(frame.columns) == ["source", "destination", "score"]
    assert len(frame) == len(edges(SHAPE))
    assert frame["score"].abs().is_monotonic_decreasing


def test_paths_of_the_graph_are_those_of_the_model():
    scores = EdgeScores.of({"embed->L0H1.W_V": 1.0, "L0H1->L1H3.W_K": 2.0, "L1H2->logits": 3.0}, SHAPE)
    graph = scores.to_graph()
    assert graph["L0H1"]["L1H2.W_K"]["score"] == 2.0
    assert "score" not in graph["L1H2.W_K"]["L1H2"]
    assert nx.has_path(graph, "embed", "logits"), "through the KV head that L1H2 and L1H3 share"
    assert nx.is_directed_acyclic_graph(random_scores().to_graph())


def test_a_circuit_has_a_graph_of_its_own():
    scores = random_scores()
    chosen = scores.top(k=5)
    assert sum("score" in data for *_, data in scores.to_graph(chosen).edges(data=True)) == 5


def test_the_plot_shows_every_edge_and_leaves_the_others_out():
    figure = random_scores().plot()
    heat = figure.data[0]
    assert list(heat.y) == [str(source) for source in sources(SHAPE)]
    assert list(heat.x) == [str(destination) for destination in destinations(SHAPE)]
    assert sum(value is not None for row in heat.z for value in row) == len(edges(SHAPE))


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="expected finite scores, got NaN or infinity at embed->L0MLP"):
        EdgeScores.of({"embed->L0MLP": float("nan")}, SHAPE)


def test_edges_that_do_not_exist_are_refused():
    mask = torch.ones_like(edge_mask(SHAPE))
    with pytest.raises(ValueError, match="expected scores of real edges"):
        EdgeScores(torch.zeros(mask.shape), mask, SHAPE, "m")
    with pytest.raises(ValueError, match=r"expected scores of shape \(11, 19\)"):
        EdgeScores(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), SHAPE, "m")


def test_top_says_where_it_comes_from():
    chosen = random_scores().top(k=3)
    assert isinstance(chosen, EdgeMask)
    assert chosen.provenance["method"] == "m"
    assert chosen.provenance["top"] == {"k": 3}


def test_a_circuit_is_sent_to_another_process_and_combines_with_sets_on_either_side():
    circuit = EdgeMask.of(["embed->L0MLP", "L0H3->L1H1.W_K"], SHAPE)
    sent = pickle.loads(pickle.dumps(circuit))
    assert (sent, dict(sent.provenance)) == (circuit, dict(circuit.provenance))
    edge, other = Edge.parse("embed->L0MLP"), Edge.parse("embed->logits")
    assert set({edge, other} - circuit) == {other}
    assert set({edge, other} & circuit) == {edge}
    assert {edge, other} | circuit == circuit | {edge, other}
    assert {edge, other} ^ circuit == circuit ^ {edge, other}
    assert all(isinstance(made, EdgeMask) for made in ({other} - circuit, {other} | circuit))
