"""The edits: options by the same search for every localization, or the paper's; then one edit for each seed."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

import mechunlearn as mu
from mechunlearn.metrics import Metric
from paper.facts import PAPER_TASKS, divided, parts
from paper.measures import in_its_sense
from paper.places import Masks, masks_of
from paper.setup import DRAWN, Setup, load


def edit_of(setup: Setup, out: Path, name: str, mode: str, localization: str, seed: int) -> mu.Edit:
    """Fine-tuned where the localization says; from a file where edits are kept."""
    path = out / "edits" / f"{name}, {mode}, {localization}, {seed}.safetensors"
    if path.exists():
        return mu.Edit.load(path)
    if setup.paper is None and seed == _searched_seed(localization, seed):
        edit = _searched(setup, out, name, mode, localization, seed).edits[localization]
    else:
        mask = masks_of(setup, out, name, seed)[0][localization]
        options = options_of(setup, out, name, mode, localization, seed)
        edit = editor(setup, name, mode, seed)(load(setup.model), divided(setup, name).final, mask, **options)
    if setup.keep_edits:
        path.parent.mkdir(exist_ok=True)
        edit.save(path)
    return edit


def sequence_of(
    setup: Setup, out: Path, name: str, mode: str, localization: str, seed: int, after: Any
) -> mu.edit.EditSequence:
    """The parts one after the other, each at the places that were found for it on the original model."""
    options = options_of(setup, out, name, mode, localization, seed)
    edit = partial(editor(setup, name, mode, seed), **options, steps=max(1, setup.steps // 2))
    masks = [found[localization] for found in masks_of(setup, out, name, seed)]
    return mu.edit.sequence(load(setup.model), parts(setup, name), masks, edit=edit, after=after)


def editor(setup: Setup, name: str, mode: str, seed: int) -> partial[mu.Edit]:
    """Everything but where, and what is searched."""
    return partial(
        mu.edit.finetune,
        inject=mode == "inject",
        steps=setup.athletes_steps if name.startswith("athletes") else setup.steps,
        batch_size=setup.batch_size,
        text_batch_size=setup.text_batch_size,
        micro_batch_size=setup.micro_batch_size,
        optimizer=_optimizer(setup),
        seed=seed,
        progress=False,
    )


def options_of(setup: Setup, out: Path, name: str, mode: str, localization: str, seed: int) -> dict[str, Any]:
    """What the search chose with seed 0, for every seed; for a random place, which is another with each seed, with that
    seed. A sequence takes what was chosen for all facts at once, as in the paper. Trials of a search that was
    interrupted are not run again."""
    if setup.paper is not None:
        return _of_the_paper(setup.paper, name, mode, localization)
    chosen = _searched_seed(localization, seed)
    found = _searched(setup, out, name.replace("sequential", "64"), mode, localization, chosen)
    return dict(found.best[localization])


def kept_minus_left(model: Any, task: mu.Task, *, metric: Metric = mu.metrics.candidate_probability) -> float:
    """What a search maximises, on validation facts: accuracy on retained facts minus that on forgotten ones."""
    retain, forget = (
        mu.evaluate.in_format(model, task, side=side, metric=metric).value for side in ("retain", "forget")
    )
    return retain - forget


def learned_mask(setup: Setup, out: Path, name: str, localization: str, seed: int) -> mu.edit.LearnedMask:
    """A weight mask that erases, with the library's defaults: nothing is searched."""
    masks: Masks = masks_of(setup, out, name, seed)[0]
    return mu.edit.learn_weight_mask(
        load(setup.model),
        divided(setup, name).final,
        masks[localization],
        steps=setup.steps,
        batch_size=setup.batch_size,
        text_batch_size=setup.text_batch_size,
        micro_batch_size=setup.micro_batch_size,
        seed=seed,
        progress=False,
    )


def _searched_seed(localization: str, seed: int) -> int:
    return seed if localization in DRAWN else 0


def _searched(setup: Setup, out: Path, name: str, mode: str, localization: str, seed: int) -> mu.edit.Search:
    """Learning rates at coefficient 1, and the edit with that seed by the best."""
    mask = masks_of(setup, out, name, seed)[0][localization]
    found = mu.edit.search(
        load(setup.model),
        divided(setup, name),
        {localization: mask},
        score=in_its_sense(kept_minus_left, name),
        edit=editor(setup, name, mode, seed),
        stages=({"learning_rate": setup.learning_rates},),
        folder=out / "search" / f"{name}, {mode}, {localization}",
        progress=False,
    )
    if localization in found.failures:
        raise FloatingPointError(f"expected options that do not diverge, got none: {found.failures[localization]}")
    return found


def _of_the_paper(model: str, name: str, mode: str, localization: str) -> dict[str, Any]:
    """Rate and coefficient; for erasure those of the workshop version, which has one for all localizations."""
    if mode == "erase":
        return {"learning_rate": 1e-5, "forget_coefficient": 0.2 if name == "sport" else 1.0}
    found = mu.edit.paper_settings(model=model, task=PAPER_TASKS[name], localization=localization)
    return {option: found[option] for option in ("learning_rate", "forget_coefficient")}


def _optimizer(setup: Setup) -> Any:
    return mu.edit.adamw_8bit if setup.paper == "gemma-2-9b" and torch.cuda.is_available() else mu.edit.adamw
