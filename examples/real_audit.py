"""Is it really gone? An edit of a real pretrained model, audited: every test and attack with a small budget.

    python examples/real_audit.py --out out/real_audit

Erases twelve capitals from SmolLM2 at the MLPs that integrated gradients rank first, and audits that beside the
same edit at a random place. No copy of the model exists that never knew: chance and strangers (countries whose
capitals it does not know) are the controls. About eighteen minutes on two cores.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

from pictures import write_pngs

import mechunlearn as mu

SUBJECTS, MLPS = 12, 7
FORMATS = ("chat", "two-shot question", "reverse", "kept, language")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/real_audit"))
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps per edit")
    parser.add_argument("--learning-rate", type=float, default=2.5e-4)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    model = mu.testbed.smollm2()
    task = mu.tasks.known_facts(model, relation="capital", forget=SUBJECTS, formats=FORMATS, train=0.5)
    metric = mu.metrics.answer_log_probability
    scores = mu.localize.integrated_gradients(model, task.forget, metric=metric, components=mu.components.mlps)
    where = scores.top(k=MLPS)
    options: dict[str, Any] = {"learning_rate": arguments.learning_rate, "batch_size": 8, "text_batch_size": 1}
    editor = partial(mu.edit.finetune, steps=arguments.steps, **options)
    edit = editor(model, task, where)
    started = time.time()
    audit = mu.audit(model, task, edit, editor=editor, results=arguments.out / "cells.json")
    print(f"{where}\n\n{audit}\n\nThe audit took {(time.time() - started) / 60:.1f} minutes.")
    audit.report.save(arguments.out / "report.json")
    (arguments.out / "verdict.md").write_text(f"{audit}\n")
    write_pngs({arguments.out / "audit.png": audit.plot()})


if __name__ == "__main__":
    main()
