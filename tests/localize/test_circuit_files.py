"""Files of EAP-IG and MIB: what is written can be read back, and anything else is refused."""

import json
from dataclasses import dataclass

import pytest
import tiny
import torch
from conftest import shared
from state import left_as_it_was

import mechunlearn as mu
from mechunlearn.components import EdgeMask, EdgeScores, edges
from mechunlearn.components.edge import edge_mask
from mechunlearn.localize import edge_attribution_patching, edge_faithfulness, edge_patching, load_mib, save_mib
from mechunlearn.model import shape
from mechunlearn.model.edges import is_parallel


def scores_of(model, seed=0):
    mask = edge_mask(shape(model), parallel=is_parallel(model))
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)).double().masked_fill(~mask, 0.0)
    settings = {"direction": "denoising"}  # of the file's own sign
    return EdgeScores(values, mask, shape(model), "made up", "logit_difference", settings)


@pytest.mark.parametrize("suffix", ["json", "pt"])
def test_what_is_written_is_read_back(model, tmp_path, suffix):
    scores = scores_of(model)
    circuit = scores.top(k=20)
    path = tmp_path / f"circuit.{suffix}"
    with left_as_it_was(model):
        save_mib(path, scores, model, circuit=circuit)
        loaded, again = load_mib(path, model)
    assert again == circuit
    assert torch.equal(loaded.scored, scores.scored)
    assert torch.allclose(loaded.tensor, scores.tensor, atol=1e-6)
    assert loaded.method == "load_mib"
    assert loaded.settings == {"file": path.name, "direction": "denoising"}


