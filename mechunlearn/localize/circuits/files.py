"""Edge scores and circuits in the files of EAP-IG and the MIB circuit track, `.json` and `.pt`."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.arguments import Direction
from mechunlearn.components import EdgeMask, EdgeScores, ModelShape
from mechunlearn.components.edge import edges_where, place_of
from mechunlearn.model import Model, fingerprint, shape
from mechunlearn.model.edges import edges_of, is_parallel

_LETTERS = {"q": "W_Q", "k": "W_K", "v": "W_V"}
_SIGNS = {"noising": -1.0, "denoising": 1.0}
"""The factor from our scores to the file's, in which edges that the model needs are positive."""
_KEYS = ("cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph")


def save_mib(
    path: str | Path,
    scores: EdgeScores,
    model: Model,
    *,
    circuit: EdgeMask | None = None,
    direction: Direction | None = None,
) -> None:
    """Write scores, and a circuit if given, as a file that EAP-IG 2.0 (`Graph.from_json`, `Graph.from_pt`) reads.

    The layout is that of `src/eap/graph.py` in hannamw/EAP-IG from version 2.0 on, which the MIB circuit track
    (Mueller et al. 2025, https://arxiv.org/abs/2504.13151) uses: nodes `input`, `a0.h3`, `m5`, `logits`, edges
    `a0.h3->a2.h1<q>`; `.json`, or `.pt` with tensors [n_forward, n_backward]. The suffix of `path` decides.

    - **Sign**: there, positive = the model needs the edge. Scores of `direction` "noising", in which such edges are
      negative, are written negated, those of "denoising" as they are. Default: the direction in the scores' settings.
    - Edges without a score are written as 0: the format has no other way to say so.
    - The format has keys and values per *query* head. Where query heads share a KV head, its score is divided equally
      among them (their sum is the KV head's, as in an ungrouped model), and an edge of the circuit becomes one to each.
    - A node is in the circuit if edges of the circuit leave it and, except for `input`, enter it.
    - The model's fingerprint and the direction are written too, under keys that other readers ignore.

    ValueError for scores of another model, and for scores without a direction unless one is passed.
    """
    sizes = shape(model)
    direction = scores.settings.get("direction") if direction is None else direction
    if direction not in _SIGNS:
        raise ValueError(
            f"expected scores that say in which direction they were made, got {direction!r} from {scores.method}: pass "
            f'direction="noising" if edges that the model needs score negative, "denoising" if they score positive.'
        )
    for edges in (scores, circuit):
        if edges is not None and edges.shape != sizes:
            raise ValueError(f"expected edges of this model ({sizes}), got those of {edges.shape}: pass their model.")
    columns = _columns(sizes)
    group = torch.tensor(list(columns.values()))
    share = torch.bincount(group, minlength=scores.tensor.shape[1])[group]
    values = _SIGNS[direction] * (scores.tensor[:, group] / share).float() + 0.0  # adding 0 turns -0.0 into 0.0
    chosen = torch.zeros_like(values, dtype=torch.bool) if circuit is None else circuit.tensor[:, group]
    record = {"cfg": _cfg(model), "fingerprint": fingerprint(model), "direction": direction}
    record |= {"edges_scores": values, "edges_in_graph": chosen}
    entered = {name.split("<")[0] for name, on in zip(columns, chosen.any(0).tolist(), strict=True) if on}
    inside = torch.tensor([name == "input" or name in entered for name in _sources(sizes)]) & chosen.any(1)
    record |= {"src_nodes": _sources(sizes), "dst_nodes": list(columns), "nodes_in_graph": inside}
    if _suffix(path) == ".pt":
        torch.save(record, path)
    else:
        real = edges_of(model)[:, group]
        Path(path).write_text(json.dumps(_as_json(record, real)))


