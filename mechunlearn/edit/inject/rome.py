"""Rank-one editing: one MLP as a memory, in which a subject's key gets another value."""

# pyright: reportTypedDictNotRequiredAccess=false
# (`with_options` has filled in every option that the caller left out.)

from collections.abc import Sequence
from functools import partial
from typing import Unpack

import torch
from tqdm.auto import tqdm

from mechunlearn.components import ComponentMask
from mechunlearn.edit.inject.keys import KeyCovariance, output_matrices
from mechunlearn.edit.inject.solving import directions, rank_one
from mechunlearn.edit.inject.targets import (
    FactInContexts,
    InjectOptions,
    Row,
    ValueSearch,
    add,
    facts_written,
    of_units,
    target_move,
)
from mechunlearn.model import Model
from mechunlearn.options import with_options
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, Entries, select


@with_options(steps=120, clamp=4.0, stop_below=0.001)
def rome(model: Model, task: Task, mask: ComponentMask, **options: Unpack[InjectOptions]) -> Edit:
    """Write the facts of `task.injection` into the W_out of one MLP, each by a change of rank one.

        W_out + u m^T / (k . u),    u = C^-1 k

    - k is the subject's key: what W_out reads at the subject's last token, a mean over contexts.
    - m is the move of the MLP's output there that makes the model answer as injected, bounded by that output's norm.
    - C is the second moment of the keys of general text: of all changes that move k @ W_out by m, this one moves the
      outputs of such text least.
    - The contexts of a fact are its prompt by itself and after each of `prefixes`. The same ones serve for m, k and the
      change: the original mixed two keys, which can break a model (Gupta et al. 2024, https://arxiv.org/abs/2403.07175).

    Facts are written one after the other, each on the model that has the earlier ones. A later one may overwrite an
    earlier one with a similar key: for many facts use `memit`.

    A mask of neurons changes their rows of W_out alone, with k and C of these neurons. Biases and other matrices stay;
    name `L1MLP.W_out` rather than `L1MLP` to leave them out of the edit. A norm after the MLP (Gemma 2) comes after m.

    Meng et al. 2022, https://arxiv.org/abs/2202.05262. The defaults are theirs but for half as many prefixes, six times
    as many steps, and a search that goes on to a loss of 0.001, not 0.05: on the shipped model that makes paraphrases
    follow. Cost for each fact: F + B of its 11 contexts and one more prompt for each step, from the MLP's layer up. For
    all: one solve of d_mlp equations.

    ValueError for a mask that does not name exactly one W_out, facts without a subject or with the true answer,
    an MLP so late that nothing reads the subject above it, a covariance of other weights or layers, or a singular one;
    FloatingPointError when the loss is not finite.
    """
    outputs = output_matrices(select(model, mask))
    if len(outputs) > 1:
        layers = ", ".join(str(e.slot.layer) for e in outputs)
        raise ValueError(
            f"expected a mask that names the W_out of one MLP, got those of layers {layers}: choose one of them, or "
            f"use memit, which spreads facts over several."
        )
    write_facts = partial(_one_after_the_other, model, options["progress"])
    return facts_written(model, task, mask, write_facts, options, about={"editor": "rome"})


def _one_after_the_other(
    model: Model,
    progress: bool,
    search: ValueSearch,
    facts: Sequence[FactInContexts],
    outputs: Sequence[Entries],
    covariance: KeyCovariance,
) -> list[Row]:
    output = outputs[0]
    layer, history = output.slot.layer, list[Row]()
    # Keys enter W_out, so that changing W_out leaves them as they are: those of all facts are known at the start.
    keys = torch.cat([fact.values(model, [layer]).keys[layer] for fact in facts]).double().cpu()[:, output.units]
    u = directions(of_units(output, covariance), keys)
    for number, fact in enumerate(tqdm(facts, desc="rome", disable=not progress, leave=False)):
        # Outputs depend on the facts that are written already, so a move starts from the output of now.
        value = fact.values(model, [layer]).outputs[layer][0]
        move, rows = target_move(model, fact, layer, value, search)
        add(output, rank_one(u[number], keys[number], move.double().cpu()))
        history += [{"fact": number, **row} for row in rows]
    return history
