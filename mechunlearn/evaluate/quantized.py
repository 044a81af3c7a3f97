"""Attack: round the weights to few bits, which may undo an edit that moved them little."""

from collections.abc import Mapping

from mechunlearn.evaluate.attacked import Asked, worst_case
from mechunlearn.evaluate.halves import formatted
from mechunlearn.evaluate.result import Result
from mechunlearn.metrics import Metric, candidate_probability
from mechunlearn.model import Model, device_of
from mechunlearn.tasks.task import Task
from mechunlearn.weights.bitsandbytes_rounding import roundings_on
from mechunlearn.weights.rewritten import as_linear, every_entry, from_linear, rewritten
from mechunlearn.weights.rounding import Rounding


def quantized(
    model: Model,
    task: Task,
    *,
    roundings: Mapping[str, Rounding] | None = None,
    format: str | None = None,
    metric: Metric = candidate_probability,
    seed: int = 0,
) -> Result:
    """Accuracy on the forgotten facts with weights rounded to fewer bits: one point per rounding, and the best.

    Rounded are the matrices of attention and MLPs, as bitsandbytes does it: not the embeddings, unembedding, norms and
    biases. On a GPU bitsandbytes rounds them itself, if it is installed, and the point says so; elsewhere the same
    arithmetic does, bit for bit. They are computed with in the model's own dtype: the numbers are those of 8-bit or
    4-bit weights, the speed is not. Activations stay as they are, which LLM.int8() rounds too. int8 and int4 have one
    scale per row, NF4 one per 64 weights. `roundings`: name -> any function from a matrix [out, in] to a rounded one.

    Nothing is trained, so all forgotten facts of the test split count. The first point is the model as it is, under the
    name of its dtype; the control has the same questions about nobody. An edit that moves weights by less than half a
    step of the rounding is rounded away: Zhang et al. 2024, https://arxiv.org/abs/2410.16454. `seed`: of the made-up
    names. Cost: (1 + roundings) F; memory: the matrices once more. ValueError for a model that is quantised already.
    """
    prompts, entries = formatted(task, format), every_entry(model)
    asked = Asked.of(model, task, prompts, metric=metric, seed=seed)
    as_it_is = str(entries[0].slot.parameter.dtype).removeprefix("torch.")
    runs = {as_it_is: [asked.scores_of(model)]}
    chosen = roundings_on(device_of(model)) if roundings is None else roundings
    for name, rounding in chosen.items():
        with rewritten(model, entries, lambda e, rounding=rounding: from_linear(e, rounding(as_linear(e)))):
            runs[name] = [asked.scores_of(model)]
    return worst_case(runs, asked, axis="weights")