def load_mib(path: str | Path, model: Model, *, direction: Direction | None = None) -> tuple[EdgeScores, EdgeMask]:
    """The scores and the circuit of a file of EAP-IG or the MIB circuit track, for this model.

    See `save_mib` for the format. Nothing in the file is executed.

    - In the file, edges that the model needs are positive. Here they have the sign of `direction`: negative in
      "noising", so that `by=torch.neg` ranks them first, positive in "denoising". Default: the direction that
      `save_mib` wrote into the file, else "noising".
    - Scores of query heads that share a KV head add up; an edge is in the circuit if it is for any of them.
    - If the file has only scores, the circuit is empty. Scores of nodes are left out.

    ValueError for a file that is damaged, selects neurons, or is of another model: of another shape or, if `save_mib`
    wrote it, of other weights.
    """
    sizes = shape(model)
    record = _read_pt(path) if _suffix(path) == ".pt" else _read_json(path, sizes)
    _check(record, model, path)
    group, real = torch.tensor(list(_columns(sizes).values())), edges_of(model)
    empty = torch.zeros(real.shape, dtype=torch.float64)
    values = empty.index_add(1, group, record["edges_scores"].double())
    listed = record.get("listed", real[:, group])
    scored = empty.index_add(1, group, listed.double()) > 0
    chosen = empty.index_add(1, group, record["edges_in_graph"].double()) > 0
    lacking = (record["edges_scores"] != 0) & ~real[:, group]
    if bool(((chosen | scored) & ~real).any()) or bool(lacking.any()):
        raise _of_another_model(path, "it has edges that this model does not have")
    direction = record.get("direction", "noising") if direction is None else direction
    if direction not in _SIGNS:
        raise ValueError(
            f'expected direction "noising" or "denoising", got {direction!r} for {path}: pass one of them.'
        )
    values = _SIGNS[direction] * values + 0.0
    settings = {"file": Path(path).name, "direction": direction}
    circuit = EdgeMask(frozenset(edges_where(chosen, sizes)), sizes, {"method": "load_mib", **settings})
    return EdgeScores(values, scored, sizes, "load_mib", "", settings), circuit


def _cfg(model: Model) -> dict[str, Any]:
    sizes = shape(model)
    cfg = {"n_layers": sizes.n_layers, "n_heads": sizes.n_heads, "d_model": sizes.d_model}
    return cfg | {"parallel_attn_mlp": is_parallel(model)}


def _sources(sizes: ModelShape) -> list[str]:
    layers = range(sizes.n_layers)
    return ["input", *(name for i in layers for name in [*(f"a{i}.h{h}" for h in range(sizes.n_heads)), f"m{i}"])]


def _columns(sizes: ModelShape) -> dict[str, int]:
    """The file's destinations, layer after layer, and the column of each in `EdgeScores.tensor`."""
    labels: dict[str, str] = {}
    for layer in range(sizes.n_layers):
        for letter, matrix in _LETTERS.items():
            labels |= {f"a{layer}.h{head}<{letter}>": f"L{layer}H{head}.{matrix}" for head in range(sizes.n_heads)}
        labels[f"m{layer}"] = f"L{layer}MLP"
    labels["logits"] = "logits"
    return {name: place_of(f"embed->{label}", sizes)[1] for name, label in labels.items()}


def _as_json(record: dict[str, Any], real: Bool[Tensor, "source entry"]) -> dict[str, Any]:
    nodes = dict(zip(record["src_nodes"], record["nodes_in_graph"].tolist(), strict=True)) | {"logits": True}
    values, chosen = record["edges_scores"].tolist(), record["edges_in_graph"].tolist()
    edges = {
        f"{record['src_nodes'][i]}->{record['dst_nodes'][j]}": {"score": values[i][j], "in_graph": chosen[i][j]}
        for i, j in real.nonzero().tolist()
    }
    known = {key: record[key] for key in ("cfg", "fingerprint", "direction")}
    return known | {"nodes": {n: {"in_graph": on} for n, on in nodes.items()}, "edges": edges}


