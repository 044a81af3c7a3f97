"""Values that an MLP would have to give for the model to answer as wanted, and facts written by them in closed form."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any, TypeAlias, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mechunlearn.components import ComponentMask
from mechunlearn.edit.inject.facts import essence, generated_prefixes, in_contexts, injected, subject_end
from mechunlearn.edit.inject.keys import KeyCovariance, key_covariance, output_matrices
from mechunlearn.losses import cross_entropy
from mechunlearn.model import Model, differentiable, fingerprint
from mechunlearn.model.mlp_values import MLPValues, adding_to_mlp, mlp_values
from mechunlearn.model.running import residual_before, running_from
from mechunlearn.tasks.building import n_opening
from mechunlearn.tasks.prompts import Prompts, joined, with_subjects
from mechunlearn.tasks.task import Task, text_of
from mechunlearn.weights import Edit, Entries, exclusively, read, select, write

Row = dict[str, int | float]


class InjectOptions(TypedDict, total=False):
    """How facts are written into MLPs. Of each option: type, default, sentence."""

    covariance: Annotated[
        KeyCovariance | None, None, "From `key_covariance`; None measures it on `task.text` and `task.retain`."
    ]
    prefixes: Annotated[
        Sequence[str] | None,
        None,
        "The contexts of a fact are its prompt by itself and after each of these texts; None is ten that the model "
        "makes up from `seed`.",
    ]
    steps: Annotated[int, 40, "The search for a move m takes at most this many steps of Adam."]
    learning_rate: Annotated[
        float, 0.5, "The search takes steps of this size in the model's activations: other models may need another."
    ]
    kl_coefficient: Annotated[
        float,
        0.0625,
        'The loss of m has KL(now || before) of what follows "{subject} is a", multiplied by this; the subject has its '
        "tokens of the prompt, where the authors tokenize it by itself.",
    ]
    decay: Annotated[float, 0.5, "The loss of m has |m| / |what m is added to|^2, multiplied by this."]
    clamp: Annotated[float, 1.5, "|m| is held at this many times |what m is added to| or less."]
    stop_below: Annotated[float, 0.05, "The search ends where -log p of the injected answer is below this, in nats."]
    seed: Annotated[int, 0, "It decides which prefixes the model makes up."]
    progress: Annotated[bool, True, "Whether a progress bar is shown."]


@dataclass(frozen=True, eq=False)
class FactInContexts:
    """One fact in its contexts, and the subject's essence as the last row."""

    prompts: Prompts
    """Nothing counts as the answer of the last row."""

    @classmethod
    def of(cls, model: Model, fact: Prompts, prefixes: tuple[str, ...]) -> "FactInContexts":
        return cls(joined(in_contexts(model, fact, prefixes), essence(model, fact)))

    @property
    def contexts(self) -> Prompts:
        return self.prompts.rows(torch.arange(len(self.prompts) - 1))

    def values(self, model: Model, layers: Iterable[int]) -> MLPValues:
        """Keys, outputs and residuals at the subject's last token, each a mean over the contexts (one row)."""
        contexts = self.contexts
        values = mlp_values(model, layers, contexts.tokens, contexts.attention_mask, subject_end(contexts))
        return MLPValues(
            {layer: key.mean(0, keepdim=True) for layer, key in values.keys.items()},
            {layer: output.mean(0, keepdim=True) for layer, output in values.outputs.items()},
            values.residual.mean(0, keepdim=True),
        )


