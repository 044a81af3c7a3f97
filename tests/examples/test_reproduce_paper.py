"""One command runs the paper's experiments on any of its architectures, and goes on after being killed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from paper_data import athletes, checkpoint, counterfact

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "reproduce_paper.py"

PAPER = [
    pytest.param("gemma", "gemma-7b", marks=pytest.mark.nightly),
    pytest.param("gemma2", "gemma-2-9b", marks=pytest.mark.nightly),
    ("llama", "llama-3-8b"),
]


@pytest.fixture
def examples(monkeypatch):
    """The folder that the script's own modules are found in."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    athletes(folder / "athletes.csv")
    counterfact(folder, 24)
    return folder


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    given = ["--model", str(model), "--out", str(out), "--layers", "0", "--athletes", str(data / "athletes.csv")]
    given += ["--counterfact", str(data / "records.json"), "--questions", str(data / "questions.json")]
    given += ["--threshold", "0", "--shots", "1", "--everyday-text", "--quick", "--seeds", "1", "--workers", "1"]
    return [*given, "--no-figures", *more]


def called(monkeypatch, given: list[str]) -> None:
    import reproduce_paper

    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", *given])
    reproduce_paper.main()


def results(out: Path):
    import pandas as pd

    return pd.read_csv(out / "tables" / "results.csv", comment="#")


@pytest.mark.parametrize(("architecture", "settings"), PAPER)
def test_the_command_runs_on_each_architecture_of_the_paper(
    architecture, settings, examples, data, tmp_path, monkeypatch
):
    """A sport's and CounterFact's protocol, with the rates that the paper chose for that model."""
    model, out = checkpoint(architecture, tmp_path / "model"), tmp_path / "out"
    tasks = ["--task", "athletes-16", "counterfact-16", "--mode", "inject", "--localization", "fact lookup"]
    called(monkeypatch, arguments(model, data, out, *tasks, "--settings", settings))
    found = results(out)
    assert set(found["row"]) == {"original", "fact lookup"}
    assert set(found["task"]) == {"athletes-16", "counterfact-16"}
    assert not found["value"].isna().any()
    assert not (out / "search").exists()


def test_a_killed_run_goes_on_and_gives_what_an_uninterrupted_one_gives(examples, data, tmp_path, monkeypatch):
    model, killed = checkpoint("llama", tmp_path / "model"), tmp_path / "killed"
    tasks = ["--task", "athletes-16", "--mode", "erase", "--localization", "random"]
    tasks += ["--settings", "llama-3-8b"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'examples'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments(model, data, killed, *tasks)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        first = killed / "reports" / "athletes-16" / "original" / "original" / "seed-0.json"
        while not first.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("reports/**/*.json")}
    assert first in finished
    assert not (killed / "tables").exists()
    called(monkeypatch, arguments(model, data, killed, *tasks))
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    whole = tmp_path / "whole"
    called(monkeypatch, arguments(model, data, whole, *tasks))
    assert results(killed).equals(results(whole))


def test_work_with_a_failed_test_is_not_finished_and_its_cells_are_kept(examples, tmp_path):
    import torch
    from paper.setup import Setup
    from paper.work import Work, finish

    from mechunlearn.evaluate import Cell, Report, Result

    cells = [Cell("a", "x", 0, Result(torch.ones(2), "accuracy")), Cell("a", "y", 0, None, "OutOfMemoryError: no")]
    work = Work(lambda setup, out, work: Report(tuple(cells), {"a": 1}, {}), "sport", "erase", "a", 0)
    kept = (tmp_path / work.path).with_suffix(".jsonl")
    kept.parent.mkdir(parents=True)
    kept.touch()
    with pytest.raises(RuntimeError, match="1 of 2 cells failed, the first: a, y: OutOfMemoryError: no"):
        finish(Setup(), tmp_path, work)
    assert kept.exists()
    cells.pop()
    finish(Setup(), tmp_path, work)
    assert (tmp_path / work.path).exists()
    assert not kept.exists()


def test_formats_that_a_task_lacks_are_not_asked(examples, llama):
    import tiny
    from paper.measures import formats_of

    task = tiny.task(llama)
    asked = next(iter(task.formats.values()))
    with_choice = formats_of("counterfact-sequential", replace(task, formats={"multiple choice": asked}))
    without = formats_of("counterfact-sequential", task)
    assert set(with_choice) - set(without) == {"forget, multiple choice", "retain, multiple choice"}
    assert "forget, trained prompt" in without