def _read_pt(path: str | Path) -> dict[str, Any]:
    try:
        record = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged file, or one with more than tensors, makes torch raise
        raise _unreadable(path, f"it holds more than tensors and names, or is damaged: {str(error)[:200]}") from error
    if not isinstance(record, dict) or any(key not in record for key in _KEYS):
        raise _unreadable(path, f"it has no {', '.join(_KEYS)}")
    for key in ("edges_scores", "edges_in_graph"):
        if not isinstance(record[key], Tensor):
            raise _unreadable(path, f"{key} is no tensor but {type(record[key]).__name__}")
    for key in ("src_nodes", "dst_nodes"):
        if not isinstance(record[key], list) or not all(isinstance(name, str) for name in record[key]):
            raise _unreadable(path, f"{key} is no list of names")
    return record


def _read_json(path: str | Path, sizes: ModelShape) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
        cfg, nodes, edges = content["cfg"], content["nodes"], content["edges"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise _unreadable(path, f"no cfg, nodes and edges: {error}") from error
    for key, entries in (("nodes", nodes), ("edges", edges)):
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise _unreadable(path, f"{key} is not one record for each name")
    rows = {name: row for row, name in enumerate(_sources(sizes))}
    columns = {name: column for column, name in enumerate(_columns(sizes))}
    values = torch.zeros(len(rows), len(columns))
    chosen, listed = values.bool(), values.bool()
    for name, entry in edges.items():
        source, _, destination = name.partition("->")
        if source not in rows or destination not in columns:
            raise _of_another_model(path, f"this model has no edge {name}")
        place = rows[source], columns[destination]
        score, inside = entry.get("score"), entry.get("in_graph")
        if not isinstance(score, int | float) or not isinstance(inside, bool):
            raise _unreadable(path, f"edge {name} has no number as score or no true or false as in_graph: {entry}")
        values[place], chosen[place], listed[place] = score, inside, True
    neurons = {"neurons_in_graph": True} if any("neurons" in node for node in nodes.values()) else {}
    names = {"src_nodes": [name for name in nodes if name != "logits"], "dst_nodes": list(columns)}
    names |= {key: content[key] for key in ("fingerprint", "direction") if key in content}
    return {"cfg": cfg, "edges_scores": values, "edges_in_graph": chosen, "listed": listed} | names | neurons


def _check(record: dict[str, Any], model: Model, path: str | Path) -> None:
    sizes, cfg, recorded = shape(model), _cfg(model), record["cfg"]
    if not isinstance(recorded, dict) or any(key not in recorded for key in cfg):
        raise _unreadable(path, f"its cfg has not all of {', '.join(cfg)}: {str(recorded)[:200]}")
    differing = [f"{key}={recorded[key]} (this model: {cfg[key]})" for key in cfg if recorded[key] != cfg[key]]
    if differing:
        raise _of_another_model(path, ", ".join(differing))
    known = record.get("fingerprint")
    if known is not None and known != fingerprint(model):
        raise _of_another_model(path, f"its weights have fingerprint {known} (this model: {fingerprint(model)})")
    sources, destinations = _sources(sizes), list(_columns(sizes))
    expected = len(sources), len(destinations)
    names = sorted(record["src_nodes"]) == sorted(sources), list(record["dst_nodes"]) == destinations
    tensors = record["edges_scores"], record["edges_in_graph"]
    if not all(names) or any(tuple(tensor.shape) != expected for tensor in tensors):
        raise _of_another_model(path, f"its nodes are not this model's, or its tensors not of shape {expected}")
    if record.get("neurons_in_graph") is not None:
        raise ValueError(
            f"expected a circuit of edges, got one that selects neurons of nodes ({path}): it has no counterpart here."
        )


def _suffix(path: str | Path) -> str:
    suffix = Path(path).suffix
    if suffix not in (".json", ".pt"):
        raise ValueError(f"expected a path that ends in .json or .pt, got {str(path)!r}: it decides the format.")
    return suffix


def _of_another_model(path: str | Path, reason: str) -> ValueError:
    return ValueError(f"expected a circuit of this model, got one of another at {path}: {reason}. Pass its own model.")


def _unreadable(path: str | Path, reason: str) -> ValueError:
    return ValueError(
        f"expected a circuit file of EAP-IG 2.0 or the MIB circuit track, got something else at {path} ({reason}); "
        f"nothing was loaded."
    )
