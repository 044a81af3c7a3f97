"""Rank-one editing: one MLP as a memory, in which a subject's key gets another value."""

from collections.abc import Sequence
from functools import partial
from typing import Unpack

import torch
from tqdm.auto import tqdm

from mechunlearn.components import ComponentMask
from mechunlearn.edit.inject.keys import KeyCovariance, output_matrices
from mechunlearn.edit.inject.solving import directions, rank_one
from mechunlearn.edit.inject.targets import FactInContexts, InjectOptions, Row, add, facts_written, target_move
from mechunlearn.model import Model
from mechunlearn.options import with_options
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, Entries, select


@with_options(steps=120, clamp=4.0, stop_below=0.001)
def rome(model: Model, task: Task, mask: ComponentMask, **options: Unpack[InjectOptions]) -> Edit:
    """Write the facts of `task.injection` into the W_out of one MLP, each by a change of rank one.

        W_out + u m^T / (k . u),    u = C^-1 k

    - k: the subject's key, what W_out reads at its last token, a mean over contexts (the original mixed two keys, which
      can break a model: Gupta et al. 2024, https://arxiv.org/abs/2403.07175).
    - m: the move of the MLP's output there, before a post-norm, that makes the model answer as injected.
    - C: the second moment of text's keys, whose outputs this change moves least of all that move k @ W_out by m.

    Facts are written one after the other, and may overwrite those with similar keys: for many use `memit`. A mask of
    neurons changes their rows of W_out alone. Biases and other matrices stay.

    Meng et al. 2022, https://arxiv.org/abs/2202.05262, with half the prefixes, six times the steps, and a search to a
    loss of 0.001, not 0.05: on the shipped model paraphrases then follow. `provenance["probabilities"]` are those of
    the answers with the values that were found; a warning names those below 1/2. Cost: for each fact and step, F + B of
    12 prompts from the MLP's layer up; one solve of d_mlp equations.

    ValueError for another number of W_out than one, facts without a subject or with the true answer, an MLP above which
    nothing reads the subject, a covariance of other weights or layers, or a singular one; FloatingPointError when the
    loss is not finite.
    """
    outputs = output_matrices(select(model, mask))
    if len(outputs) > 1:
        layers = ", ".join(str(e.slot.layer) for e in outputs)
        raise ValueError(
            f"expected a mask that names the W_out of one MLP, got those of layers {layers}: choose one of them, or "
            f"use memit, which spreads facts over several."
        )
    write_facts = partial(_one_after_the_other, model, options)
    return facts_written(model, task, mask, write_facts, options, about={"editor": "rome"})


def _one_after_the_other(
    model: Model,
    options: InjectOptions,
    facts: Sequence[FactInContexts],
    outputs: Sequence[Entries],
    covariance: KeyCovariance,
) -> list[Row]:
    (output,) = outputs
    layer, units, history = output.slot.layer, output.units, list[Row]()
    # Keys enter W_out, so that changing W_out leaves them as they are: those of all facts are known at the start.
    keys = torch.cat([fact.values(model, [layer]).keys[layer] for fact in facts]).double().cpu()[:, units]
    u = directions(covariance.at(layer)[units][:, units], keys)
    for number, fact in enumerate(tqdm(facts, desc="rome", disable=not options["progress"], leave=False)):
        # Outputs depend on the facts that are written already, so a move starts from the output of now.
        value = fact.values(model, [layer]).outputs[layer][0]
        move, rows = target_move(model, fact, layer, value, options)
        add(output, rank_one(u[number], keys[number], move.double().cpu()))
        history += [{"fact": number, **row} for row in rows]
    return history
