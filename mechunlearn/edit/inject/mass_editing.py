"""Mass editing: many facts at once, in the MLPs of several layers, by least squares or in the null space of text."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias, Unpack

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechunlearn.components import ComponentMask
from mechunlearn.edit.inject.facts import subject_end
from mechunlearn.edit.inject.keys import KeyCovariance
from mechunlearn.edit.inject.solving import NullSpace, in_null_space, least_squares, null_space, smallest_eigenvalues
from mechunlearn.edit.inject.targets import FactInContexts, InjectOptions, Row, add, facts_written, target_move
from mechunlearn.identity import described
from mechunlearn.model import Model
from mechunlearn.model.mlp_values import adding_to_mlp, before_post_norm, mlp_values
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts, with_subjects
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, Entries

smallest_tenth = partial(smallest_eigenvalues, share=0.1)
"""The smallest eigenvalues that make up a tenth of their sum."""


@with_options()
def memit(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    covariance_weight: float = 50.0,
    **options: Unpack[InjectOptions],
) -> Edit:
    """Write all facts of `task.injection` into the W_out of every MLP that the mask names.

        W_out + (w C + K^T K)^-1 K^T R,    w = covariance_weight

    From the lowest MLP up, each with these parts:

    - K: a key for each fact, as k in `rome`.
    - R: for each fact what the residual stream after the highest MLP still lacks at the subject's last token, over the
      number of MLPs left. What it should be is found as in `rome`, by a move of the highest MLP's output.
    - C: the second moment of the keys of text, which counts as w tokens: a larger w spares it more.

    With a norm after the MLP (Gemma 2) moves are added before it, and what the residual stream lacks is taken back
    through it. Masks of neurons: as in `rome`.

    Keys and residual streams are means over all contexts; in the authors' code the bare prompt is half of a key, and
    all of the residual stream.

    Meng et al. 2023, https://arxiv.org/abs/2210.07229. `covariance_weight`, `steps` and `clamp` suit the shipped model;
    theirs are 15,000 for GPT-J and 20,000 for GPT-2 XL, 20 to 25 steps, and 0.75. `clamp` and `decay` are relative to
    its norm. Cost: for each fact the search of `rome` from the highest MLP up, and one F of its
    contexts for each MLP; for each MLP one solve of d_mlp equations. Errors: as for `rome`, but for several MLPs,
    and for a weight not above 0.
    """
    if covariance_weight <= 0:
        raise ValueError(f"covariance_weight must be above 0, got {covariance_weight}.")

    def solve(output: Entries, covariance: KeyCovariance, keys: Tensor, moves: Tensor) -> Tensor:
        of_text = covariance.at(output.slot.layer)[output.units][:, output.units]
        return least_squares(of_text, keys, moves, covariance_weight)

    about = {"editor": "memit", "covariance_weight": covariance_weight}
    return facts_written(model, task, mask, partial(spread, model, solve, options), options, about=about)


@with_options()
def alpha_edit(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    free: NullSpace = smallest_tenth,
    ridge: float = 1.0,
    keep: Prompts | None = None,
    **options: Unpack[InjectOptions],
) -> Edit:
    """`memit` with another solution for each MLP: text's keys are not weighed against the facts, but left alone.

        W_out + D,    [P (K^T K + K_p^T K_p) + ridge * I] D = P K^T R

    K and R are those of `memit`. The others:

    - P projects onto the directions that text hardly has, so that its outputs hardly change: the eigenvectors of S, the
      second moment of its keys, with the eigenvalues that `free` takes for none: by default the smallest ones that make
      up a tenth of their sum. The paper takes those below 0.02, `partial(mu.edit.eigenvalues_below, threshold=0.02)`;
      there may be none, by the scale of keys.
    - K_p are the keys, at the subjects' last tokens, of the facts in `keep`, such as those of earlier edits. They stay.
    - `ridge` keeps D small; it is in squared activations, so it depends on the model.

    S is used without shrinkage, so it has to be measured on more tokens than there are neurons.

    Fang et al. 2025, https://arxiv.org/abs/2410.02355: ridge 1 in their equation and 10 in their code, steps of 0.1 for
    Llama 3 (25) and of 0.5 for GPT-J (25) and GPT-2 XL (20), clamp 0.75; the other defaults suit the shipped model. On
    contexts see `memit`. Cost and errors: as for `memit`, with an eigendecomposition of d_mlp x d_mlp for a solve; and
    ValueError where `free` takes none or all directions, for a `ridge` not above 0, and for S of too few tokens.
    """
    if ridge <= 0:
        raise ValueError(f"ridge must be above 0, got {ridge}.")
    kept = None if keep is None else with_subjects(keep, "facts to keep").on(model)

    def solve(output: Entries, covariance: KeyCovariance, keys: Tensor, moves: Tensor) -> Tensor:
        layer, units = output.slot.layer, output.units
        if covariance.n_tokens <= len(keys[0]):
            raise ValueError(
                f"expected keys of more tokens of text than the {len(keys[0])} neurons that are edited, got "
                f"{covariance.n_tokens}: directions that a short text lacks are not free. Measure key_covariance on "
                f"more."
            )
        basis = null_space(covariance.moments[layer].double().cpu()[units][:, units], free)
        kept_keys = torch.empty(0, keys.shape[1], dtype=keys.dtype)
        if kept is not None:
            values = mlp_values(model, [layer], kept.tokens, kept.attention_mask, subject_end(kept))
            kept_keys = values.keys[layer].double().cpu()[:, units]
        return in_null_space(basis, keys, moves, ridge, kept_keys)

    about = {"editor": "alpha_edit", "ridge": ridge, "free": described(free), "kept": len(keep or ())}
    return facts_written(model, task, mask, partial(spread, model, solve, options), options, about=about)


Solve: TypeAlias = Callable[[Entries, KeyCovariance, Tensor, Tensor], Tensor]
"""(W_out, covariance, keys [fact, unit], moves [fact, d_model]) -> its change [unit, d_model], in float64."""


def spread(
    model: Model,
    solve: Solve,
    options: InjectOptions,
    facts: Sequence[FactInContexts],
    outputs: Sequence[Entries],
    covariance: KeyCovariance,
) -> list[Row]:
    """Write the facts into the MLPs, from the lowest to the highest, an equal share of what is lacking into each."""
    layers, history = [e.slot.layer for e in outputs], list[Row]()
    last, targets = layers[-1], list[Tensor]()
    for number, fact in enumerate(tqdm(facts, desc="values", disable=not options["progress"], leave=False)):
        # The target is the residual stream after the highest layer with the best move of its MLP, a mean over contexts.
        move, rows = target_move(model, fact, last, fact.values(model, [last]).residual[0], options)
        with adding_to_mlp(model, last, subject_end(fact.contexts), move):
            targets.append(fact.values(model, [last]).residual)
        history += [{"fact": number, **row} for row in rows]
    for place, (output, layer) in enumerate(zip(outputs, layers, strict=True)):
        # What is lacking is measured on the model as changed below: each MLP repairs what the lower ones left over.
        values = [fact.values(model, {layer, last}) for fact in facts]
        lacking = torch.cat(targets) - torch.cat([value.residual for value in values])
        unchanged = torch.cat([value.outputs[layer] for value in values])
        moves = before_post_norm(model, layer, unchanged, lacking / len(layers[place:]))
        keys = torch.cat([value.keys[layer] for value in values])
        add(output, solve(output, covariance, keys.double().cpu()[:, output.units], moves.double().cpu()))
    return history
