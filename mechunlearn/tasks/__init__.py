"""What to forget and what to keep, in every format: prompts, tasks and their builders."""

from mechunlearn.tasks.athletes import authors_athletes
from mechunlearn.tasks.build import answered, build
from mechunlearn.tasks.counterfact import counterfact
from mechunlearn.tasks.from_frame import from_frame
from mechunlearn.tasks.joined import joined
from mechunlearn.tasks.knowledge import general_knowledge
from mechunlearn.tasks.known import knows
from mechunlearn.tasks.other_subjects import with_random_subjects
from mechunlearn.tasks.prompts import Prompts
from mechunlearn.tasks.split import Validation, partitioned, validation_split
from mechunlearn.tasks.sports import sports_facts
from mechunlearn.tasks.streams import TextStream, pile
from mechunlearn.tasks.task import Format, Task
from mechunlearn.tasks.text import as_prompts, pack, rows_of

__all__ = [
    "Format",
    "Prompts",
    "Task",
    "TextStream",
    "Validation",
    "answered",
    "as_prompts",
    "authors_athletes",
    "build",
    "counterfact",
    "from_frame",
    "general_knowledge",
    "joined",
    "knows",
    "pack",
    "partitioned",
    "pile",
    "rows_of",
    "sports_facts",
    "validation_split",
    "with_random_subjects",
]