def target_move(
    model: Model, fact: FactInContexts, layer: int, scale: Float[Tensor, "d_model"], options: InjectOptions
) -> tuple[Float[Tensor, "d_model"], list[Row]]:
    """The move m to add to the MLP's output at the subject's last token, and a row of history before each step.

    Adam searches for m from 0, with its norm held at `clamp` * |scale| or less, on

        loss =   mean over contexts and answer tokens of -log p(token)
               + kl_coefficient * KL(p || p0)      after "{subject} is a", p0 without the move
               + decay * |m| / |scale|^2

    The search stops as soon as the first term is below `stop_below`. (The paper's stops by the whole loss, and so goes
    on where only the second term is left.) The last row is that of the m that is returned. Cost per step: 1F and 1B
    from `layer` up, of every context; 1F at the end.
    ValueError for an MLP above which nothing reads the subject; FloatingPointError when the loss is not finite.
    """
    prompts, places, size = fact.prompts, subject_end(fact.prompts), scale.float().norm()
    answers = prompts.answer_mask
    # What enters the layer does not depend on the move: it is computed once, and every step starts from it.
    residual = residual_before(model, layer, prompts.tokens, prompts.attention_mask)
    move = torch.zeros(len(scale), device=scale.device, requires_grad=True)
    adam = torch.optim.Adam([move], lr=options["learning_rate"])
    history: list[Row] = []
    expected = None
    for step in range(options["steps"] + 1):
        with running_from(model, layer, residual), adding_to_mlp(model, layer, places, move):
            logits = prompts.logits(model)
        # The last row is "{subject} is a". In the first step the move is 0: that is what is expected there.
        answer, is_a = cross_entropy(logits[answers], prompts.answers[answers]).mean(), logits[-1, 0]
        is_a = is_a.float().log_softmax(-1)
        expected = is_a.detach() if expected is None else expected
        # In torch's order of arguments this is the sum of p (log p - log p0).
        divergence = functional.kl_div(expected, is_a, reduction="sum", log_target=True)
        # The clamp gives the norm a gradient of 0, not NaN, at 0.
        norm = move.pow(2).sum().clamp(min=1e-12).sqrt()
        loss = answer + options["kl_coefficient"] * divergence + options["decay"] * norm / size**2
        row: Row = {"step": step, "answer": answer.item(), "kl": divergence.item(), "norm": move.detach().norm().item()}
        history.append(row)
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"expected a finite loss, got {loss.item()} at step {step} of the search for a value: the weights were "
                f"restored; lower the learning rate."
            )
        if answer.item() < options["stop_below"] or step == options["steps"]:
            break
        (move.grad,) = torch.autograd.grad(loss, move)
        if step == 0 and not bool(move.grad.any()):
            raise ValueError(
                f"expected an MLP whose output at the subject reaches the answer, got that of layer {layer}: choose a "
                f"lower one; attention above it has to move the fact to where it is asked for."
            )
        adam.step()
        # Back onto the ball of radius `clamp` * |scale|, where the step has left it.
        with torch.no_grad():
            move *= (options["clamp"] * size / move.norm()).clamp(max=1.0)
    return move.detach(), history


SEARCH = ("steps", "learning_rate", "kl_coefficient", "decay", "clamp", "stop_below")
"""The options of `target_move`."""

WriteFacts: TypeAlias = Callable[[Sequence[FactInContexts], Sequence[Entries], KeyCovariance], list[Row]]
"""Changes the W_out entries so that the facts hold; gives the history."""


def facts_written(
    model: Model,
    task: Task,
    mask: ComponentMask,
    write_facts: WriteFacts,
    options: InjectOptions,
    *,
    about: Mapping[str, Any],
) -> Edit:
    """The edit that `write_facts` makes of the facts of `task.injection`; `about` begins its provenance."""
    if options["steps"] < 1:
        raise ValueError(f"steps must be 1 or more, got {options['steps']}.")
    if options["clamp"] <= 0:
        raise ValueError(f"clamp must be above 0, got {options['clamp']}.")
    entries, original = select(model, mask), fingerprint(model)
    outputs, facts = output_matrices(entries), with_subjects(injected(task), "facts to inject")
    covariance, prefixes, seed = options["covariance"], options["prefixes"], options["seed"]
    if prefixes is None:
        prefixes = generated_prefixes(model, prepend_bos=n_opening(model, facts) > 0, seed=seed)
    prefixes = tuple(prefixes)
    in_their_contexts = [FactInContexts.of(model, fact, prefixes) for fact in facts.batches(1)]
    if covariance is None:
        source = f"text and retained prompts of {task.name}"
        covariance = key_covariance(model, mask, text_of(task), prompts=task.retain, source=source)
    covariance.check(model, [e.slot.layer for e in outputs])
    before = read(entries)
    try:
        with exclusively(model), differentiable(model):
            history = write_facts(in_their_contexts, outputs, covariance)
        values = read(entries)
    finally:
        write(entries, before)
    provenance = {
        **about,
        "task": task.name,
        "special_tokens": task.special_tokens,
        "facts": len(facts),
        "probabilities": _reached(history, len(facts)),
        "covariance": covariance.described(),
        "prefixes": list(prefixes),
        "seed": seed,
        **{name: options[name] for name in SEARCH},
        "versions": {name: version(name) for name in ("mechunlearn", "torch", "transformer_lens")},
    }
    return Edit(mask, values, original, provenance, tuple(history))


def _reached(history: Sequence[Row], count: int) -> list[float]:
    """By fact, the probability of an answer token (a geometric mean) with the value that was found for it.

    It warns of answers that are improbable with that value: no weights that give it can make the model say them.
    """
    last = {row["fact"]: row for row in history}
    reached = [math.exp(-last[fact]["answer"]) for fact in range(count)]
    short = [f"fact {fact}: {probability:.2g}" for fact, probability in enumerate(reached) if probability < 0.5]
    if short:
        warnings.warn(
            f"the search for a value ended with an improbable answer for {len(short)} of {count} facts "
            f"({', '.join(short[:5])}): take more steps, a larger clamp or learning rate, or an MLP in a lower layer. "
            f"provenance['probabilities'] has all of them.",
            stacklevel=2,
        )
    return reached


def add(output: Entries, change: Float[Tensor, "unit d_model"]) -> None:
    """Add a change to the selected rows of W_out, rounded once."""
    present = output.read(output.slot.parameter.detach())
    output.write(present.double() + change[:, None].to(present.device))
