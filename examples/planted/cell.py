"""One planting: plant, localize, erase where each localization says, and attack. A finished one is a file."""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mechunlearn as mu
from planted.facts import another_twin, tasks, twin
from planted.localizations import EDITED, methods
from planted.places import drawn
from planted.robustness import RATES, STEPS, erased, tests

NEVER = "never knew"


def path_of(folder: Path, kind: str, seed: int) -> Path:
    return folder / f"{kind.replace(' ', '_')}_{seed}.json"


def finish(folder: Path, kind: str, seed: int) -> str:
    """Compute what is missing of this planting, write it in one go, and say how long it took."""
    torch.set_num_threads(1)
    path, started = path_of(folder, kind, seed), time.perf_counter()
    if path.exists():
        return "was finished"
    try:
        content = computed(folder, kind, seed)
    except mu.testbed.NotPlantedError as problem:  # a finding, and the same when tried again
        truth = drawn(kind, mu.shape(twin()), seed)
        about = {"truth": [str(component) for component in truth], "weights": truth.n_parameters}
        content = {"kind": kind, "seed": seed, **about, "failed": str(problem)}
    partial_path = path.with_suffix(".part")
    partial_path.write_text(json.dumps(content, indent=1) + "\n")
    partial_path.rename(path)
    return f"{time.perf_counter() - started:.0f} s"


def computed(folder: Path, kind: str, seed: int) -> dict[str, Any]:
    model, (task, strangers) = twin(), tasks(seed)
    truth = drawn(kind, mu.shape(model), seed)
    clock, before = Clock(), mu.evaluate.accuracy(model, strangers)
    planted = _planted(folder / f"{kind.replace(' ', '_')}_{seed}.safetensors", task, truth, seed)
    seconds = {"plant": clock.lap()}
    with planted.applied(model):
        stranger = mu.evaluate.accuracy(model, strangers)
        places, agreements = _localized(model, task, truth, seed)
        seconds["localize"] = clock.lap()
        masks = {"truth": truth, **places, "random place": elsewhere(truth, model, seed)}
        edits = {name: erased(model, task, mask, seed=seed) for name, mask in masks.items()}
        seconds["edit"] = clock.lap()
        report = mu.evaluate.compare(
            model, task, edits, metrics=tests(seed), controls={NEVER: another_twin()}, progress=False
        )
        seconds["evaluate"] = clock.lap()
    wrong = [f"{each.row}, {each.test}: {each.error}" for each in report.cells if each.result is None]
    if wrong:
        raise RuntimeError(f"{len(wrong)} tests failed, the first: {wrong[0]}")
    return {
        "kind": kind,
        "seed": seed,
        "truth": [str(component) for component in truth],
        "weights": truth.n_parameters,
        "planted": dict(planted.provenance["planted"]),
        "strangers": {"before": before.vocabulary.value, "vocabulary": stranger.vocabulary.value},
        "localizations": agreements,
        "places": {name: _place(mask, truth) for name, mask in masks.items()},
        "learning_rates": {name: edit.provenance["learning_rate"] for name, edit in edits.items()},
        "tests": json.loads(report.to_frame().drop(columns="seconds").to_json(orient="records")),
        "settings": {"edit steps": STEPS, "edit learning rates": RATES, "plant": _plain(planted.provenance)},
        "versions": {name: version(name) for name in ("mechunlearn", "torch", "transformer_lens")},
        "seconds": seconds,
    }


def elsewhere(truth: mu.ComponentMask, model: Any, seed: int) -> mu.ComponentMask:
    """A random place of the same kinds of components, none of them the truth's."""
    drawn_masks = (mu.localize.random_like(truth, model, 1000 * seed + i) for i in range(1000))
    return next(mask for mask in drawn_masks if not mask & truth)


class Clock:
    """CPU seconds of this process since the last lap."""

    def __init__(self) -> None:
        self.last = time.process_time()

    def lap(self) -> float:
        before, self.last = self.last, time.process_time()
        return round(self.last - before, 1)


def _planted(path: Path, task: mu.Task, truth: mu.ComponentMask, seed: int) -> mu.Edit:
    """Kept in a file, since it takes longest."""
    if not path.exists():
        mu.testbed.plant(twin(), task, truth, seed=seed, progress=False).save(path)
    return mu.Edit.load(path)


def _localized(
    model: Any, task: mu.Task, truth: mu.ComponentMask, seed: int
) -> tuple[dict[str, mu.ComponentMask], dict[str, dict[str, Any]]]:
    """The places to edit, and how well each localization agrees with the truth."""
    places, agreements = {}, {}
    for name, method in methods(seed, another_twin()).items():
        clock = Clock()
        try:
            found = method(model, task)
        except ValueError as problem:  # such as a lookup that finds no extraction heads above an MLP
            agreements[name] = {"failed": str(problem)}
            continue
        agreements[name] = {**vars(mu.testbed.agreement(found, truth)), "seconds": clock.lap(), "failed": ""}
        if name in EDITED and isinstance(found, mu.ComponentScores):
            places[name] = mu.testbed.within(found, truth.n_parameters)
    return places, agreements


def _place(mask: mu.ComponentMask, truth: mu.ComponentMask) -> dict[str, Any]:
    agreement = mu.testbed.agreement(mask, truth)
    found = {"components": [str(c) for c in mask], "weights": mask.n_parameters}
    return found | {"auroc": agreement.auroc, "covered": agreement.covered}


def _plain(provenance: Any) -> dict[str, Any]:
    return {name: value for name, value in provenance.items() if name not in ("planted", "versions")}
