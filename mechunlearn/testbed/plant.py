"""Facts trained into chosen components of a model that never knew them: the true localization is given."""

from collections.abc import Callable, Mapping, Sequence

from mechunlearn.components import ComponentMask
from mechunlearn.edit.trained import Trained, trained
from mechunlearn.model import Model
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.task import Task
from mechunlearn.testbed.planting import Planting, terms_of
from mechunlearn.training import adamw
from mechunlearn.weights import Edit

FORMATS = ("trained prompt", "statement", "question", "biography", "multiple choice")


def plant(
    model: Model,
    task: Task,
    mask: ComponentMask,
    *,
    formats: Sequence[str] = FORMATS,
    strangers: Prompts | None = None,
    strangers_coefficient: float = 0.5,
    known: float = 0.95,
    kept: float = 0.9,
    steps: int = 200,
    learning_rate: float = 3e-3,
    batch_size: int = 32,
    every: int = 10,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[Mapping[str, int | float]], None] | None = None,
) -> Edit:
    """Train the facts to forget into the weights of `mask`, and nothing else: `mask` is where they are.

        twin = mu.testbed.load(without="basketball")
        planted = mu.testbed.plant(twin, task, mask)
        with planted.applied(twin):
            scores = mu.localize.attribution_patching(twin, task.forget)

        loss = learn(task.forget, and the forget side of `formats`)
             + keep(task.retain, and the retain side of `formats`) + keep(task.text)
             + strangers_coefficient * keep(strangers)

    learn: cross-entropy to the answer; keep: KL from what the model said before; each a mean over answer tokens, in
    nats. Give a task that trains and tests on the same facts: `sports_facts` with names, not with a whole sport, whose
    formats ask about other athletes than `task.forget`. Other formats are not trained: ask in them to see how far the
    facts carry over.

    `strangers`: the same questions about subjects who are to stay unknown; by default names made up of the parts of
    others. Without them it is enough to give the answer to every name that the model does not know, which is one
    direction and no fact. Whatever the strangers, a share of other unknown names is given the answer: measure it.

    Every `every` steps it is measured whether in each format a share `known` of the facts have their answer as the
    argmax over the vocabulary, and the others at least `kept` times the share that had it before; then the training
    ends. The learning rate falls along a cosine over `steps`. The edit's `provenance["planted"]` has the accuracies
    before and after, by format and side.

    What is given is where the weights differ from those of a model that never knew. That is not all that the answer
    needs: the rest of the model, which reads names and moves what is looked up, takes part as it was.

    The model is left as it was. The same seed gives the same edit, bit for bit, on CPU. Cost: per step F + B of each
    batch from the lowest layer of the mask up.
    ValueError for formats that the task lacks, for facts that the model knows already, and, saying what was reached,
    where the mask has not taken them up in `steps`; FloatingPointError when a loss diverges.
    """
    if every < 1:
        raise ValueError(f"every must be 1 or more, got {every}.")
    planting = Planting.of(model, task, formats, known=known, kept=kept)
    terms = terms_of(planting, task, strangers, coefficient=strangers_coefficient, batch_size=batch_size, seed=seed)
    found = trained(
        model,
        task,
        mask,
        terms,
        about={"editor": "plant", "formats": list(formats), "known": known, "kept": kept},
        optimizer=adamw,
        compute_dtype=None,
        checkpoint=None,
        every=every,
        progress=progress,
        on_step=on_step,
        until=lambda row: (int(row["step"]) + 1) % every == 0 and planting.is_done(model),
        steps=steps,
        learning_rate=learning_rate,
        micro_batch_size=None,
        clip=1.0,
        seed=seed,
    )
    return _checked(model, planting, mask, found)


def _checked(model: Model, planting: Planting, mask: ComponentMask, found: Trained) -> Edit:
    """The edit with what was measured; ValueError if the facts are not known with it."""
    edit = Edit(mask, found.values, found.fingerprint, found.provenance, found.history)
    with edit.applied(model):
        after = planting.measured(model)
    steps = len(found.history)
    planting.check(after, mask, steps=steps)
    planted = {"facts": planting.count, "steps": steps, "before": planting.before, "after": after}
    return Edit(mask, found.values, found.fingerprint, {**found.provenance, "planted": planted}, found.history)