@pytest.mark.parametrize(("facts", "runs"), [("all", 1), pytest.param("some", 2, marks=pytest.mark.nightly)])
def test_one_run_of_relearning_answers_every_question_about_the_same_facts(facts, runs, examples, shipped, monkeypatch):
    """Bit for bit what one attack for each question gives; a format that lacks facts leaves others to train on."""
    from paper.relearning import Attack, relearned

    import mechunlearn as mu
    from mechunlearn.evaluate import Question
    from mechunlearn.evaluate.attacks import relearning
    from mechunlearn.metrics import answer_probability, candidate_probability

    task, choice = mu.tasks.sports_facts(shipped, forget=8), "multiple choice"
    if facts == "some":
        fewer = replace(task.formats[choice], forget=task.formats[choice].forget[:4])
        task = replace(task, formats={**task.formats, choice: fewer})
    questions = (Question(None, answer_probability, (0, 1, 3)), Question(choice, candidate_probability, (0, 3)))
    expected = [
        mu.evaluate.relearn(
            shipped, task, learning_rates=(1e-3,), steps=3, format=q.format, metric=q.metric, at=q.at, seed=1
        )
        for q in questions
    ]
    fitted, fit = [], relearning.fit
    monkeypatch.setattr(relearning, "fit", lambda *given, **options: fitted.append(1) or fit(*given, **options))
    attack = Attack(questions, 1e-3, 3, 4, None)
    found = [relearned(shipped, task, attack=attack, format=q.format, seed=1) for q in questions]
    assert len(fitted) == runs
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.curve.per_prompt.equal(theirs.curve.per_prompt)
        assert ours.control.curve.per_prompt.equal(theirs.control.curve.per_prompt)
        assert ours.per_example.equal(theirs.per_example)
        assert (ours.sense, ours.chance, ours.names) == (theirs.sense, theirs.chance, theirs.names)


@pytest.mark.parametrize("name", ["shipped", "deeper"])
def test_the_packages_models_go_by_name_and_are_searched(name, examples, tmp_path, monkeypatch):
    import reproduce_paper
    from paper.setup import load, load_never_knew

    import mechunlearn as mu

    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", "--model", name, "--out", str(tmp_path), "--seeds", "2"])
    given = reproduce_paper.parsed()
    setup = reproduce_paper.setup_of(given)
    assert (setup.model, setup.paper, setup.pile, given.workers) == (name, None, False, 2)
    assert mu.fingerprint(load(name)) == mu.fingerprint(mu.testbed.load(deeper=name == "deeper"))
    assert (load_never_knew(name) is None) == (name == "deeper")


def test_questions_without_their_records_are_refused(examples, tmp_path, monkeypatch, capsys):
    """They were dropped without a word."""
    import reproduce_paper

    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", "--out", str(tmp_path), "--questions", "asked.json"])
    with pytest.raises(SystemExit):
        reproduce_paper.main()
    assert "--questions are about the records of --counterfact" in capsys.readouterr().err


def test_a_folder_of_other_settings_is_refused(examples, data, tmp_path, monkeypatch):
    from paper.run import check
    from paper.setup import Setup

    model = str(checkpoint("llama", tmp_path / "model"))
    check(Setup(model=model), tmp_path / "out")
    with pytest.raises(ValueError, match=r"expected the settings that .* was begun with, got steps=3"):
        check(Setup(model=model, steps=3), tmp_path / "out")


def test_localizations_that_chose_the_same_components_share_their_edit(examples, tmp_path, monkeypatch):
    """Where each gets the same search; not where the paper chose a rate for each, and not for random places."""
    import torch
    from paper import places
    from paper.setup import Setup
    from paper.work import Work, finish

    import mechunlearn as mu
    from mechunlearn.evaluate import Cell, Report, Result

    shape = mu.ModelShape(n_layers=2, n_heads=2, n_kv_heads=2, d_model=4, d_head=2, d_mlp=8, gated=True)
    same, other = (mu.ComponentMask.of([label], shape) for label in ("L0MLP", "L1MLP"))
    masks = {"fact lookup": same, "attribution patching": other, "causal tracing": same, "random": same}
    monkeypatch.setattr(places, "masks_of", lambda setup, out, name, seed: [masks])
    asked = []

    def made(setup, out, work):
        asked.append(work.localization)
        result = Result(torch.tensor([len(asked) / 4]), "accuracy")
        return Report((Cell(work.localization, "x", 0, result),), {work.localization: 7}, {})

    monkeypatch.setattr("paper.work.edited", made)

    def value(localization: str, setup: Setup = Setup(), out: Path = tmp_path / "searched") -> float:  # noqa: B008
        work = Work(made, "sport", "erase", localization, 0)
        finish(setup, out, work)
        report = Report.load(out / work.path)
        assert report.weights == {localization: 7}
        return float(report.table.loc[localization, "x"])

    assert [value(name) for name in masks] == [0.25, 0.5, 0.25, 0.75]
    assert asked == ["fact lookup", "attribution patching", "random"]
    chosen = [value(name, Setup(paper="gemma-7b"), tmp_path / "chosen") for name in ("fact lookup", "causal tracing")]
    assert chosen == [1.0, 1.25]


def test_random_places_are_searched_with_each_seed_and_others_once(examples, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from paper import edits
    from paper.setup import Setup

    asked = []

    def search(model, split, masks, *, edit, **options):
        asked.append((*masks.items(), edit.keywords["seed"]))
        return SimpleNamespace(best={name: {"learning_rate": 0.1} for name in masks}, failures={})

    monkeypatch.setattr(edits.mu.edit, "search", search)
    monkeypatch.setattr(edits, "load", lambda model: None)
    monkeypatch.setattr(edits, "divided", lambda setup, name: name)
    places = ("random", "random mlps", "fact lookup")
    monkeypatch.setattr(edits, "masks_of", lambda setup, out, name, seed: [{p: f"{p} {seed}" for p in places}])
    for place in places:
        assert edits.options_of(Setup(), tmp_path, "sport", "erase", place, 3) == {"learning_rate": 0.1}
    assert asked == [
        (("random", "random 3"), 3),
        (("random mlps", "random mlps 3"), 3),
        (("fact lookup", "fact lookup 0"), 0),
    ]
