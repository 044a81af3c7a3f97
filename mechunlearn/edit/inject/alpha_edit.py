"""Null-space editing: facts written only along directions that keys of general text hardly have."""

from functools import partial
from typing import Unpack

import torch
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.edit.inject.facts import subject_end
from mechunlearn.edit.inject.keys import KeyCovariance
from mechunlearn.edit.inject.memit import spread
from mechunlearn.edit.inject.solving import NullSpace, in_null_space, null_space, smallest_eigenvalues
from mechunlearn.edit.inject.targets import InjectOptions, facts_written
from mechunlearn.identity import described
from mechunlearn.model import Model
from mechunlearn.model.mlp_values import mlp_values
from mechunlearn.options import with_options
from mechunlearn.tasks.prompts import Prompts, with_subjects
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, Entries

smallest_tenth = partial(smallest_eigenvalues, share=0.1)
"""The smallest eigenvalues that make up a tenth of their sum."""


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
