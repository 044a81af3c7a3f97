"""The study of planted facts: places that differ, work that is never done twice, tables from finished work."""

import json
from pathlib import Path

import pandas as pd
import pytest

import mechunlearn as mu

SHAPE = mu.ModelShape(n_layers=10, n_heads=8, n_kv_heads=8, d_model=128, d_head=16, d_mlp=384, gated=True)
FORGET = {"planted": 0.9, "truth": 0.1, "attribution patching": 0.2, "random place": 0.4, "never knew": 0.0}


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """The folder that the script's own modules are found in."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))


def cell(kind: str, seed: int, shift: float = 0.0) -> dict:
    """A finished planting, written by hand: attribution patching is nearer to the truth than the random place."""
    from planted.robustness import tests

    places = {"truth": 1.0, "attribution patching": 0.8, "random place": 0.5}
    rows = [
        {"row": "original" if row == "planted" else row, "test": test, "value": value + shift, "control": 0.05}
        for row, value in FORGET.items()
        for test in tests(0)
    ]
    agreement = {"auroc": 0.8, "auroc_of_weights": 0.7, "precision": 0.6, "chance": 0.2, "covered": 0.5, "seconds": 1.0}
    return {
        "kind": kind,
        "seed": seed,
        "truth": ["L1MLP"],
        "weights": 10,
        "planted": {"facts": 32, "steps": 40, "after": {"question": {"forget": 1.0, "retain": 0.9}}},
        "strangers": {"before": 0.0, "vocabulary": 0.2},
        "localizations": {"attribution patching": agreement},
        "places": {name: {"weights": 10, "auroc": auroc, "covered": auroc} for name, auroc in places.items()},
        "learning_rates": dict.fromkeys(places, 1e-3),
        "tests": rows,
        "seconds": {"plant": 1.0},
    }


@pytest.mark.parametrize("kind", ["single layer", "several layers", "MLPs", "attention", "scattered"])
def test_seeds_of_a_kind_have_different_places_and_the_same_again(kind):
    from planted.places import drawn

    found = [drawn(kind, SHAPE, seed) for seed in range(5)]
    assert len(set(found)) == 5
    assert found[3] == drawn(kind, SHAPE, 3)
    assert len({mask.n_parameters for mask in found}) == 1


def test_more_seeds_than_places_are_refused():
    from planted.places import drawn

    with pytest.raises(ValueError, match="expected a seed below 7, as many places as 'single layer' has, got 7"):
        drawn("single layer", SHAPE, 7)


@pytest.mark.parametrize("kind", ["attention", "scattered"])
def test_the_random_place_is_as_large_as_the_truth_and_nowhere_in_it(kind):
    from planted.cell import elsewhere
    from planted.places import drawn

    model = mu.testbed.load()
    truth = drawn(kind, mu.shape(model), 0)
    found = elsewhere(truth, model, 0)
    assert found.n_parameters == truth.n_parameters
    assert mu.shape(model).n_parameters({*found, *truth}) == 2 * truth.n_parameters


def test_a_finished_planting_is_not_computed_again(tmp_path, monkeypatch):
    from planted import cell as work

    calls = []
    monkeypatch.setattr(work, "computed", lambda folder, kind, seed: calls.append(kind) or {"kind": kind, "seed": seed})
    work.finish(tmp_path, "several layers", 1)
    assert work.finish(tmp_path, "several layers", 1) == "was finished"
    assert calls == ["several layers"]
    assert [path.name for path in tmp_path.iterdir()] == ["several_layers_1.json"]


def test_work_that_was_killed_leaves_nothing_that_counts_as_finished(tmp_path, monkeypatch):
    from planted import cell as work

    def killed(folder, kind, seed):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "computed", killed)
    with pytest.raises(KeyboardInterrupt):
        work.finish(tmp_path, "MLPs", 0)
    assert not list(tmp_path.iterdir())


def test_tables_have_every_planting_and_name_those_that_failed(tmp_path, monkeypatch):
    from planted import cell as work
    from planted import figure, tables

    monkeypatch.setattr(figure, "write_pngs", lambda figures: "no browser was found")
    for seed, shift in ((0, 0.0), (1, 0.1)):
        work.path_of(tmp_path, "MLPs", seed).write_text(json.dumps(cell("MLPs", seed, shift)))
    failed = {"kind": "MLPs", "seed": 2, "truth": ["L9MLP"], "weights": 10, "failed": "got trained prompt 0.5"}
    work.path_of(tmp_path, "MLPs", 2).write_text(json.dumps(failed))
    tables.write(tmp_path, tmp_path / "out", ["MLPs"], 3)
    robust = pd.read_csv(tmp_path / "out" / "robustness.csv")
    page = (tmp_path / "out" / "planted.md").read_text()
    chosen = robust[(robust["place"] == "random place") & (robust["seed"] == 1)].iloc[0]
    assert chosen["other formats"] == pytest.approx(0.5)
    assert chosen["relearned, less nobody"] == pytest.approx(0.45)
    assert chosen["probes, less never knew"] == pytest.approx(0.4)
    assert len(pd.read_csv(tmp_path / "out" / "plantings.csv")) == 3
    assert "2 plantings; the components could not take the facts up in 1." in page
    assert "L9MLP: got trained prompt 0.5" in page
    assert "| auroc | forget | -1.00 [-1.00, -1.00] |" in page  # nearer to the truth, less is left
    assert "0.45 [0.40, 0.50]" in page
    assert "| truth | 2 | -0.30 [-0.30, -0.30] |" in page  # less than in the random place
    assert "<html>" in (tmp_path / "out" / "planted.html").read_text()[:200]
