"""What to forget and what to keep, in every format: prompts, tasks and their builders."""

from mechunlearn.tasks.athletes import authors_athletes
from mechunlearn.tasks.building import answered, build, knows
from mechunlearn.tasks.counterfacts import counterfact
from mechunlearn.tasks.facts import general_knowledge
from mechunlearn.tasks.frames import from_frame
from mechunlearn.tasks.known import known_facts
from mechunlearn.tasks.prompts import Prompts, joined
from mechunlearn.tasks.questions import Wording
from mechunlearn.tasks.splits import Validation, partitioned, validation_split
from mechunlearn.tasks.sports import sports_facts, with_random_subjects
from mechunlearn.tasks.task import Format, Task
from mechunlearn.tasks.text import TextStream, as_prompts, pack, pile, rows_of

__all__ = [
    "Format", "Prompts", "Task", "TextStream", "Validation", "Wording", "answered", "as_prompts", "authors_athletes",
    "build", "counterfact", "from_frame", "general_knowledge", "joined", "known_facts", "knows", "pack", "partitioned",
    "pile", "rows_of", "sports_facts", "validation_split", "with_random_subjects",
]  # fmt: skip
