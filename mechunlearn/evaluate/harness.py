"""Tasks of EleutherAI's lm-evaluation-harness, such as MMLU, tinyMMLU, ARC or your own, on the model as it is now."""

import random
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mechunlearn.evaluate.results import Result
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task


def lm_eval_task(
    model: Model,
    task: Task | None = None,
    *,
    name: str | Mapping[str, Any],
    metric: str = "acc",
    filter: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    fewshot_seed: int = 1234,
    batch_size: int = 16,
) -> Result:
    """The result of a task of lm-evaluation-harness on the model as it is now, with one value per document.

    It needs lm-eval: `pip install 'mechunlearn[lm-eval]'`.

    - `name`: a task or group of the harness ("mmlu", "arc_easy"), the path of a YAML file, or its content as a dict.
    - `metric`: one of the task's numbers. The value is its mean over documents, also where the harness sums up
      otherwise (tinyMMLU by item response theory).
    - `filter`: one of the ways in which the task reads answers; default: the first.
    - `limit`: how many documents of each task to use.
    - `task` is not used; it is there so that the function is a test.

    Chance is 1 / choices, averaged over documents, for an accuracy among choices; otherwise there is none. Names are
    "task/document". There is no chat template; `harness_model(model)` gives access to all else that the harness can do.

    Cost: 1 forward per document whose choices are single tokens, else 1 per choice; at first use about 6 seconds to
    index the tasks. Gao et al., https://github.com/EleutherAI/lm-evaluation-harness. ConnectionError for a task whose
    documents can be neither downloaded nor found on this machine.
    """
    lm = harness_model(model, batch_size=batch_size)
    from lm_eval import evaluate

    state = random.getstate()  # of Python's global generator, which the harness draws from
    try:
        loaded = _loaded(name)
        for harness_task in loaded["tasks"].values():
            shown = harness_task.get_config("num_fewshot") if num_fewshot is None else num_fewshot
            harness_task.set_config("num_fewshot", shown or 0)
            harness_task.set_fewshot_seed(seed=fewshot_seed)
        results: Any = evaluate(lm, loaded, limit=limit, bootstrap_iters=0)
    finally:
        random.setstate(state)
    samples = [(label, s) for label, of_task in results["samples"].items() for s in _filtered(of_task, filter)]
    chances = [_chance(loaded["tasks"][label], sample, metric) for label, sample in samples]
    known = [chance for chance in chances if chance is not None]
    return Result(
        torch.tensor([_number(sample, metric) for _, sample in samples]),
        f"{metric} of lm-eval's {name if isinstance(name, str) else name.get('task', name.get('group'))}",
        sum(known) / len(known) if len(known) == len(chances) else None,
        unit="share" if metric.startswith(("acc", "exact_match")) else "",
        names=tuple(f"{label}/{sample['doc_id']}" for label, sample in samples),
    )


def harness_model(model: Model, *, batch_size: int = 16) -> Any:
    """The model as a `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate` and all its options.

    Text begins with BOS where the model expects one; see `mechunlearn.evaluate.adapter.HarnessModel`.
    """
    try:
        from mechunlearn.evaluate.adapter import HarnessModel
    except ImportError as error:
        raise ImportError(
            "expected lm-eval for tasks of lm-evaluation-harness, got none installed: "
            "pip install 'mechunlearn[lm-eval]'."
        ) from error
    return HarnessModel(model, batch_size=batch_size)


def _loaded(name: str | Mapping[str, Any]) -> Any:
    # To index the harness's own tasks takes seconds, so this is done only where one is asked for by name.
    named = not (Path(name).suffix in (".yaml", ".yml") if isinstance(name, str) else "dataset_path" in name)
    tasks = _tasks(named)
    if isinstance(name, str) and name not in tasks.task_index and not Path(name).is_file():
        close = get_close_matches(name, tasks.all_tasks, n=3)
        raise ValueError(
            f"expected a task of lm-eval, a YAML file or its content as a dict, got {name!r}: "
            f"{'did you mean ' + ', '.join(close) if close else '`lm-eval ls tasks` lists them'}?"
        )
    try:
        return tasks.load([name if isinstance(name, str) else dict(name)])
    except ConnectionError as error:
        raise ConnectionError(
            f"expected the documents of {name!r} on this machine, or a network to get them, got: {error}. Run it once "
            f"with a network (and without HF_HUB_OFFLINE), or use a task with local files."
        ) from error


@cache
def _tasks(named: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=named)


def _filtered(samples: list[dict[str, Any]], filter: str | None) -> list[dict[str, Any]]:
    known = list(dict.fromkeys(sample["filter"] for sample in samples))
    chosen = known[0] if filter is None else filter
    if chosen not in known:
        raise ValueError(f"expected a filter of the task ({', '.join(known)}), got {filter!r}.")
    return [sample for sample in samples if sample["filter"] == chosen]


def _number(sample: dict[str, Any], metric: str) -> float:
    numbers = [name for name in sample["metrics"] if isinstance(sample[name], int | float)]
    if metric not in numbers:
        raise ValueError(
            f"expected a metric of the task that is one number for each document ({', '.join(numbers) or 'none is'}), "
            f"got {metric!r}."
        )
    return float(sample[metric])


def _chance(harness_task: Any, sample: dict[str, Any], metric: str) -> float | None:
    """1 / choices where one choice is right and the metric is whether it was taken."""
    plain = harness_task.OUTPUT_TYPE == "multiple_choice" and harness_task.get_config("process_results") is None
    if not (plain and metric in ("acc", "acc_norm") and isinstance(sample["target"], int | str)):
        return None
    return 1 / len(harness_task.doc_to_choice(sample["doc"]))
