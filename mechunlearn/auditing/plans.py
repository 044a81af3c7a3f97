"""What an audit runs: tests and attacks by what they say, in two budgets."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from mechunlearn.evaluate.asking import Test, format_test, in_format, knowledge, text_kl, text_loss
from mechunlearn.evaluate.attacks.directions import direction_ablation, principal_difference
from mechunlearn.evaluate.attacks.few_shot import few_shot
from mechunlearn.evaluate.attacks.relearning import relearn, relearn_benign, relearn_few
from mechunlearn.evaluate.attacks.relearning_lora import relearn_halves, relearn_lora, relearn_two_facts
from mechunlearn.evaluate.attacks.soft_prompt import soft_prompt
from mechunlearn.evaluate.attacks.weights import noised, quantized
from mechunlearn.evaluate.generation import extraction_strength, generated
from mechunlearn.evaluate.lens import by_both_ends, by_change, lens_extraction
from mechunlearn.evaluate.patching import patching_audit
from mechunlearn.evaluate.probes import binary_probes, multinomial_probe
from mechunlearn.evaluate.scoring import side_of
from mechunlearn.tasks.task import Task


def quick(task: Task) -> "Plan":
    """Every kind of test and attack once, with small budgets: some minutes on the shipped model and two cores.

    Small budgets understate what attacks recover: what they find is there, what they do not find may be.
    """
    return _plan(
        task,
        asked={"generated": generated},
        latent={"probes": partial(binary_probes, splits=2), "logit lens": lens_extraction, "patching": patching_audit},
        attacks={
            "relearning": partial(relearn, learning_rates=(1e-3,), steps=32),
            "relearning, LoRA": partial(
                relearn_lora, rank=64, learning_rates=(3e-3,), steps=10, batch_size=16, text_coefficient=0.0
            ),
            "relearning, other text": partial(relearn_benign, learning_rates=(3e-3,), steps=20),
            "few-shot": partial(few_shot, shots=(0, 4)),
            "soft prompt": partial(soft_prompt, restarts=1, steps=32),
            "direction ablation": direction_ablation,
            "quantization": quantized,
            "noise": partial(noised, scales=(0.1, 0.3), draws=1),
        },
    )


def full(task: Task) -> "Plan":
    """Every test and attack at the budgets of its paper or of this library: many times the cost of `quick`."""
    return _plan(
        task,
        asked={"generated": generated, "extraction strength": extraction_strength},
        latent={
            "probes": binary_probes,
            **({"probe of retained facts": multinomial_probe} if _shares_answers(task) else {}),
            "logit lens": partial(lens_extraction, budget=1),
            "logit lens, 4 guesses": lens_extraction,
            "logit lens, both ends": partial(lens_extraction, rankings=by_both_ends),
            "logit lens, change": partial(lens_extraction, rankings=by_change),
            "patching": patching_audit,
        },
        attacks={
            "relearning": relearn,
            "relearning, few examples": relearn_few,
            "relearning, other text": relearn_benign,
            "relearning, LoRA": partial(relearn_lora, learning_rates=(2e-4, 1e-3), at=(0, 5, 10, 20)),
            "relearning, the paper's": relearn_halves,
            "relearning, two facts": relearn_two_facts,
            "few-shot": few_shot,
            "soft prompt": soft_prompt,
            "direction ablation": direction_ablation,
            "direction ablation, principal": partial(direction_ablation, direction=principal_difference),
            "quantization": quantized,
            "noise": noised,
        },
    )


def _plan(task: Task, *, asked: dict[str, Test], latent: Mapping[str, Test], attacks: Mapping[str, Test]) -> "Plan":
    """With the tests that every budget has: every format of the task, and damage."""
    side_of(task)  # raises where there is no format
    forget = {name: format_test(task, name, "forget") for name in task.formats}
    others = [name for name, format in task.formats.items() if not format.kept][1:]
    damage: dict[str, Test] = {f"retain, {name}": format_test(task, name, "retain") for name in task.formats}
    damage |= {f"forget, {name} (keep)": forget[name] for name, format in task.formats.items() if format.kept}
    damage |= {} if task.knowledge is None else {"other knowledge": knowledge}
    damage |= {"text loss": text_loss, "text KL": text_kl}
    asked = {name: forget[name] for name in others} | asked
    return Plan(partial(in_format, side="forget"), asked, latent, attacks, damage)


def _shares_answers(task: Task) -> bool:
    """Whether retained facts have every forgotten answer, as where single athletes are forgotten."""
    forgotten, retained = side_of(task).answers[:, 0], task.retain.answers[:, 0]
    return set(forgotten.tolist()) <= set(retained.tolist())


CLEAN = "clean"


@dataclass(frozen=True, eq=False)
class Plan:
    """Tests and attacks by what they say; `dataclasses.replace(plan, attacks={**plan.attacks, "mine": f})` adds one.

    But for `damage`, a higher number must mean that more of the forgotten facts is found.
    """

    clean: Test
    """The forgotten facts, asked as they were trained."""
    asked: Mapping[str, Test]
    """The forgotten facts, asked in other ways."""
    latent: Mapping[str, Test]
    """What the model knows and does not say."""
    attacks: Mapping[str, Test]
    """What brings knowledge back. It has a recovered fraction if it is measured as `clean` is."""
    damage: Mapping[str, Test]
    """What should be as it was: retained facts in every format, other knowledge, text."""

    @property
    def kinds(self) -> dict[str, str]:
        """Column -> what it says: clean, asked, latent, attack or damage. ValueError for a column named twice."""
        parts = {"asked": self.asked, "latent": self.latent, "attack": self.attacks, "damage": self.damage}
        names = [CLEAN, *(name for tests in parts.values() for name in tests)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"expected each column of an audit once, got {twice[0]!r} twice: rename one of them.")
        return {CLEAN: CLEAN} | {name: kind for kind, tests in parts.items() for name in tests}

    @property
    def tests(self) -> dict[str, Test]:
        """Every column and its test, as `compare` takes them."""
        tests = {CLEAN: self.clean, **self.asked, **self.latent, **self.attacks, **self.damage}
        return {name: tests[name] for name in self.kinds}
