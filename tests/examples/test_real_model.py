"""`make real` cut short, on the shipped model in place of SmolLM2."""

import sys
from pathlib import Path

import pytest
import real_model

import mechunlearn as mu

pytestmark = pytest.mark.nightly


def test_it_localizes_edits_and_saves_what_it_says(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr(mu.testbed, "smollm2", mu.testbed.load)
    monkeypatch.setattr(real_model, "FORMATS", ("two-shot question", "kept, language"))
    monkeypatch.setattr(real_model, "MLPS", 2)
    monkeypatch.setattr(sys, "argv", ["real_model.py", "--out", str(tmp_path / "out"), "--steps", "2"])
    real_model.main()
    said = capsys.readouterr().out
    for row in ("original", "attribution", "integrated gradients", "tracing", "fact lookup", "random"):
        assert f"| {row} |" in said
    saved = {"trace.html", "integrated_gradients.html", "fact_lookup.html", "report.html", "report.json"}
    assert saved <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "trace.html" in said.split("Saved ")[1]
