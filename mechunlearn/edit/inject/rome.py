"""Rank-one editing: one MLP as a memory, in which a subject's key gets another value."""

from collections.abc import Sequence
from functools import partial

import torch
from tqdm.auto import tqdm

from mechunlearn.components import ComponentMask
from mechunlearn.edit.inject.keys import KeyCovariance, output_matrices
from mechunlearn.edit.inject.solving import directions, rank_one
from mechunlearn.edit.inject.targets import Row, Search, Sought, add, facts_written, selected, target_move
from mechunlearn.model import Model
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, Entries, select


def rome(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    covariance: KeyCovariance | None = None,
    prefixes: Sequence[str] | None = None,
    steps: int = 120,
    learning_rate: float = 0.5,
    kl_coefficient: float = 0.0625,
    decay: float = 0.5,
    clamp: float = 4.0,
    stop_below: float = 0.001,
    seed: int = 0,
    progress: bool = True,
) -> Edit:
    """Write the facts of `task.injection` into the W_out of one MLP, each by a change of rank one.

        W_out + u m^T / (k . u),    u = C^-1 k

    k is the subject's key: what W_out reads at the subject's last token, a mean over contexts. m is the move of the
    MLP's output there that makes the model answer as injected, sought by Adam (`target_move` has the loss that `steps`
    to `stop_below` belong to). After the change k @ W_out has moved by m, to the weights' precision, and keys of
    general text, of which C is the second moment, as little as that allows. The contexts are the prompt by itself and
    after `prefixes` (default: ten pieces of text that the model makes up from `seed`). m is sought, k averaged and the
    change computed in the same contexts: the original mixed two keys, which can break a model (r-ROME).

    Facts are written one after the other, each sought on the model that has the earlier ones; a later one may
    overwrite an earlier one with a similar key. For many facts use `memit`.

    In models with a norm after the MLP (Gemma 2) m is added before it. Biases and other matrices stay. A mask of
    neurons changes their rows of W_out alone, with k and C of these neurons. The edit has the entries of `mask`: give
    `L1MLP.W_out` rather than `L1MLP` to leave out matrices that do not change.

    `covariance`: from `key_covariance`; default: measured on `task.text` and `task.retain`.

    Meng et al. 2022, https://arxiv.org/abs/2202.05262; one key: Gupta et al. 2024, https://arxiv.org/abs/2403.07175.
    The defaults are theirs, but for half as many prefixes, six times as many steps, and a search that goes on down to a
    loss of 0.001, not 0.05: on the shipped model that makes paraphrases follow. An answer that stands in the prompt
    already, such as golf in the trained one, is found with a part of what other prompts need. Cost for each fact: up to
    `steps` forwards and backwards of its 11 contexts and one more prompt, from the MLP's layer up. For all: one solve
    of d_mlp equations. As the search is in units of the model's activations, other models may need another
    `learning_rate`.

    ValueError for a mask that does not name exactly one W_out, facts without a subject or with the true answer,
    an MLP so late that nothing reads the subject above it, a covariance of other weights or layers, or a singular one;
    FloatingPointError when the loss is not finite.
    """
    _check_one(output_matrices(select(model, mask)))
    search = Search(steps, learning_rate, kl_coefficient, decay, clamp, stop_below)
    return facts_written(
        model,
        task,
        mask,
        partial(_one_after_the_other, model, search, progress),
        covariance=covariance,
        prefixes=prefixes,
        search=search,
        seed=seed,
        provenance={"editor": "rome"},
    )


def _one_after_the_other(
    model: Model,
    search: Search,
    progress: bool,
    sought: Sequence[Sought],
    outputs: Sequence[Entries],
    covariance: KeyCovariance,
) -> list[Row]:
    """Keys do not depend on the W_out that changes; outputs do."""
    output = outputs[0]
    layer, history = output.slot.layer, list[Row]()
    keys = torch.cat([fact.values(model, [layer]).keys[layer] for fact in sought])
    keys = keys.double().cpu()[:, output.units]
    found = directions(selected(output, covariance), keys)
    for number, fact in enumerate(tqdm(sought, desc="rome", disable=not progress, leave=False)):
        value = fact.values(model, [layer]).outputs[layer][0]
        move, rows = target_move(model, fact, layer, value, search)
        add(output, rank_one(found[number], keys[number], move.double().cpu()))
        history += [{"fact": number, **row} for row in rows]
    return history


def _check_one(outputs: Sequence[Entries]) -> None:
    if len(outputs) > 1:
        layers = ", ".join(str(e.slot.layer) for e in outputs)
        raise ValueError(
            f"expected a mask that names the W_out of one MLP, got those of layers {layers}: choose one of them, or "
            f"use memit, which spreads facts over several."
        )
