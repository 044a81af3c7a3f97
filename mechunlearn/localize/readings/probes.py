"""Linear probes: in which layers can a property be read off the residual stream, on facts never seen?"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.arguments import check_batch_size, check_functions
from mechunlearn.components.plot import lines
from mechunlearn.curve import Curve
from mechunlearn.files import Saved
from mechunlearn.identity import name_of
from mechunlearn.model import Hook, Model, shape
from mechunlearn.probing import guesses, labels_by_token, states_at, subject_tokens
from mechunlearn.tasks.positions import Where, subject_last
from mechunlearn.tasks.prompts import Prompts

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


def probes(
    model: Model,
    prompts: Prompts,
    labels: Sequence[Any] | Tensor | None = None,
    *,
    at: Where = subject_last,
    seeds: int = 5,
    folds: int = 5,
    penalty: float = 10.0,
    hooks: Sequence[Hook] = (),
    batch_size: int = 64,
) -> "ProbeResult":
    """Logistic regressions for `labels` (default: the answer's first token) on the residual stream at one token.

    For each layer, seed and fold, a probe is fitted on the other folds' facts (features standardised, multinomial
    cross-entropy plus penalty / 2 times the squared weights) and classifies those of the fold. A fact is a name of
    `prompts.names` (without names, the subject's tokens): prompts about one subject are never on both sides, and every
    prompt is held out once per seed. Accuracy is the share classified right, chance the commonest label's share.

    - `at`: the token, `subject_last` (default), `answer`, or a function from prompts to a mask with one token a row.
    - `hooks`: forward hooks that the model runs with, such as ablations.

    The control task has a random label for each *last token of a subject*, such as a surname's ending. Where tokens
    recur, its accuracy on held-out facts, `control`, exceeds chance by what a probe gains from telling tokens apart;
    `selectivity` is accuracy - control. On the fitted facts, `control_fitted`, it is the capacity to memorise.

    A probe finds what can be read off, not what the model uses. A layer's gain is due to attention and MLP together.

    Cost: 1 forward, then 2 x points x seeds x folds small fits on the CPU.
    Alain & Bengio 2016, https://arxiv.org/abs/1610.01644; Hewitt & Liang 2019, https://arxiv.org/abs/1909.03368.
    ValueError for one class only, fewer facts than folds, and prompts without a subject if `at` needs it.
    """
    check_batch_size(batch_size)
    check_functions(at=at)
    sizes = shape(model)
    targets, classes = _targets(prompts, labels)
    groups = _facts(prompts)
    _check(classes, targets, groups, folds, seeds, penalty)
    states = states_at(model, prompts, at, hooks=hooks, batch_size=batch_size)
    types = subject_tokens(prompts, at)

    def held_out(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Correct on held-out facts, the same for the control task, and the control's accuracy where it was fitted."""
        rng = np.random.default_rng(seed)
        places = _folds(targets, groups, folds, rng)
        tasks = targets, labels_by_token(types, targets, rng)
        own, random = ([_held_out(layer, of_task, places, folds, penalty) for layer in states] for of_task in tasks)
        correct, control = (torch.stack([right for right, _ in by_layer], 1) for by_layer in (own, random))
        return correct, control, torch.tensor([fitted for _, fitted in random], dtype=torch.float64)

    correct, control, fitted = (torch.stack(values) for values in zip(*map(held_out, range(seeds)), strict=True))
    settings = {"at": name_of(at), "seeds": seeds, "folds": folds, "penalty": penalty, "hooks": len(hooks)}
    points = tuple(str(layer) for layer in range(sizes.n_layers + 1))
    chance = float(np.bincount(targets).max() / len(targets))
    per_seed = correct.mean(1)
    return ProbeResult(points, correct.mean(0), control.mean(0), fitted.mean(0), per_seed, chance, classes, settings)


@dataclass(frozen=True, eq=False, repr=False)
class ProbeResult(Saved):
    """Accuracy of probes by layer, with the accuracies to compare it to."""

    points: tuple[str, ...]
    """"3" is the residual stream that enters layer 3, the last number the final one, before its norm."""
    correct: Float[Tensor, "prompt point"]
    """For each prompt, the share of seeds in which a probe that never saw its fact was right."""
    control: Float[Tensor, "prompt point"]
    """The same with random labels, one for each last token of a subject (the control task)."""
    control_fitted: Float[Tensor, "point"]
    """Accuracy with these random labels on the facts that the probe was fitted on: near 1, it can memorise anything."""
    per_seed: Float[Tensor, "seed point"]
    """Accuracy in each seed: how much it depends on the split."""
    chance: float
    """Share of the commonest label."""
    labels: tuple[str, ...]
    """The classes."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Position, seeds, folds, penalty."""

    @property
    def accuracy(self) -> Float[Tensor, "point"]:
        """On held-out facts, the mean over prompts and seeds."""
        return self.correct.mean(0)

    @property
    def selectivity(self) -> Float[Tensor, "point"]:
        """Accuracy minus that of the control task (Hewitt & Liang 2019)."""
        return self.accuracy - self.control.mean(0)

    def curves(self) -> dict[str, Curve]:
        """Accuracy and control by layer, with intervals over prompts."""
        accuracy = Curve(self.points, self.correct, "accuracy on held-out facts", self.chance, limits=(0.0, 1.0))
        return {"accuracy": accuracy, "control": replace(accuracy, per_prompt=self.control)}

    def to_frame(self) -> "DataFrame":
        """One row per point: accuracy, its 95 % interval over prompts, control, selectivity, control_fitted, chance."""
        frame = self.curves()["accuracy"].interval().rename(columns={"value": "accuracy"})
        columns = {"control": self.control.mean(0), "selectivity": self.selectivity}
        columns["control_fitted"] = self.control_fitted
        return frame.assign(**{name: values.tolist() for name, values in columns.items()}, chance=self.chance)

    def plot(self) -> "Figure":
        """Accuracy and control by layer, chance dotted."""
        return lines(self.curves(), title=f"probes, {len(self.labels)} classes, {len(self.correct)} prompts")

    def __repr__(self) -> str:
        best = int(self.accuracy.argmax())
        return (
            f"ProbeResult({len(self.labels)} classes, {len(self.correct)} prompts, chance {self.chance:.3f}; best at "
            f"{self.points[best]}: {float(self.accuracy[best]):.3f}, control {float(self.control.mean(0)[best]):.3f})"
        )


def _targets(prompts: Prompts, labels: Sequence[Any] | Tensor | None) -> tuple[np.ndarray, tuple[str, ...]]:
    labels = prompts.answers[:, 0].cpu() if labels is None else labels
    if len(labels) != len(prompts):
        raise ValueError(f"expected one label for each of {len(prompts)} prompts, got {len(labels)}.")
    values = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    classes, targets = np.unique(np.array(values), return_inverse=True)
    return targets, tuple(str(value) for value in classes)


def _facts(prompts: Prompts) -> list[str]:
    """The fact that each prompt is about: prompts of one fact are held out together."""
    if prompts.names:
        return list(prompts.names)
    real = prompts.attention_mask if prompts.subject is None else prompts.subject & prompts.attention_mask
    return [str(row[kept].tolist()) for row, kept in zip(prompts.tokens, real, strict=True)]


def _check(
    classes: tuple[str, ...], targets: np.ndarray, groups: list[str], folds: int, seeds: int, penalty: float
) -> None:
    if len(classes) < 2:
        raise ValueError(
            f"expected labels of at least two classes, got only {''.join(classes)}: probe facts with several answers, "
            f"such as those to forget and to retain together (tasks.joined)."
        )
    count = len(set(groups))
    if not 2 <= folds <= count:
        raise ValueError(f"expected folds in 2..{count} (the number of facts), got {folds}: use fewer, or more facts.")
    if seeds < 1 or penalty <= 0:
        raise ValueError(f"expected at least one seed and a positive penalty, got seeds={seeds}, penalty={penalty}.")


def _folds(targets: np.ndarray, groups: list[str], folds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold of each prompt: facts are dealt out class by class, so that folds are alike; order does not matter."""
    label = {group: int(target) for group, target in sorted(zip(groups, targets, strict=True), reverse=True)}
    names = sorted(label)
    shuffled = sorted(rng.permutation(len(names)), key=lambda place: label[names[place]])
    fold = {names[place]: turn % folds for turn, place in enumerate(shuffled)}
    return np.array([fold[group] for group in groups])


def _held_out(
    features: Float[np.ndarray, "prompt d_model"], labels: np.ndarray, places: np.ndarray, folds: int, penalty: float
) -> tuple[Float[Tensor, "prompt"], float]:
    """Whether each prompt's label is right when its fold is held out, and the mean accuracy on the fitted folds."""
    correct, fitted = np.zeros(len(labels)), []
    for fold in range(folds):
        held = places == fold
        guessed = guesses(features, labels, ~held, penalty)
        correct[held] = guessed[held] == labels[held]
        fitted.append(float((guessed[~held] == labels[~held]).mean()))
    return torch.from_numpy(correct), float(np.mean(fitted))
