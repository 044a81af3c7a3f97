"""Values that an MLP would have to give for the model to answer as wanted, and facts written by them in closed form."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mechunlearn.components import ComponentMask
from mechunlearn.edit.inject.facts import essence, generated_prefixes, in_contexts, injected, subject_end, with_subjects
from mechunlearn.edit.inject.keys import KeyCovariance, key_covariance, output_matrices
from mechunlearn.losses import cross_entropy
from mechunlearn.model import Model, differentiable, fingerprint
from mechunlearn.model.mlp_values import MLPValues, adding_to_mlp, mlp_values
from mechunlearn.model.running import residual_before, running_from
from mechunlearn.tasks.prompts import Prompts, joined
from mechunlearn.tasks.task import Task
from mechunlearn.weights import Edit, Entries, exclusively, read, select, write

Row = dict[str, int | float]


@dataclass(frozen=True)
class Search:
    """How a value is searched for."""

    steps: int
    learning_rate: float
    kl_coefficient: float
    decay: float
    clamp: float
    stop_below: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}.")
        if self.clamp <= 0:
            raise ValueError(f"clamp must be above 0, got {self.clamp}.")


@dataclass(frozen=True, eq=False)
class Sought:
    """One fact in its contexts, and the subject's essence as the last row."""

    prompts: Prompts
    """The contexts, and the essence, of which nothing counts as the answer."""

    @classmethod
    def of(cls, model: Model, fact: Prompts, prefixes: tuple[str, ...]) -> "Sought":
        return cls(joined(in_contexts(model, fact, prefixes), essence(model, fact)))

    @property
    def contexts(self) -> Prompts:
        return self.prompts.rows(torch.arange(len(self.prompts) - 1))

    def values(self, model: Model, layers: Iterable[int]) -> MLPValues:
        """Keys, outputs and residuals at the subject's last token, each a mean over the contexts (one row)."""
        contexts = self.contexts
        found = mlp_values(model, layers, contexts.tokens, contexts.attention_mask, subject_end(contexts))
        return MLPValues(
            {layer: key.mean(0, keepdim=True) for layer, key in found.keys.items()},
            {layer: output.mean(0, keepdim=True) for layer, output in found.outputs.items()},
            found.residual.mean(0, keepdim=True),
        )


def target_move(
    model: Model, sought: Sought, layer: int, scale: Float[Tensor, "d_model"], search: Search
) -> tuple[Float[Tensor, "d_model"], list[Row]]:
    """What to add to the MLP's output at the subject's last token, and one row of history per step.

    By Adam, from 0, with the norm of the move m held at `clamp` * |scale| or less, on

        loss =   mean over contexts and answer tokens of -log p(token)
               + kl_coefficient * KL(p0 || p)      after "{subject} is a", p0 without the move
               + decay * |m| / |scale|^2

    Stops as soon as the first term is below `stop_below` (the paper: the whole loss, which goes on pushing where only
    the second is left). Cost per step: 1F and 1B from `layer` up, of every context.
    ValueError for an MLP above which nothing reads the subject; FloatingPointError when the loss is not finite.
    """
    prompts, places, size = sought.prompts, subject_end(sought.prompts), scale.float().norm()
    residual = residual_before(model, layer, prompts.tokens, prompts.attention_mask)
    move = torch.zeros(len(scale), device=scale.device, requires_grad=True)
    steering = torch.optim.Adam([move], lr=search.learning_rate)
    history: list[Row] = []
    expected = None
    for step in range(search.steps):
        with running_from(model, layer, residual), adding_to_mlp(model, layer, places, move):
            logits = prompts.logits(model)
        answer, is_a = _answer_loss(logits, prompts), logits[-1, 0].float().log_softmax(-1)
        expected = is_a.detach() if expected is None else expected  # the first step has no move yet
        divergence = functional.kl_div(is_a, expected, reduction="sum", log_target=True)
        loss = answer + search.kl_coefficient * divergence + search.decay * _norm(move) / size**2
        row: Row = {"step": step, "answer": answer.item(), "kl": divergence.item(), "norm": move.detach().norm().item()}
        history.append(row)
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"expected a finite loss, got {loss.item()} at step {step} of the search for a value: the weights were "
                f"restored; lower the learning rate."
            )
        if answer.item() < search.stop_below:
            break
        (move.grad,) = torch.autograd.grad(loss, move)
        if step == 0 and not bool(move.grad.any()):
            raise ValueError(
                f"expected an MLP whose output at the subject reaches the answer, got that of layer {layer}: choose a "
                f"lower one; attention above it has to move the fact to where it is asked for."
            )
        steering.step()
        with torch.no_grad():
            move *= (search.clamp * size / move.norm()).clamp(max=1.0)
    return move.detach(), history


def _answer_loss(logits: Tensor, prompts: Prompts) -> Tensor:
    """Mean over the contexts of the mean over answer tokens."""
    real = prompts.answer_mask
    return cross_entropy(logits[real], prompts.answers[real]).mean()


def _norm(move: Tensor) -> Tensor:
    """With a gradient of 0, not NaN, at 0."""
    return move.pow(2).sum().clamp(min=1e-12).sqrt()


Writes: TypeAlias = Callable[[Sequence[Sought], Sequence[Entries], KeyCovariance], list[Row]]
"""Changes the W_out entries so that the facts hold; gives the history."""


def facts_written(
    model: Model,
    task: Task,
    mask: ComponentMask,
    writes: Writes,
    *,
    covariance: KeyCovariance | None,
    prefixes: Sequence[str] | None,
    search: Search,
    seed: int,
    provenance: dict[str, Any],
) -> Edit:
    """The edit that `writes` makes of the facts of `task.injection`; the model is left as it was."""
    entries, original = select(model, mask), fingerprint(model)
    outputs, facts = output_matrices(entries), with_subjects(injected(task), "facts to inject")
    if covariance is None:
        source = f"text and retained prompts of {task.name}"
        covariance = key_covariance(model, mask, task.text, prompts=task.retain, source=source)
    covariance.check(model, [e.slot.layer for e in outputs])
    prefixes = generated_prefixes(model, seed=seed) if prefixes is None else tuple(prefixes)
    before = read(entries)
    try:
        with exclusively(model), differentiable(model):
            sought = [Sought.of(model, facts[[row]], prefixes) for row in range(len(facts))]
            history = writes(sought, outputs, covariance)
        values = read(entries)
    finally:
        write(entries, before)
    how = {
        **provenance,
        "task": task.name,
        "facts": len(facts),
        "covariance": covariance.described(),
        "prefixes": list(prefixes),
        "seed": seed,
        **vars(search),
        "versions": {name: version(name) for name in ("mechunlearn", "torch", "transformer_lens")},
    }
    return Edit(mask, values, original, how, tuple(history))


def add(output: Entries, change: Float[Tensor, "unit d_model"]) -> None:
    """Adds a change to the selected rows of W_out, rounded once."""
    present = output.read(output.slot.parameter.detach())
    output.write(present.double() + change[:, None].to(present.device))


def selected(output: Entries, covariance: KeyCovariance) -> Float[Tensor, "unit unit"]:
    """C of the selected neurons."""
    return covariance.at(output.slot.layer)[output.units][:, output.units]
