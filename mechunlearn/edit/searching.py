"""The same search for every localization, on facts that no reported number uses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeAlias

from tqdm.auto import tqdm

from mechunlearn import files
from mechunlearn.components import ComponentMask
from mechunlearn.edit.finetuning import finetune
from mechunlearn.edit.paper import PAPER_STAGES
from mechunlearn.identity import digest, identified, key_of, name_of
from mechunlearn.model import Model, fingerprint
from mechunlearn.tasks.splits import Validation
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, Editor, checked_edit, select

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Trial:
    """One edit with one choice of options, and its score on the validation facts."""

    mask: str
    """Name of the localization."""
    stage: int
    """Counted from 1."""
    options: Mapping[str, Any]
    score: float | None
    """Higher is better; None where the trial failed."""
    failure: str | None
    """Why it has no score: how the training diverged."""


@dataclass(frozen=True, eq=False, repr=False)
class Search:
    """Every trial, equally many for each localization, and the edit that its best options make."""

    trials: tuple[Trial, ...]
    edits: Mapping[str, Edit]
    """Localization -> edit of the final task with the best options."""
    failures: Mapping[str, str]
    """Localization -> why it has no edit."""

    @property
    def best(self) -> dict[str, Mapping[str, Any]]:
        """Localization -> the options with the highest score (the first of equals); none where every trial failed."""
        names = dict.fromkeys(trial.mask for trial in self.trials)
        best = {name: _best([trial for trial in self.trials if trial.mask == name]) for name in names}
        return {name: trial.options for name, trial in best.items() if trial is not None}

    @property
    def table(self) -> "DataFrame":
        """A row for each trial: mask, stage, a column for each option, score, failure."""
        from pandas import DataFrame

        rows = [{**vars(trial), **trial.options} for trial in self.trials]
        options = dict.fromkeys(name for trial in self.trials for name in trial.options)
        columns = ["mask", "stage", *options, "score", "failure"]
        return DataFrame(rows).astype({"score": float}).reindex(columns=columns)

    def __repr__(self) -> str:
        count = len(self.trials) // len({trial.mask for trial in self.trials})
        return f"Search({count} trials for each localization; best: {self.best}; without an edit: {[*self.failures]})"


def search(
    model: Model,
    validation: Validation,
    masks: Mapping[str, ComponentMask],
    *,
    score: "Score",
    edit: Editor = finetune,
    stages: Sequence[Mapping[str, Sequence[Any]]] = PAPER_STAGES,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Search:
    """Try the same options for every localization, choose the best for each, and make the edit with them.

    - `validation`: from `tasks.validation_split(task)`. Trials are edited and scored on `validation.trials` alone, the
      edits that come back are made on `validation.final`, for which numbers may be reported.
    - `score(model, task)`: a number, higher is better, of the edited model; `task.formats` hold the validation facts.
    - `edit`: any function `(model, task, mask, **options) -> Edit`.
    - `stages`: option -> values to try. All combinations of a stage are tried, with the best options so far for those
      that it leaves out (where all failed, the first value of each). Default: `PAPER_STAGES` of Guo et al. 2025
      (https://arxiv.org/abs/2410.12949), six learning rates, then six coefficients; `PAPER_PRODUCT` is all 36. Their
      rates suit models of 7B to 9B; the shipped model takes some hundred times those.
    - `folder`: a search that is called again goes on from the results there. It knows functions by their own code and
      bound values: when you change a function that one calls, take another folder.

    Every localization gets the same number of trials. One that diverges (FloatingPointError, or a score that is not
    finite) counts; if none is left, or the last edit diverges, the localization is in `failures`.

    Cost: an edit and its score for each combination, and one more edit for each localization. ValueError for no masks
    or stages, a grid without values, masks of another model, and with a folder for an iterator or an `object()`.
    """
    _check(model, masks, stages)
    if folder is not None:
        identified([grid[name] for grid in stages for name in grid])
    tried = Trials.of(model, validation.trials, edit, score, folder)
    trials: list[Trial] = []
    count = len(masks) * sum(len(_points(grid)) for grid in stages)
    with tqdm(total=count, desc="search", disable=not progress, leave=False) as bar:
        for stage, grid in enumerate(stages, 1):
            for name, mask in masks.items():
                # The best options so far, or the first ones tried where all trials failed.
                own = [trial for trial in trials if trial.mask == name]
                first = [trial for trial in own if trial.stage == stage - 1][:1]
                start = next((trial.options for trial in (_best(own), *first) if trial is not None), {})
                for point in _points(grid):
                    options = {**start, **point}
                    trials.append(Trial(name, stage, options, *tried.outcome(mask, options)))
                    bar.update()
    return _finished(tried, validation.final, masks, trials)


def _finished(tried: "Trials", task: Task, masks: Mapping[str, ComponentMask], trials: Sequence[Trial]) -> Search:
    """The trials with the edits that the best options of each localization make of the final task."""
    edits: dict[str, Edit] = {}
    failures: dict[str, str] = {}
    for name, mask in masks.items():
        own = [trial for trial in trials if trial.mask == name]
        chosen = _best(own)
        if chosen is None:
            failures[name] = f"all {len(own)} trials failed, the last so: {own[-1].failure}"
            continue
        try:
            edit = tried.final(task, mask, chosen.options)
            options = {option: str(value) for option, value in chosen.options.items()}
            how = {"trials": len(own), "options": options, "score": chosen.score}
            edits[name] = replace(edit, provenance={**edit.provenance, "search": how})
        except FloatingPointError as error:
            failures[name] = f"with the best options, on the final task: {error}"
    return Search(tuple(trials), edits, failures)


def _points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def _best(trials: Sequence[Trial]) -> Trial | None:
    scored = [(trial.score, trial) for trial in trials if trial.score is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def _check(model: Model, masks: Mapping[str, ComponentMask], stages: Sequence[Mapping[str, Sequence[Any]]]) -> None:
    if not masks or not stages:
        what = "masks" if not masks else "stages"
        raise ValueError(f"expected at least one of {what}, got none: pass a mapping of names to masks, and grids.")
    for mask in masks.values():
        select(model, mask)
    empty = [name for grid in stages for name, values in grid.items() if len(values) == 0]
    if empty or not all(stages):
        raise ValueError(f"expected values to try for each option of each stage, got none for {empty or 'a stage'}.")


Score: TypeAlias = Callable[[Model, Task], SupportsFloat]
"""`(model, task) -> number`, higher is better."""

Outcome: TypeAlias = tuple[float | None, str | None]
"""The score of a trial, or why it has none."""


def trials(folder: str | Path) -> "DataFrame":
    """The trials that searches have kept in a folder: a column for each option, score, failure, components.

    The rows are in no particular order.
    """
    from pandas import DataFrame

    stored = [files.read(path, "Trial") for path in sorted(Path(folder).glob("trial-*.json"))]
    rows = [{**trial, **trial["options"], "components": " ".join(trial["components"])} for trial in stored]
    options = dict.fromkeys(name for trial in stored for name in trial["options"])
    return DataFrame(rows, columns=[*options, "score", "failure", "components"])


@dataclass(frozen=True, eq=False)
class Trials:
    """Makes and scores edits of a model; each once, also across runs where there is a folder."""

    model: Model
    task: Task
    edit: Editor
    score: Score
    folder: Path | None
    common: Mapping[str, Any]
    """Digests of the model, task, editor and score, which tell this search's trials from others in the folder."""
    known: dict[str, Outcome] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, task: Task, edit: Editor, score: Score, folder: str | Path | None) -> "Trials":
        if folder is None:
            return cls(model, task, edit, score, None, {})
        common = {"model": fingerprint(model), "task": _asked(task)}
        common |= {"edit": identified(edit), "score": identified(score)}
        Path(folder).mkdir(parents=True, exist_ok=True)
        return cls(model, task, edit, score, Path(folder), common)

    def outcome(self, mask: ComponentMask, options: Mapping[str, Any]) -> Outcome:
        """The outcome of the edit with these options; from memory or the folder if it was made before."""
        identity = self.identity(mask, options)
        key = key_of(identity)
        path = None if self.folder is None else self.folder / f"trial-{key}.json"
        if key not in self.known and path is not None and path.exists():
            content = files.read(path, "Trial")
            self.known[key] = content["score"], content["failure"]
        if key not in self.known:
            score, failure = self._scored(mask, options)
            if path is not None:
                files.write(path, "Trial", {**identity, "score": score, "failure": failure})
            self.known[key] = score, failure
        return self.known[key]

    def final(self, task: Task, mask: ComponentMask, options: Mapping[str, Any]) -> Edit:
        """The edit with these options on another task; from the folder if it was made before."""
        if self.folder is None:
            return self._edited(task, mask, options)
        key = key_of({**self.identity(mask, options), "task": _asked(task)})
        path = self.folder / f"edit-{key}.safetensors"
        if not path.exists():
            self._edited(task, mask, options).save(path)
        return Edit.load(path)

    def identity(self, mask: ComponentMask, options: Mapping[str, Any]) -> dict[str, Any]:
        shown = {name: self._identified(value) for name, value in options.items()}
        return {**self.common, "components": [str(component) for component in mask], "options": shown}

    def _identified(self, value: Any) -> Any:
        try:
            return identified(value)
        except ValueError:
            if self.folder is not None:
                raise
            return id(value)  # in this process it is itself and no other

    def _edited(self, task: Task, mask: ComponentMask, options: Mapping[str, Any]) -> Edit:
        return checked_edit(self.edit(self.model, task, mask, **options), self.edit)

    def _scored(self, mask: ComponentMask, options: Mapping[str, Any]) -> Outcome:
        try:
            edit = self._edited(self.task, mask, options)
        except FloatingPointError as error:
            return None, str(error)
        with edit.applied(self.model):
            value = self.score(self.model, self.task)
        if not isinstance(value, SupportsFloat):
            raise ValueError(
                f"expected a score (model, task) -> number, got {type(value).__name__} from {name_of(self.score)}: "
                f"return one number, such as result.value."
            )
        number = float(value)
        return (number, None) if isfinite(number) else (None, f"the score of the edited model is {number}.")


def _asked(task: Task) -> str:
    """A digest of what the task trains on and asks, whatever it is called and however it was split."""
    return digest(replace(task, name="", splits={}))
