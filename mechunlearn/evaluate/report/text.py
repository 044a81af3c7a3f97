"""A report as text: its table, and notes on what the numbers mean and what failed; as Markdown and as LaTeX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mechunlearn.evaluate.grid.cells import Cell
from mechunlearn.evaluate.report.frames import by_row_and_test, first_results, interval_of, value_over_seeds

_WIDEST = 13
"""Columns, with "edited weights"."""


_NAMED = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {character: f"\\text{name}{{}}" for character, name in _NAMED.items()}
    | {"\n": " "}
)
"""Characters that LaTeX writes otherwise."""


@dataclass(frozen=True)
class TextTable:
    """A table whose numbers are written out."""

    columns: tuple[str, ...]
    """The tests, and "edited weights"."""
    rows: Mapping[str, tuple[str, ...]]
    chance: tuple[str, ...]

    def lines(self, chance: str) -> list[tuple[str, ...]]:
        """The head and a line for each row, chance last under this name; of more than 12 tests, one for each test."""
        rows = [(row, *texts) for row, texts in self.rows.items()]
        lines = [("", *self.columns), *rows, (chance, *self.chance)]
        return list(zip(*lines, strict=True)) if self.is_tall else lines

    @property
    def is_tall(self) -> bool:
        """Whether tests are lines: so many columns are not read."""
        return len(self.columns) > _WIDEST


def text_table(cells: Sequence[Cell], weights: Mapping[str, int], *, intervals: bool = False) -> TextTable:
    """The table with three digits, "failed" where there is no result, and nothing where a test was not run."""
    cells_of, first = by_row_and_test(cells), first_results(cells)
    chance = (*("" if r is None or r.chance is None else f"{r.chance:.3f}" for r in first.values()), "")
    rows = {
        row: (*(_text(cells_of.get((row, test), ()), intervals) for test in first), f"{count:,}")
        for row, count in weights.items()
    }
    return TextTable((*first, "edited weights"), rows, chance)


def notes(cells: Sequence[Cell]) -> list[str]:
    """Sentences on what the numbers mean, over how many seeds they are means, and what failed and why."""
    first = {test: result for test, result in first_results(cells).items() if result is not None}
    meanings: dict[str, list[str]] = {}
    for test, result in first.items():
        unit = "" if result.unit in ("", "share") else f", {result.unit}"
        meanings.setdefault(f"{result.sense}{unit}", []).append(test)
    meanings_listed = [f"{meaning}: {_listed(tests)}" for meaning, tests in meanings.items()]
    most = max((len(same) for same in by_row_and_test(cells).values()), default=1)
    return meanings_listed + ([f"mean over up to {most} seeds"] if most > 1 else []) + failures(cells)


def failures(cells: Sequence[Cell]) -> list[str]:
    """A sentence for each failure, with its row, test, seeds and error."""
    several = len({cell.seed for cell in cells}) > 1
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        if cell.result is None:
            seeds.setdefault((cell.row, cell.test, " ".join(cell.error.split())), []).append(str(cell.seed))
    notes = []
    for (row, test, error), seeds_of in seeds.items():
        which = f" (seed{'' if len(seeds_of) == 1 else 's'} {', '.join(seeds_of)})" if several else ""
        notes.append(f"failed: {row}, {test}{which}: {error}")
    return notes


def markdown(cells: Sequence[Cell], weights: Mapping[str, int], *, intervals: bool) -> str:
    table = text_table(cells, weights, intervals=intervals)
    head, *body = [[text.replace("|", r"\|").replace("\n", " ") for text in line] for line in table.lines("*chance*")]
    lines = [head, ["---"] * len(head), *body]
    below = "\n".join(f"- {note}" for note in notes(cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n" + below


def latex(cells: Sequence[Cell], weights: Mapping[str, int], *, intervals: bool) -> str:
    table = text_table(cells, weights, intervals=intervals)
    lines = table.lines("chance")
    head, *body = [" & ".join(text.translate(_LATEX) for text in line) + r" \\" for line in lines]
    body.insert(len(body) - 1, r"\midrule")  # above chance, or the number of weights
    above = [f"% {' '.join(note.split())}" for note in ["needs the package booktabs", *notes(cells)]]
    begin = rf"\begin{{tabular}}{{l*{{{len(lines[0]) - 1}}}{{r}}}}"
    rules = [r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*above, begin, *rules, r"\end{tabular}"]) + "\n"


def _text(cells: Sequence[Cell], intervals: bool) -> str:
    worked = sum(cell.result is not None for cell in cells)
    if not worked:
        return "failed" if cells else ""
    low, high = interval_of(cells) if intervals else (0.0, 0.0)
    between = f" [{low:.3f}, {high:.3f}]" if intervals else ""
    missing = f" ({worked} of {len(cells)} seeds)" if worked < len(cells) else ""
    return f"{value_over_seeds(cells):.3f}{between}{missing}"


def _listed(tests: Sequence[str]) -> str:
    """The names of the tests, with "forget, X" and "retain, X" as one."""
    sides = {side: [test[len(side) :] for test in tests if test.startswith(side)] for side in ("forget, ", "retain, ")}
    both = [name for name in sides["forget, "] if name in sides["retain, "]]
    paired = {side + name for name in both for side in sides}
    return "; ".join(
        ([f"forget and retain ({'; '.join(both)})"] if both else []) + [test for test in tests if test not in paired]
    )