@pytest.mark.parametrize("suffix", ["json", "pt"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_in_a_file_what_the_model_needs_is_positive(gpt2, tmp_path, suffix, direction):
    """By exact patching: replacing the edge lowers the metric, or restoring it raises it."""
    path = tmp_path / f"circuit.{suffix}"
    scores = edge_patching(gpt2, tiny.prompts(gpt2), edges=["L2MLP->logits", "L2H1->logits"], direction=direction)
    save_mib(path, scores, gpt2)
    written = torch.load(path)["edges_scores"] if suffix == "pt" else json.loads(path.read_text())["edges"]
    for label, (row, name) in {"L2MLP->logits": (-1, "m2"), "L2H1->logits": (-4, "a2.h1")}.items():
        value = float(written[row, -1]) if suffix == "pt" else written[f"{name}->logits"]["score"]
        assert value == pytest.approx((-1 if direction == "noising" else 1) * scores[label], rel=1e-5)
    for wanted in ("noising", "denoising"):
        loaded, _ = load_mib(path, gpt2, direction=wanted)
        assert loaded.settings["direction"] == wanted
        sign = 1 if wanted == direction else -1
        assert loaded["L2MLP->logits"] == pytest.approx(sign * scores["L2MLP->logits"], rel=1e-5)
    assert load_mib(path, gpt2)[0]["L2MLP->logits"] == pytest.approx(scores["L2MLP->logits"], rel=1e-5)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_circuits_by_the_signed_scores_of_a_file_are_better_than_by_their_negative(shipped, tmp_path, direction):
    """MIB's CPR takes the largest scores first."""
    prompts = mu.tasks.sports_facts(shipped, forget="basketball").forget[:3]
    scores = edge_attribution_patching(shipped, prompts, direction=direction, per_prompt=False)
    save_mib(tmp_path / "scores.json", scores, shipped)
    file = load_mib(tmp_path / "scores.json", shipped, direction="denoising")[0]
    options = {"sizes": [0.02], "random_circuits": 0}
    needed = edge_faithfulness(shipped, prompts, {"signed": file}, by=torch.Tensor.clone, **options)
    least = edge_faithfulness(shipped, prompts, {"signed": file}, by=torch.neg, **options)
    assert needed.cpr["signed"] > least.cpr["signed"] + 0.05
    assert needed.at_nominal_sizes().loc["signed", "cpr"] > least.at_nominal_sizes().loc["signed", "cpr"] + 0.05


def test_a_file_of_others_is_read_with_the_sign_of_noising(llama, tmp_path):
    path = tmp_path / "circuit.json"
    save_mib(path, scores_of(llama), llama)
    found = json.loads(path.read_text())
    del found["direction"], found["fingerprint"]
    path.write_text(json.dumps(found))
    loaded = load_mib(path, llama)[0]
    assert loaded.settings["direction"] == "noising"
    assert torch.allclose(loaded.tensor, -scores_of(llama).tensor, atol=1e-6)
    path.write_text(json.dumps(found | {"direction": "up"}))
    with pytest.raises(ValueError, match="expected direction"):
        load_mib(path, llama)


def test_scores_without_a_direction_are_refused(llama, tmp_path):
    with pytest.raises(ValueError, match=r"in which direction they were made, got None from by hand: pass direction="):
        save_mib(tmp_path / "circuit.json", EdgeScores.of({"embed->L0MLP": 1.0}, shape(llama)), llama)
    assert not (tmp_path / "circuit.json").exists()


@pytest.mark.parametrize("suffix", ["json", "pt"])
def test_scores_alone_have_an_empty_circuit(llama, tmp_path, suffix):
    save_mib(tmp_path / f"scores.{suffix}", scores_of(llama), llama)
    assert len(load_mib(tmp_path / f"scores.{suffix}", llama)[1]) == 0


def test_the_json_is_laid_out_as_that_of_eap_ig(gpt2, tmp_path):
    scores = scores_of(gpt2)
    circuit = EdgeMask.of(
        ["embed->L0H3.W_V", "L0H3->L2H1.W_Q", "L2H1->L2MLP", "L2MLP->logits", "L1H0->logits"], shape(gpt2)
    )
    save_mib(tmp_path / "circuit.json", scores, gpt2, circuit=circuit)
    found = json.loads((tmp_path / "circuit.json").read_text())
    assert found["cfg"] == {"n_layers": 3, "n_heads": 4, "d_model": 32, "parallel_attn_mlp": False}
    assert list(found["nodes"])[:6] == ["input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0"]
    inside = {name for name, node in found["nodes"].items() if node["in_graph"]}
    assert inside == {"input", "a0.h3", "a2.h1", "m2", "logits"}, "a1.h0 has no edge into it"
    assert {name for name, edge in found["edges"].items() if edge["in_graph"]} == {
        "input->a0.h3<v>",
        "a0.h3->a2.h1<q>",
        "a2.h1->m2",
        "m2->logits",
        "a1.h0->logits",
    }
    assert len(found["edges"]) == len(edges(shape(gpt2)))
    assert found["edges"]["a0.h3->a2.h1<q>"]["score"] == pytest.approx(scores["L0H3->L2H1.W_Q"], rel=1e-6)


def test_the_tensors_are_laid_out_as_those_of_eap_ig(gpt2, tmp_path):
    scores = scores_of(gpt2)
    save_mib(tmp_path / "circuit.pt", scores, gpt2, circuit=scores.top(k=3))
    found = torch.load(tmp_path / "circuit.pt", weights_only=True)
    n_forward, n_backward = 1 + 3 * 5, 3 * (3 * 4 + 1) + 1
    assert found["edges_scores"].shape == found["edges_in_graph"].shape == (n_forward, n_backward)
    assert found["nodes_in_graph"].shape == (n_forward,)
    assert (len(found["src_nodes"]), len(found["dst_nodes"])) == (n_forward, n_backward)
    # a2.h1<k> is at layer * (3 * heads + 1) + 1 * heads + head, a0.h3 at 1 + layer * (heads + 1) + head
    assert float(found["edges_scores"][1 + 3, 2 * 13 + 4 + 1]) == pytest.approx(scores["L0H3->L2H1.W_K"], rel=1e-6)
    assert found["dst_nodes"][2 * 13 + 4 + 1] == "a2.h1<k>"
    assert float(found["edges_scores"][0, -1]) == pytest.approx(scores["embed->logits"], rel=1e-6)


def test_a_shared_kv_head_is_divided_among_its_query_heads(llama, tmp_path):
    scores = EdgeScores.of({"embed->L1H2.W_K": 3.0, "embed->L1H2.W_Q": 1.0}, shape(llama))
    circuit = EdgeMask.of(["embed->L1H2.W_K"], shape(llama))
    save_mib(tmp_path / "circuit.json", scores, llama, circuit=circuit, direction="denoising")
    found = json.loads((tmp_path / "circuit.json").read_text())["edges"]
    assert [found[f"input->a1.h{head}<k>"] for head in (1, 2, 3)] == [
        {"score": 0.0, "in_graph": False},
        {"score": 1.5, "in_graph": True},
        {"score": 1.5, "in_graph": True},
    ]
    assert found["input->a1.h2<q>"]["score"] == 1.0


def test_an_edge_to_one_query_heads_keys_is_one_to_the_kv_head(llama, tmp_path):
    path = tmp_path / "circuit.json"
    save_mib(path, scores_of(llama), llama)
    found = json.loads(path.read_text())
    found["edges"]["input->a1.h3<k>"] = {"score": 2.0, "in_graph": True}
    found["edges"]["input->a1.h2<k>"] = {"score": -0.5, "in_graph": False}
    path.write_text(json.dumps(found))
    scores, circuit = load_mib(path, llama)
    assert scores["embed->L1H2.W_K"] == 1.5
    assert [str(edge) for edge in circuit] == ["embed->L1H2.W_K"]


def test_edges_that_a_json_leaves_out_have_no_score(llama, tmp_path):
    path = tmp_path / "circuit.json"
    save_mib(path, scores_of(llama), llama)
    found = json.loads(path.read_text())
    found["edges"] = {name: found["edges"][name] for name in ("input->m0", "m0->logits")}
    path.write_text(json.dumps(found))
    assert [str(edge) for edge in load_mib(path, llama)[0]] == ["embed->L0MLP", "L0MLP->logits"]


@pytest.mark.parametrize("suffix", ["json", "pt"])
@pytest.mark.parametrize("change", [{"n_layers": 4}, {"n_heads": 8}, {"d_model": 64}, {"parallel_attn_mlp": True}])
def test_a_file_of_another_model_is_refused(llama, tmp_path, suffix, change):
    path = tmp_path / f"circuit.{suffix}"
    save_mib(path, scores_of(llama), llama)
    if suffix == "pt":
        found = torch.load(path, weights_only=True)
        found["cfg"] |= change
        torch.save(found, path)
    else:
        found = json.loads(path.read_text())
        found["cfg"] |= change
        path.write_text(json.dumps(found))
    key, value = next(iter(change.items()))
    with pytest.raises(
        ValueError, match=f"expected a circuit of this model, got one of another at .*{key}={value} .this model"
    ):
        load_mib(path, llama)


@pytest.mark.parametrize("suffix", ["json", "pt"])
def test_parallel_and_sequential_models_do_not_share_files(gpt2, tmp_path, suffix):
    path = tmp_path / f"circuit.{suffix}"
    save_mib(path, scores_of(gpt2), gpt2)
    with pytest.raises(ValueError, match=r"expected a circuit of this model.*parallel_attn_mlp=False"):
        load_mib(path, shared("bridge", "neox"))


def test_an_edge_that_the_model_lacks_is_refused(llama, tmp_path):
    path = tmp_path / "circuit.json"
    save_mib(path, scores_of(llama), llama)
    for name in ("a7.h0->logits", "m2->m1", "nonsense"):
        found = json.loads(path.read_text())
        found["edges"] = {name: {"score": 1.0, "in_graph": False}}
        (tmp_path / "other.json").write_text(json.dumps(found))
        with pytest.raises(ValueError, match="expected a circuit of this model"):
            load_mib(tmp_path / "other.json", llama)


def test_scores_of_another_model_are_not_written(llama, gpt2, tmp_path):
    with pytest.raises(ValueError, match="expected edges of this model"):
        save_mib(tmp_path / "circuit.json", scores_of(gpt2), llama)
    assert not (tmp_path / "circuit.json").exists()


@pytest.mark.parametrize("suffix", ["json", "pt"])
def test_a_damaged_file_is_refused(llama, tmp_path, suffix):
    path = tmp_path / f"circuit.{suffix}"
    save_mib(path, scores_of(llama), llama)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="expected a circuit file of EAP-IG"):
        load_mib(path, llama)


def test_a_file_of_something_else_is_refused(llama, tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.pt", "other.json"):
        with pytest.raises(ValueError, match="expected a circuit file of EAP-IG"):
            load_mib(tmp_path / name, llama)
    with pytest.raises(ValueError, match=r"expected a path that ends in \.json or \.pt, got 'circuit.txt'"):
        load_mib("circuit.txt", llama)
    with pytest.raises(FileNotFoundError):
        load_mib(tmp_path / "none.pt", llama)


EDGE = "input->m0"
DAMAGED_JSON = {
    "an edge without score": (lambda f: f["edges"][EDGE].pop("score"), "edge input->m0 has no number as score"),
    "an edge without in_graph": (lambda f: f["edges"][EDGE].pop("in_graph"), "edge input->m0 has no .*in_graph"),
    "a score in words": (lambda f: f["edges"][EDGE].update(score="x"), "edge input->m0 has no number as score"),
    "no score": (lambda f: f["edges"][EDGE].update(score=None), "edge input->m0 has no number as score"),
    "in_graph in words": (lambda f: f["edges"][EDGE].update(in_graph="no"), "edge input->m0 has no .*in_graph"),
    "an edge as list": (lambda f: f["edges"].update({EDGE: [1.0, True]}), "edges is not one record for each name"),
    "edges as list": (lambda f: f.update(edges=list(f["edges"])), "edges is not one record for each name"),
    "nodes as list": (lambda f: f.update(nodes=list(f["nodes"])), "nodes is not one record for each name"),
    "a node as number": (lambda f: f["nodes"].update(m0=1), "nodes is not one record for each name"),
}
DAMAGED_PT = {
    "scores as list": (lambda f: f.update(edges_scores=f["edges_scores"].tolist()), "edges_scores is no tensor"),
    "a circuit as list": (lambda f: f.update(edges_in_graph=[True]), "edges_in_graph is no tensor"),
    "no names": (lambda f: f.update(src_nodes=None), "src_nodes is no list of names"),
    "numbers as names": (lambda f: f["dst_nodes"].__setitem__(0, 7), "dst_nodes is no list of names"),
}
DAMAGED_CFG = {
    "cfg as list": (lambda f: f.update(cfg=[3, 4]), "its cfg has not all of n_layers, n_heads"),
    "no cfg": (lambda f: f.update(cfg=None), "its cfg has not all of n_layers, n_heads"),
    "cfg without d_model": (lambda f: f["cfg"].pop("d_model"), "its cfg has not all of n_layers, n_heads"),
    "an empty cfg": (lambda f: f["cfg"].clear(), "its cfg has not all of n_layers, n_heads"),
}


@pytest.mark.parametrize("damage", DAMAGED_JSON | DAMAGED_CFG)
def test_a_damaged_json_is_refused(llama, tmp_path, damage):
    path, (change, match) = tmp_path / "circuit.json", (DAMAGED_JSON | DAMAGED_CFG)[damage]
    save_mib(path, scores_of(llama), llama)
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"expected a circuit file of EAP-IG .*{match}"):
        load_mib(path, llama)


@pytest.mark.parametrize("damage", DAMAGED_PT | DAMAGED_CFG)
def test_a_damaged_pt_is_refused(llama, tmp_path, damage):
    path, (change, match) = tmp_path / "circuit.pt", (DAMAGED_PT | DAMAGED_CFG)[damage]
    save_mib(path, scores_of(llama), llama)
    found = torch.load(path, weights_only=True)
    change(found)
    torch.save(found, path)
    with pytest.raises(ValueError, match=f"expected a circuit file of EAP-IG .*{match}"):
        load_mib(path, llama)


def test_a_pt_with_scores_of_edges_that_the_model_lacks_is_refused(llama, tmp_path):
    """Also where the scores of the query heads that share a KV head cancel."""
    path = tmp_path / "circuit.pt"
    save_mib(path, scores_of(llama), llama)
    for changed in ({("m2", "m0"): 0.5}, {("m1", "a0.h2<k>"): 1.0, ("m1", "a0.h3<k>"): -1.0}):
        found = torch.load(path, weights_only=True)
        for (source, destination), score in changed.items():
            found["edges_scores"][found["src_nodes"].index(source), found["dst_nodes"].index(destination)] = score
        torch.save(found, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"expected a circuit of this model.*edges that this model does not have"):
            load_mib(tmp_path / "other.pt", llama)


@dataclass
class Runs:
    """Would create a file when it is loaded without care."""

    path: str

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_file_does_not_run(llama, tmp_path):
    path, created = tmp_path / "circuit.pt", tmp_path / "created"
    save_mib(path, scores_of(llama), llama)
    found = torch.load(path, weights_only=True)
    torch.save(found | {"surprise": Runs(str(created))}, path)
    with pytest.raises(ValueError, match=r"expected a circuit file .*holds more than tensors"):
        load_mib(path, llama)
    assert not created.exists()


def test_a_circuit_of_neurons_is_refused(llama, tmp_path):
    path = tmp_path / "circuit.pt"
    save_mib(path, scores_of(llama), llama)
    found = torch.load(path, weights_only=True)
    torch.save(found | {"neurons_in_graph": torch.ones(16, 32, dtype=torch.bool)}, path)
    with pytest.raises(ValueError, match="expected a circuit of edges, got one that selects neurons"):
        load_mib(path, llama)


def test_tokens_are_not_needed(tmp_path):
    model = tiny.bridge("qwen2")
    model.tokenizer = None
    save_mib(tmp_path / "circuit.json", scores_of(model), model)
    assert len(load_mib(tmp_path / "circuit.json", model)[0]) == len(edges(shape(model)))


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_a_file_of_another_model_of_the_same_shape_is_refused(llama, tmp_path, suffix):
    other = tiny.bridge("llama", seed=3)
    save_mib(tmp_path / f"circuit{suffix}", scores_of(llama), llama)
    with pytest.raises(ValueError, match=r"got one of another.*its weights have fingerprint \w+ \(this model: \w+\)"):
        load_mib(tmp_path / f"circuit{suffix}", other)
