"""Localize a piece of knowledge in a language model, edit it there, and test whether it is gone.

import mechunlearn as mu

model = mu.testbed.load()
task = mu.tasks.sports_facts(model, forget="basketball")
where = mu.localize.attribution_patching(model, task.forget).top(fraction=0.05)
edit = mu.edit.finetune(model, task, where)
mu.evaluate.compare(model, task, {"attribution": edit}).table
"""

from mechunlearn import auditing, components, edit, evaluate, localize, losses, metrics, model, tasks, testbed
from mechunlearn.auditing import Audit, audit
from mechunlearn.components import Component, ComponentMask, ComponentScores, EdgeMask, EdgeScores, ModelShape
from mechunlearn.model import fingerprint, shape
from mechunlearn.tasks import Prompts, Task
from mechunlearn.weights import Edit

__version__ = "0.1.0"

__all__ = [
    "Audit", "Component", "ComponentMask", "ComponentScores", "EdgeMask", "EdgeScores", "Edit", "ModelShape",
    "Prompts", "Task", "audit", "auditing", "components", "edit", "evaluate", "fingerprint", "localize", "losses",
    "metrics", "model", "shape", "tasks", "testbed",
]  # fmt: skip
