"""What each attack finds in four states of the shipped model; the table of docs/howto/attacks.md.

    python benchmarks/attacks.py

Two that only hide basketball (a turned row of the unembedding, a neuron of the last MLP), one edited gently, and the
twin that never knew. Mean probability over the candidates for athletes whom no attack saw, at the strongest point of
each attack, and in brackets the same for athletes whom the model does not know. One seed.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

import mechunlearn as mu
from mechunlearn import evaluate
from mechunlearn.evaluate import Result

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from hidden import late_neuron, unembedding_turned

few = {"learning_rates": (1e-3,), "steps": 16, "batch_size": 8}
ATTACKS = {
    "`relearn`, 16 steps of 8": partial(evaluate.relearn, **few),
    "`relearn`, 16 steps of 8, nothing retained": partial(evaluate.relearn, **few, retain_coefficient=0.0),
    "`relearn_lora`, rank 16, 8 steps": partial(
        evaluate.relearn_lora, rank=16, learning_rates=(3e-3,), steps=8, batch_size=16, text_coefficient=0.0
    ),
    "`relearn_benign`, 50 steps": partial(evaluate.relearn_benign, learning_rates=(1e-3,)),
    "`few_shot`": evaluate.few_shot,
    "`soft_prompt`, 64 steps": partial(evaluate.soft_prompt, restarts=1),
    "`direction_ablation`": evaluate.direction_ablation,
    "`quantized`": evaluate.quantized,
    "`noised`": evaluate.noised,
}


def main() -> None:
    torch.set_num_threads(2)
    model, untouched, twin = mu.testbed.load(), mu.testbed.load(), mu.testbed.load(without="basketball")
    task = mu.tasks.sports_facts(model, forget="basketball")
    where = mu.ComponentMask.of(["L0MLP", "L1MLP"], mu.shape(model))
    gentle = mu.edit.finetune(model, task, where, steps=20, progress=False)
    states = {
        "hidden, unembedding": unembedding_turned(model, task),
        "hidden, last MLP": late_neuron(model, task).applied(model),
        "edited gently": gentle.applied(model),
        "never knew": nullcontext(twin),
    }
    columns = {name: list(_found(state, task, untouched)) for name, state in states.items()}
    print(f"| | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    for line, name in enumerate(["before", *ATTACKS]):
        print(f"| {name} | {' | '.join(column[line] for column in columns.values())} |")


def _found(state, task: mu.Task, untouched: mu.model.Model) -> Iterator[str]:
    with state as attacked:
        yield f"{evaluate.in_format(attacked, task).value:.2f}"
        for attack in ATTACKS.values():
            if attack is evaluate.direction_ablation:
                attack = partial(attack, original=lambda: nullcontext(untouched))
            yield _written(attack(attacked, task))


def _written(found: Result) -> str:
    """The strongest point, and the control there."""
    assert found.curve is not None
    place = int(found.curve.mean.argmax())
    nobody = found.control.curve.mean[place] if found.control is not None and found.control.curve is not None else None
    return f"{found.value:.2f}" + ("" if nobody is None else f" ({float(nobody):.2f})")


if __name__ == "__main__":
    main()
